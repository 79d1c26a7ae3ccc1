"""Sweeps: the runs that lists of methods, networks and seeds multiply to, one after another or by Slurm."""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ffl_jax.devices import preemption
from ffl_jax.errors import ConfigError, DatasetError, FFLError, Preempted, ResourceError
from ffl_jax.methods import METHODS
from ffl_jax.training import config as config_lib
from ffl_jax.workdir import files
from ffl_jax.workdir.paths import ROOT

_PROGRAM = [sys.executable, "-m", "ffl_jax.main"]
# After these there is no point in the next run: it would end in the same way.
_HOPELESS = (DatasetError.exit_code, ResourceError.exit_code)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, or several seeds in one program.

    Attributes:
      method, network: names.
      seeds: one, or several that follow one another.
      workdir: of the run.
      arguments: of `ffl_jax.main`.
      config: that these make.
    """

    method: str
    network: str
    seeds: list[int]
    workdir: Path
    arguments: list[str]
    config: ConfigDict

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.method}, {self.network}, {_span('seed ', self.seeds)}"


def plan(
    parse: Callable[[list[str]], Any],
    file: str,
    overrides: list[str],
    output: Path,
    methods: list[str],
    networks: list[str],
    seeds: list[str],
    together: bool,
) -> list[Job]:
    """The runs of every method with every network and seed; every method once first: a table is there early.

    Args:
      parse: of `ffl_jax.main`: gives what has a `config` for a command line.
      file: the configuration file, presets after a colon.
      overrides: `--config.KEY=VALUE`, for all runs.
      output: the folder for the workdirs.
      methods: names; all methods where it is empty.
      networks: names; that of the configuration where it is empty.
      seeds: whole numbers.
      together: whether the seeds share one program.

    Raises:
      ConfigError: something is set in two places, or a run would be refused.
    """
    if not all(re.fullmatch(r"\d{1,9}", seed) for seed in seeds):
        raise ConfigError(f"--seeds={','.join(seeds)} must be whole numbers, such as 0,1,2.")
    numbers = sorted({int(seed) for seed in seeds})
    for given, flag in (("seed", "seeds"), ("num_seeds", "together")):
        if any(argument.partition("=")[0] == f"--config.{given}" for argument in overrides):
            raise ConfigError(f"--config.{given}: a sweep sets it by --{flag}.")
    for preset in file.partition(":")[2].split(","):
        if (name := preset.partition("=")[0]) in ("method", "network"):
            raise ConfigError(f"--config: {preset} after the colon: a sweep sets it by --{name}s.")
    if together and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ConfigError(
            f"--together takes seeds that follow one another, got {','.join(map(str, numbers))}."
        )
    return [
        _job(parse, file, overrides, method, network, group, output)
        for group in ([numbers] if together else [[number] for number in numbers])
        for network in dict.fromkeys(networks or [None])
        for method in dict.fromkeys(methods or sorted(METHODS))
    ]


def _job(parse, file, overrides, method, network, seeds, output):
    path, _, presets = file.partition(":")
    own = (f"method={method}", f"network={network}" if network else "")
    arguments = [f"--config={path}:{','.join(filter(None, (presets, *own)))}", *overrides]
    arguments.append(f"--config.seed={seeds[0]}")
    if len(seeds) > 1:
        arguments.append(f"--config.num_seeds={len(seeds)}")
    config = parse(["main", *arguments]).config
    config_lib.check(config)
    network = config.subnetworks.network
    workdir = output / f"{method}-{network}-{_span('seed', seeds)}"
    return Job(method, network, seeds, workdir, [*arguments, f"--workdir={workdir}"], config)


def _span(title, seeds):
    """ "seed 3" or "seeds 3-5", with the blank that `title` ends in, or without."""
    if len(seeds) == 1:
        return f"{title}{seeds[0]}"
    return f"{title.replace('seed', 'seeds')}{seeds[0]}-{seeds[-1]}"


def train(jobs: list[Job]) -> dict[str, int]:
    """Runs the jobs that are not complete; returns {title: exit code} of those that failed.

    Raises:
      Preempted: a signal came; the run that it stopped is saved.
    """
    failed = {}
    for number, job in enumerate(jobs, 1):
        where = f"[{number}/{len(jobs)}] {job.title}"
        if is_complete(job):
            print(f"{where}: complete", flush=True)
            continue
        print(where, flush=True)
        code = run([*_PROGRAM, *job.arguments])
        if code == Preempted.exit_code or preemption.requested():
            raise Preempted(f"stopped in {job.title}: run the same command again to continue.")
        if code:
            failed[job.title] = code
        if code in _HOPELESS:
            break
    return failed


def failure(failed: dict[str, int]) -> FFLError:
    """The refusal that a sweep ends with, its exit code that of the first run that failed."""
    (title, code), *more = failed.items()
    others = f", and {len(more)} more" if more else ""
    if code < 0:
        names = {one.value: one.name for one in signal.Signals}
        return ResourceError(
            f"{title} was ended by {names.get(-code, -code)}{others}; SIGKILL is often the system's, for "
            "want of memory: look at its log (dmesg), or lower config.batch_size; run again to continue."
        )
    error = FFLError(f"{title} ended with exit code {code}{others}: see above; run again to try once more.")
    error.exit_code = code
    return error


def run(arguments: list[str]) -> int:
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


def is_complete(job: Job) -> bool:
    """Whether a run of this configuration has come to its end; another one is for `main` to refuse."""
    stored = files.read_json(job.workdir / "config.json")
    wanted = config_lib.to_json(job.config)
    if files.read_json(job.workdir / "summary.json").get("status") != "completed":
        return False
    try:
        if not wanted["data"]["mean"]:  # computed from the data
            wanted["data"] |= {key: stored["data"][key] for key in ("mean", "std")}
        same = config_lib.fixed_part(stored) == config_lib.fixed_part(wanted)
        return same and stored["epochs"] == wanted["epochs"]
    except (KeyError, TypeError, AttributeError, ConfigError):  # not of this version, or damaged
        return False


def submit(jobs: list[Job], file: str, overrides: list[str], output: Path, options: list[str]) -> str:
    """Hands an array of jobs to Slurm, and after them the report; returns what to tell the user.

    Args:
      jobs, file, overrides, output: of `plan`, with a job for each seed.
      options: of sbatch.

    Raises:
      ConfigError: there is no sbatch, or it refuses.
    """
    if not shutil.which("sbatch"):
        raise ConfigError("--slurm: there is no sbatch on this machine: run it where jobs are submitted.")
    lists = {
        "METHODS": [job.method for job in jobs],
        "NETWORKS": [job.network for job in jobs],
        "SEEDS": [str(job.seeds[0]) for job in jobs],
    }
    settings = {name: " ".join(dict.fromkeys(values)) for name, values in lists.items()}
    settings |= {"CONFIG": file, "RUNS": str(output)}
    array = [f"--array=0-{len(jobs) - 1}", *options, "launch/slurm.sbatch", *overrides]
    number = _sbatch(array, settings)
    line = [sys.executable, "-m", "ffl_jax.report", str(output), f"--output={output / 'report'}"]
    # Where options ask for a partition or an account, the report needs them too, but not their GPUs.
    kept = [option for option in options if re.match(r"--(partition|account|qos|clusters)=|-[pAqM]", option)]
    after = [f"--dependency=afterany:{number}", "--ntasks=1", "--time=30", *kept, "--job-name=report"]
    then = _sbatch([*after, f"--wrap={shlex.join(line)}"], {})
    return f"submitted {len(jobs)} runs as job {number}, and their report as job {then}, to {output}/report"


def _sbatch(arguments, settings) -> str:
    """The number of the job."""
    done = subprocess.run(
        ["sbatch", "--parsable", *arguments],
        env=os.environ | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"sbatch refused: {reason}; see --slurm.")
    return done.stdout.strip().split(";")[0]
