"""Trains methods x networks x seeds and compares them: `python -m ffl_jax.sweep --config=… --output=DIR`."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from ffl_jax import cli, main
from ffl_jax.devices import preemption
from ffl_jax.errors import ConfigError, DatasetError, FFLError, Preempted, ResourceError

USAGE = """
python -m ffl_jax.sweep --output=DIR [--config=configs/DATA.py[:PRESETS]] [--methods=ffl,independent]
                        [--networks=resnet8,resnet20+resnet32] [--seeds=0,1,2] [--together]
                        [--slurm="OPTIONS OF sbatch"] [--config.KEY=VALUE ...]

Trains every method with every network and seed, one run after another, each in DIR/METHOD-NETWORK-seedN, and
writes a report to DIR/report. What follows --config holds for all runs; recipe=common among the PRESETS
trains all methods by the same recipe, where each would take its published one. The same command continues a
sweep that was stopped, and adds methods, networks and seeds to one that was complete.
"""
_PROGRAM = [sys.executable, "-m", "ffl_jax.main"]
# After these there is no point in the next run: it would end in the same way.
_HOPELESS = (DatasetError.exit_code, ResourceError.exit_code)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, or several seeds in one program.

    Attributes:
      title: for people.
      workdir: of the run.
      arguments: of `ffl_jax.main`.
      config: that these make.
    """

    title: str
    workdir: Path
    arguments: list[str]
    config: object


def command(argv: list[str]):
    values = cli.new_flags()
    flags.DEFINE_string("output", None, "The folder for the runs and the report.", flag_values=values)
    flags.DEFINE_string(
        "config", "configs/digits.py", "Configuration file, PRESETS after a colon.", flag_values=values
    )
    flags.DEFINE_list("methods", None, "Which; all by default.", flag_values=values)
    flags.DEFINE_list("networks", None, "Which; that of the configuration by default.", flag_values=values)
    flags.DEFINE_list("seeds", "0", "A run for each.", flag_values=values)
    flags.DEFINE_bool("together", False, "Consecutive seeds share one program.", flag_values=values)
    flags.DEFINE_string(
        "slurm",
        None,
        "Submits an array of jobs with these options of sbatch, and returns.",
        flag_values=values,
    )
    others = [argument for argument in argv[1:] if argument.startswith("--config.")]
    cli.parse(values, [argument for argument in argv if argument not in others], USAGE)
    if not values.output:
        raise ConfigError("--output is missing: give a folder for the runs and the report.")
    if not all(re.fullmatch(r"\d{1,9}", seed) for seed in values.seeds):
        raise ConfigError(f"--seeds={','.join(values.seeds)} must be whole numbers, such as 0,1,2.")
    seeds = sorted({int(seed) for seed in values.seeds})
    for given, flag in (("seed", "seeds"), ("num_seeds", "together")):
        if any(argument.partition("=")[0] == f"--config.{given}" for argument in others):
            raise ConfigError(f"--config.{given}: a sweep sets it by --{flag}.")
    for preset in values.config.partition(":")[2].split(","):
        if preset.partition("=")[0] in ("method", "network"):
            raise ConfigError(
                f"--config: {preset} after the colon: a sweep sets it by --{preset.split('=')[0]}s."
            )
    if values.together and seeds != list(range(seeds[0], seeds[0] + len(seeds))):
        raise ConfigError(f"--together takes seeds that follow one another, got {','.join(map(str, seeds))}.")

    from ffl_jax.methods import METHODS

    methods = values.methods or sorted(METHODS)
    output = Path(values.output).absolute()
    groups = [[seed] for seed in seeds] if not values.together else [seeds]
    jobs = [
        _job(values.config, others, output, method, network, group)
        for group in groups  # every method once first: a table is there early
        for network in values.networks or [None]
        for method in methods
    ]
    if values.slurm is not None:
        _submit(values, jobs, methods, seeds, others, output)
        return
    failed = _train(jobs)
    from ffl_jax.reporting import report

    if len(failed) < len(jobs):
        report.write([str(output)], output / "report")
        print(f"report: {output / 'report'}/index.html, report.md, results.csv")
    if failed:
        (title, code), *more = failed.items()
        others = f", and {len(more)} more" if more else ""
        error = FFLError(
            f"{title} ended with exit code {code}{others}: see above; run again to try once more."
        )
        error.exit_code = code if code > 0 else 1
        raise error


def _job(
    file: str, others: list[str], output: Path, method: str, network: str | None, seeds: list[int]
) -> Job:
    """Raises ConfigError where the run would be refused."""
    from ffl_jax.training import config as config_lib

    path, _, presets = file.partition(":")
    own = {"method": method, "network": network}
    presets = ",".join(filter(None, (presets, *(f"{key}={value}" for key, value in own.items() if value))))
    arguments = [f"--config={path}:{presets}", *others, f"--config.seed={seeds[0]}"]
    if len(seeds) > 1:
        arguments.append(f"--config.num_seeds={len(seeds)}")
    config = main.parse(["main", *arguments]).config
    config_lib.check(config)
    name = f"seed{seeds[0]}" if len(seeds) == 1 else f"seeds{seeds[0]}-{seeds[-1]}"
    network = config.subnetworks.network
    workdir = output / f"{method}-{network}-{name}"
    title = f"{method}, {network}, {name.replace('seed', 'seed ', 1).replace('seed s', 'seeds ')}"
    return Job(title, workdir, [*arguments, f"--workdir={workdir}"], config)


def _train(jobs: list[Job]) -> dict[str, int]:
    """{title: exit code} of the runs that failed."""
    failed = {}
    for number, job in enumerate(jobs, 1):
        where = f"[{number}/{len(jobs)}] {job.title}"
        if _is_complete(job):
            print(f"{where}: complete", flush=True)
            continue
        print(where, flush=True)
        code = _run([*_PROGRAM, *job.arguments])
        if code == Preempted.exit_code or preemption.requested():
            raise Preempted(f"stopped in {job.title}: run the same command again to continue.")
        if code:
            failed[job.title] = code
        if code in _HOPELESS:
            break
    return failed


def _run(arguments: list[str]) -> int:
    """Runs a process to its end; a signal that comes here is passed on, once, and waited for."""
    # In a session of its own: Ctrl-C would reach it a second time, and a second signal ends it at once.
    process = subprocess.Popen(arguments, start_new_session=True)
    told = False
    with preemption.deferred():
        while process.poll() is None:
            if preemption.requested() and not told:
                process.terminate()
                told = True
            time.sleep(0.1)
    return process.returncode


def _is_complete(job: Job) -> bool:
    """Whether a run of this configuration has come to its end; another one is for `main` to refuse."""
    from ffl_jax.training import config as config_lib
    from ffl_jax.workdir import outputs

    stored = outputs.read_json(job.workdir / "config.json")
    wanted = config_lib.to_json(job.config)
    if outputs.read_json(job.workdir / "summary.json").get("status") != "completed" or not stored:
        return False
    if not wanted["data"]["mean"]:  # computed from the data
        wanted["data"] |= {key: stored["data"].get(key) for key in ("mean", "std")}
    same = config_lib.fixed_part(stored) == config_lib.fixed_part(wanted)
    return same and stored["epochs"] == wanted["epochs"]


def _submit(values, jobs: list[Job], methods: list[str], seeds: list[int], others: list[str], output: Path):
    """Hands an array of jobs to Slurm, and after them the report."""
    if values.together:
        raise ConfigError("--together and --slurm exclude each other: Slurm runs the seeds side by side.")
    if not shutil.which("sbatch"):
        raise ConfigError("--slurm: there is no sbatch on this machine: run it where jobs are submitted.")
    networks = [job.config.subnetworks.network for job in jobs[:: len(methods)]]
    settings = {
        "METHODS": " ".join(methods),
        "NETWORKS": " ".join(dict.fromkeys(networks)),
        "SEEDS": " ".join(map(str, seeds)),
        "CONFIG": values.config,
        "RUNS": str(output),
    }
    options = shlex.split(values.slurm)
    array = ["sbatch", "--parsable", f"--array=0-{len(jobs) - 1}", *options, "launch/slurm.sbatch", *others]
    number = _sbatch(array, settings).split(";")[0]
    line = [sys.executable, "-m", "ffl_jax.report", str(output), f"--output={output / 'report'}"]
    # Where options ask for a partition or an account, the report needs them too, but not their GPUs.
    kept = [option for option in options if re.match(r"--(partition|account|qos|clusters)=|-[pAqM]", option)]
    after = ["sbatch", "--parsable", f"--dependency=afterany:{number}", "--ntasks=1", "--time=30", *kept]
    then = _sbatch([*after, "--job-name=report", f"--wrap={shlex.join(line)}"], {}).split(";")[0]
    print(f"submitted {len(jobs)} runs as job {number}, and their report as job {then}, to {output}/report")


def _sbatch(arguments: list[str], settings: dict[str, str]) -> str:
    done = subprocess.run(arguments, env=os.environ | settings, cwd=cli.ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"sbatch refused: {reason}; see --slurm.")
    return done.stdout.strip()


if __name__ == "__main__":
    cli.run(command)
