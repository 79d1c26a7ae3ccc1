"""Finds run folders and reads what they hold, whatever state a run was left in."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ffl_jax.errors import ConfigError
from ffl_jax.methods.base import ENSEMBLE, FUSED, NETWORK, TEACHER
from ffl_jax.reporting.cells import line
from ffl_jax.workdir.files import read_json
from ffl_jax.workdir.log import read_metrics

_FILES = ("config.json", "summary.json", "metrics.jsonl")
_NO_RUNS = ("checkpoints", "tensorboard", "teachers")  # folders inside a run that are no runs to compare
# What not every version of a summary has; of another kind than this, it counts as missing.
_EXTRAS = {"best": dict, "reliability": dict, "diversity": dict}
_EXTRAS |= {"balanced_accuracy": dict, "per_class": dict, "versions": dict, "fingerprint": str, "device": str}
_KINDS = (NETWORK, ENSEMBLE, FUSED, TEACHER)
_DEPTH = 3  # levels of folders that are searched for runs
_ABSURD = 1e30  # no number of a run is larger


@dataclass(frozen=True)
class FinishedRun:
    """One seed of one training, finished.

    Attributes:
      folder: where it is.
      config, summary: of `config.json` and `summary.json`; `training` of the summary counts the teachers too
        that the run trained first.
      metrics: the rows of `metrics.jsonl`, in order; empty where the file is missing.
      dataset, method, networks, seed: of the summary; the names of the sub-networks are in order.
      shipped: the name of the prediction that a user should ship.
      predictors: {prediction: its scores and costs}.
      roles: {prediction: {"kind": of `methods.base`, "network": the name of its form, or None}}; the first of
        a kind stands for it.
    """

    folder: Path
    config: dict
    summary: dict
    metrics: list[dict]
    dataset: str
    method: str
    networks: tuple[str, ...]
    seed: int
    shipped: str
    predictors: dict[str, dict]
    roles: dict[str, dict]


@dataclass(frozen=True)
class Unusable:
    """A run folder whose numbers are in no mean.

    Attributes:
      folder: where it is.
      reason: why, as the end of a sentence.
      identity: (dataset, method, networks, seed) if its files tell, else None.
    """

    folder: Path
    reason: str
    identity: tuple | None = None


def shown(folder: Path) -> str:
    """A folder's name as text, whatever its bytes are, to stand between backticks."""
    return line(os.fsencode(folder).decode(errors="backslashreplace")).replace("`", "'")


def _tidy(value):
    """JSON as a report can show it: each text a line, and a number that is none, or absurd, None."""
    if isinstance(value, dict):
        return {line(key): _tidy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_tidy(inner) for inner in value]
    if isinstance(value, str):
        return line(value)
    return None if isinstance(value, int | float) and not abs(value) < _ABSURD else value


def read(folders: Sequence[str]) -> tuple[list[FinishedRun], list[Unusable], dict[Path, str]]:
    """Reads run folders, and every run inside folders that hold some.

    Args:
      folders: runs, workdirs of several seeds, or folders of either.

    Returns:
      (finished runs, those that cannot be used, {folder: what is wrong with its curves}); a run that is named
      twice is there once.

    Raises:
      ConfigError: a folder is missing or holds no run, none is finished, or two runs differ in nothing that a
        table shows.
    """
    found: dict[Path, None] = {}
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise ConfigError(f"{name} is no folder: give folders of runs, or folders that hold them.")
        inside = list(_search(folder, _DEPTH))
        if not inside:
            raise ConfigError(f"{name} holds no run (no config.json or summary.json): give a --workdir.")
        found |= dict.fromkeys(path.resolve() for path in inside)
    runs, unusable, damaged = [], [], {}
    for folder in found:
        run = _read_run(folder, damaged)
        (runs if isinstance(run, FinishedRun) else unusable).append(run)
    if not runs:
        first, name = unusable[0], shown(unusable[0].folder)
        raise ConfigError(
            f"none of {len(unusable)} run(s) can be used: {name}: {first.reason}; finish one first."
        )
    _refuse_twins(runs)
    return runs, unusable, damaged


def _search(folder: Path, depth: int):
    """The run folders in a folder: itself, its seeds, or those further down."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    seeds = [path for path in inside if path.name.startswith("seed_") and _is_run(path)]
    if seeds:
        yield from seeds
    elif _is_run(folder):
        yield folder
    elif depth:
        for path in inside:
            if path.name not in _NO_RUNS and not path.name.startswith("."):
                yield from _search(path, depth - 1)


def _is_run(folder):
    return any((folder / name).is_file() for name in _FILES)


def _read_run(folder: Path, damaged: dict[Path, str]) -> FinishedRun | Unusable:
    read = {}
    for name in _FILES[:2]:
        try:
            read[name] = _tidy(json.loads((folder / name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            return Unusable(folder, f"{name} cannot be read ({error})")
        if not isinstance(read[name], dict):
            return Unusable(folder, f"{name} is not that of a run")
    config, summary = (read.get(name) for name in _FILES[:2])
    if summary is None:
        return Unusable(folder, "no summary.json, it has not come to its end")
    if isinstance(summary.get("seed"), list):
        return Unusable(folder, "its summary is of several seeds, whose folders seed_N are gone")
    wrong = _wrong(summary)
    if wrong:
        return Unusable(folder, f"summary.json {wrong}")
    identity = (summary["dataset"], summary["method"], tuple(summary["networks"]), summary["seed"])
    if summary["status"] != "completed":
        where = f"at step {summary.get('step')}, epoch {_number(summary.get('epoch'))}"
        return Unusable(folder, f"{summary['status']} {where}", identity)
    top1 = summary["predictors"][summary["deploy"]].get("top1")
    if not isinstance(top1, int | float) or not math.isfinite(top1):
        return Unusable(folder, f"summary.json has no test scores of {summary['deploy']}", identity)
    if config is None:
        return Unusable(folder, "no config.json, so that nobody knows how it was trained", identity)
    extras = {key: value for key, value in summary.items() if isinstance(value, _EXTRAS.get(key, object))}
    extras["training"] = _training(folder, summary)
    metrics = _read_metrics(folder, damaged)
    predictors = summary["predictors"]
    return FinishedRun(
        folder, config, extras, metrics, *identity, summary["deploy"], predictors, _roles(summary)
    )


def _wrong(summary: dict) -> str | None:
    """What a summary lacks, as a verb and its object."""
    kinds = {"status": str, "seed": int, "method": str, "networks": list, "dataset": str, "deploy": str}
    for key, kind in (kinds | {"predictors": dict}).items():
        if key not in summary:
            return f"lacks {key!r}"
        if not isinstance(summary[key], kind):
            return f"has {key!r} of another kind: {summary[key]!r}"
    predictors = summary["predictors"]
    if not all(isinstance(scores, dict) for scores in predictors.values()):
        return "has 'predictors' of another kind"
    if not summary["networks"] or not all(isinstance(network, str) for network in summary["networks"]):
        return f"names no networks: {summary['networks']!r}"
    if summary["deploy"] not in predictors:
        return f"has no predictor {summary['deploy']!r}, which it says to ship"
    return None


def _roles(summary: dict) -> dict[str, dict]:
    """What a summary says of its predictions; what it does not say, as of early versions, their names tell.

    Nothing else reads a meaning in a name.
    """
    given, predictors, networks = summary.get("roles"), summary["predictors"], summary["networks"]
    given = given.items() if isinstance(given, dict) else ()
    roles = {name: role for name, role in given if name in predictors and _is_role(role)}
    place = {str(k): k for k in range(len(networks))} | {"leader": -1}
    for name in sorted(predictors, key=lambda name: name not in _KINDS):
        if name in roles:
            continue
        kind = next((kind for kind in (TEACHER, ENSEMBLE, FUSED) if kind in name), NETWORK)
        network = networks[place.get(name.rpartition("_")[2], 0)]  # `sub_1`, `ema_1`, `leader`, `student`
        roles[name] = {"kind": kind, "network": network if kind == NETWORK else None}
    return roles


def _is_role(role) -> bool:
    if not isinstance(role, dict) or role.get("kind") not in _KINDS:
        return False
    return isinstance(role.get("network"), str if role["kind"] == NETWORK else str | None)


def _training(folder: Path, summary: dict) -> dict[str, float]:
    """{"flops", "seconds"} of a training and of its teachers'; without what one of them does not tell."""
    own = summary.get("training")
    own = own.items() if isinstance(own, dict) else ()
    total = {key: value for key, value in own if isinstance(value, int | float)}
    for path in (folder / "teachers").glob("*/summary.json"):
        spent = _training(path.parent, _tidy(read_json(path)))
        total = {key: value + spent[key] for key, value in total.items() if key in spent}
    return total


def _read_metrics(folder: Path, damaged: dict[Path, str]) -> list[dict]:
    try:
        rows, count = read_metrics(folder / "metrics.jsonl")
    except OSError:
        damaged[folder] = "no metrics.jsonl"
        return []
    if count:
        damaged[folder] = f"{count} damaged line(s)"
    return [row for row in map(_tidy, rows) if isinstance(row.get("epoch"), int | float)]


def _refuse_twins(runs: list[FinishedRun]):
    """One row shows one run of each seed: which of two, only the user knows."""
    seen: dict[tuple, FinishedRun] = {}
    for run in runs:
        identity = (run.dataset, run.method, run.networks, run.seed)
        if identity in seen:
            other = seen[identity]
            either = run.config.keys() | other.config.keys()
            keys = sorted(key for key in either if run.config.get(key) != other.config.get(key))
            differ = f"which differ in config.{', config.'.join(keys)}" if keys else "of equal configuration"
            raise ConfigError(
                f"two runs of {run.method} on {run.dataset} with {'+'.join(run.networks)} have seed "
                f"{run.seed}: {shown(other.folder)} and {shown(run.folder)}, {differ}; leave one out."
            )
        seen[identity] = run


def _number(value) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
