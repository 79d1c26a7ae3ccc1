"""Sweeps: the runs that lists of methods, networks and seeds multiply to, and how they are run."""

import concurrent.futures
import dataclasses
import queue
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ffl_jax.devices import preemption
from ffl_jax.errors import ConfigError, DatasetError, FFLError, Preempted, ResourceError
from ffl_jax.methods import METHODS
from ffl_jax.training import config as config_lib
from ffl_jax.training.slots import deal, run
from ffl_jax.workdir import files

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


def train(jobs: list[Job], at_once: int = 1) -> dict[str, int]:
    """Runs the jobs that are not complete; returns {title: exit code} of those that failed.

    Args:
      at_once: how many run at the same time. They divide the machine, and each line says whose it is.

    Raises:
      Preempted: a signal came; the runs that it stopped are saved.
    """
    at_once = max(1, min(at_once, sum(not is_complete(job) for job in jobs)))
    free, codes = queue.SimpleQueue(), [0] * len(jobs)
    for slot in deal(at_once):
        free.put(slot)

    def stopping():
        return preemption.requested() or Preempted.exit_code in codes

    def work(index):
        where = f"[{index + 1}/{len(jobs)}] {jobs[index].title}"
        if stopping():
            return
        if is_complete(jobs[index]):
            print(f"{where}: complete", flush=True)
        elif any(code in _HOPELESS for code in codes):
            print(f"{where}: not started, for it would end in the same way", flush=True)
        else:
            print(where, flush=True)
            slot = free.get()
            try:
                codes[index] = _run(jobs[index], slot, where if at_once > 1 else "", stopping)
            finally:
                free.put(slot)

    with preemption.deferred(), concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        # One after another they are run by this thread, as a terminal expects.
        list((pool.map if at_once > 1 else map)(work, range(len(jobs))))
    if stopping():
        stopped = [job.title for job, code in zip(jobs, codes, strict=True) if code == Preempted.exit_code]
        first, others = (stopped or ["the sweep"])[0], f", and {len(stopped) - 1} more" if stopped[1:] else ""
        raise Preempted(f"stopped in {first}{others}: run the same command again to continue.")
    return {job.title: code for job, code in zip(jobs, codes, strict=True) if code}


def _run(job, slot, prefix, stopping) -> int:
    """Its exit code; with a prefix, a line for its end as well."""
    arguments = [*_PROGRAM, *job.arguments]
    if not prefix:
        return run(arguments)
    code = run(arguments, slot, prefix, stopping)
    print(f"{prefix}: {_ended(code) if code else 'done'}", flush=True)
    return code


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by {({one.value: one.name for one in signal.Signals}).get(-code, -code)}"


def failure(failed: dict[str, int]) -> FFLError:
    """The refusal that a sweep ends with, its exit code that of the first run that failed."""
    (title, code), *more = failed.items()
    others = f", and {len(more)} more" if more else ""
    if code < 0:
        return ResourceError(
            f"{title} {_ended(code)}{others}; SIGKILL is often the system's, for want of memory: look at its "
            "log (dmesg), or lower config.batch_size; run again to continue."
        )
    error = FFLError(f"{title} {_ended(code)}{others}: see above; run again to try once more.")
    error.exit_code = code
    return error


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
