"""Sweeps that Slurm runs: an array of jobs, and the report after them."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ffl_jax.errors import ConfigError
from ffl_jax.workdir.paths import CONFIGS, ROOT, expanded

_SCRIPT = "launch/slurm.sbatch"
# Keys of the configuration that hold paths, or several of them.
_PATHS = ("data.data_dir", "data.manual_dir", "data.cache_dir", "teachers.runs")
# Options of sbatch that say where a job may run: the report goes there, too, but without GPUs.
_PLACES = {"-p": "--partition", "-A": "--account", "-q": "--qos", "-M": "--clusters"}
_FILES = {"-o": "--output", "-e": "--error", "-i": "--input", "-D": "--chdir"}  # and those with paths


def submit(jobs: Sequence, file: str, overrides: list[str], output: Path, options: str) -> str:
    """Hands an array of jobs to Slurm, and after them the report; returns what to tell the user.

    They start in another folder: every path that they are given is absolute.

    Args:
      jobs, file, overrides, output: of `sweep.plan`, with a job for each seed.
      options: of sbatch, as on a command line.

    Raises:
      ConfigError: there is no sbatch, or it refuses.
    """
    if not shutil.which("sbatch"):
        raise ConfigError("--slurm: there is no sbatch on this machine: run it where jobs are submitted.")
    if not (ROOT / _SCRIPT).is_file():
        raise ConfigError(f"--slurm: {ROOT / _SCRIPT} is missing: take a clone of the repository for it.")
    given = _options(options)
    lists = {
        "METHODS": [job.method for job in jobs],
        "NETWORKS": [job.network for job in jobs],
        "SEEDS": [str(job.seeds[0]) for job in jobs],
    }
    settings = {name: " ".join(dict.fromkeys(values)) for name, values in lists.items()}
    settings |= {"CONFIG": _absolute_file(file), "RUNS": str(output)}
    modules = (os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    settings["PYTHONPATH"] = os.pathsep.join(
        map(os.path.abspath, modules)
    )  # where `config.modules` are found
    words = [word for option in given for word in option]
    array = [f"--array=0-{len(jobs) - 1}", *words, _SCRIPT, *_absolute_overrides(jobs, overrides)]
    number = _sbatch(array, settings)
    line = [sys.executable, "-m", "ffl_jax.report", str(output), f"--output={output / 'report'}"]
    kept = [word for option in given if _name(option, _PLACES) for word in option]
    after = [f"--dependency=afterany:{number}", "--ntasks=1", "--time=30", *kept, "--job-name=report"]
    then = _sbatch([*after, f"--wrap={shlex.join(line)}"], {})
    return f"submitted {len(jobs)} runs as job {number}, and their report as job {then}, to {output}/report"


def _options(text: str) -> list[list[str]]:
    """[["--flag=value"], ["--flag", "value"], ["--flag"], …] of a text that is quoted as in a shell."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--slurm={text}: {error}: quote values as in a shell.") from error
    options: list[list[str]] = []
    for word in words:
        if word.startswith("-") and word != "-":
            options.append([word])
        elif options and len(options[-1]) == 1 and "=" not in options[-1][0]:
            options[-1].append(word)
        else:
            raise ConfigError(
                f"--slurm={text}: {word!r} belongs to no option of sbatch: quote what has blanks."
            )
    return [_absolute_option(option) if _name(option, _FILES) else option for option in options]


def _name(option: list[str], known: dict[str, str]) -> str | None:
    """The long name of an option if it is among {short: long}."""
    long, short = option[0].partition("=")[0], option[0][:2]
    return long if long in known.values() else known.get(short)


def _absolute_option(option: list[str]) -> list[str]:
    *before, last = option
    if before:
        return [*before, _absolute(last)]
    name, equals, value = last.partition("=") if last.startswith("--") else (last[:2], "", last[2:])
    return [f"{name}{equals}{_absolute(value)}"]


def _absolute(path: str) -> str:
    """The same place seen from any folder; a bucket's address stays as it is."""
    return path if not path or "://" in path else str(expanded(path).absolute())


def _absolute_file(file: str) -> str:
    """FILE or FILE:PRESETS; what is not there is looked for beside the package, from wherever it is read."""
    name, colon, presets = file.partition(":")
    there = Path(name).exists()
    return f"{Path(name).absolute() if there else CONFIGS.parent / name}{colon}{presets}"


def _absolute_overrides(jobs, overrides: list[str]) -> list[str]:
    """The overrides, with the paths of the jobs' configurations, also of those that the file gives."""
    kept, absolute = list(overrides), []
    for key in _PATHS:
        section, name = key.split(".")
        values = {job.config[section][name] if section in job.config else None for job in jobs}
        paths = {value: (value,) if isinstance(value, str) else value for value in values if value}
        moved = {value: tuple(map(_absolute, some)) for value, some in paths.items()}
        if all(moved[value] == paths[value] for value in paths):
            continue
        if len(values) > 1:
            raise ConfigError(f"--slurm: config.{key} must be absolute, for not all runs have the same one.")
        kept = [one for one in kept if one.partition("=")[0] != f"--config.{key}"]
        absolute += [f"--config.{key}={path}" for some in moved.values() for path in some]
    return [*kept, *absolute]


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
