"""What a reader of a table must know: runs whose rows do not compare, and what a method does its own way."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from ffl_jax.reporting.groups import BASELINE, Group, baseline
from ffl_jax.reporting.runs import FinishedRun, shown
from ffl_jax.training.config import FREE_DATA_KEYS, FREE_KEYS, flatten

# What does not change the numbers of a run, or has its own column.
_IGNORED = ("seed", "num_seeds", "subnetworks.network")
_IGNORED += ("subnetworks.execution", "subnetworks.remat", "subnetworks.start", "teachers.runs")
_IGNORED += tuple(f"data.{key}" for key in FREE_DATA_KEYS)
# What methods rightly choose for themselves; the seeds of one method must agree in it all the same.
_OWN = ("method.", "optimizer_rules", "subnetworks.", "teachers.")
_TOLD = ("subnetworks.", "teachers.")  # of these, what is worth a note
_ASKED_FOR = ("epochs", "batch_size", "optimizer.name", "optimizer.learning_rate", "optimizer.weight_decay")
_ASKED_FOR += ("optimizer.schedule", "data.validation_examples", "precision")
_VERSIONS = ("ffl_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def name(group: Group, groups: Sequence[Group]) -> str:
    """The method, with its networks where the table has it more than once."""
    alone = sum(other.method == group.method for other in groups) == 1
    return group.method if alone else f"{group.method} ({networks(group.networks)})"


def networks(names: Sequence[str]) -> str:
    """("resnet8", "resnet8") -> "resnet8 × 2"; different ones are joined by " + "."""
    if len(set(names)) > 1:
        return " + ".join(names)
    return f"{names[0]} × {len(names)}" if len(names) > 1 else names[0]


def check(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """Compares the runs of one dataset.

    Returns:
      (warnings: what makes rows or seeds unlike, and who; notes: what belongs to the methods). Keys stand
      between backticks.
    """
    settings = {run.folder: _settings(run) for group in groups for run in group.runs}
    # `epochs` and such first, then section by section.
    keys = sorted({key for values in settings.values() for key in values}, key=lambda key: ("." in key, key))

    def differing(key, groups=groups):
        return _differing(key, groups, lambda run: settings[run.folder].get(key))

    warnings = _seeds(groups)
    for key in keys:
        if key.startswith(_OWN):
            warnings += [f"{text} One row mixes them." for one in groups for text in differing(key, [one])]
        else:
            warnings += differing(key)
    warnings += _places(groups)
    for package in _VERSIONS:
        of = lambda run, package=package: run.summary.get("versions", {}).get(package)  # noqa: E731
        warnings += _differing(f"versions.{package}", groups, of)
    notes = [text for key in keys if key.startswith(_TOLD) for text in differing(key)]
    ruled = [group for group in groups if any(run.config.get("optimizer_rules") for run in group.runs)]
    if ruled and len(ruled) < len(groups):
        names = ", ".join(name(group, groups) for group in ruled)
        notes.append(f"`optimizer_rules`: {names} set some parameters' optimiser apart, the others do not.")
    device = _differing("device", groups, lambda run: run.summary.get("device"))
    notes += [f"{text} Times and images/s do not compare between devices." for text in device]
    return warnings, notes


def common(groups: Sequence[Group]) -> str:
    """The settings that a reader asks for first, where all runs share them; keys between backticks."""
    parts = []
    for key in _ASKED_FOR:
        values = {_text(flatten(run.config).get(key, "")) for group in groups for run in group.runs}
        if len(values) == 1 and (value := values.pop()):
            parts.append(f"`{key}` {_short(value)}")
    for key in ("device", "versions"):
        values = [run.summary.get(key) for group in groups for run in group.runs]
        value = values[0].get("jax") if isinstance(values[0], dict) else values[0]
        if value and all(other == values[0] for other in values):
            parts.append(f"jax {value}" if key == "versions" else value)
    return f"In common: {', '.join(parts)}." if parts else ""


def _seeds(groups: Sequence[Group]) -> list[str]:
    found = [
        f"`{shown(one.folder)}`: {one.reason}; left out of every mean."
        for group in groups
        for one in group.unusable
    ]
    single = [name(group, groups) for group in groups if len(group.runs) == 1]
    if single:
        found.append(f"One run only, which says nothing about chance: {', '.join(single)}.")
    by_seeds = defaultdict(list)
    for group in groups:
        by_seeds[tuple(group.seeds)].append(group)
    if len(by_seeds) > 1:
        parts = [
            f"{', '.join(map(str, seeds))} in {', '.join(name(group, groups) for group in members)}"
            for seeds, members in sorted(by_seeds.items(), key=lambda item: -len(item[1]))
        ]
        found.append(f"`seed`: {'; '.join(parts)}. Means are over different seeds.")
    lonely = [name(one, groups) for one in groups if one.method != BASELINE and baseline(one, groups) is None]
    if lonely:
        found.append(
            f"No {BASELINE} training with the same network beside {', '.join(lonely)}: no difference."
        )
    return found


def _settings(run: FinishedRun) -> dict:
    free = set(FREE_KEYS) - {"epochs"}
    return {
        key: value
        for key, value in flatten(run.config).items()
        if key.partition(".")[0] not in free and not key.startswith(_IGNORED)
    }


def _places(groups: Sequence[Group]) -> list[str]:
    """Whether image folders of old runs, whose fingerprints nobody knows, are one: by their place."""
    told = all("fingerprint" in run.summary for group in groups for run in group.runs)
    if groups[0].dataset != "folder" or told:
        return []
    return _differing("data.data_dir", groups, lambda run: flatten(run.config).get("data.data_dir"))


def _differing(key: str, groups: Sequence[Group], value_of: Callable[[FinishedRun], object]) -> list[str]:
    """Says who has which value of a key; nothing where all that have recorded it agree."""
    values = defaultdict(list)
    for group in groups:
        for run in group.runs:
            value = value_of(run)
            if value is not None:
                values[_text(value)].append(run)
    if len(values) < 2:
        return []
    ordered = sorted(values.items(), key=lambda item: (-len(item[1]), item[0]))
    total = sum(len(group.runs) for group in groups)
    parts = [f"{_short(text)} in {_who(runs, groups)}" for text, runs in ordered]
    everyone = sum(map(len, values.values())) == total
    if everyone and 2 * len(ordered[0][1]) > total and len(groups) > 2:
        parts = [*parts[1:], f"{_short(ordered[0][0])} in all others"]
    return [f"`{key}`: {'; '.join(parts)}."]


def _who(runs: Sequence[FinishedRun], groups: Sequence[Group]) -> str:
    parts, folders = [], {run.folder for run in runs}
    for group in groups:
        seeds = [run.seed for run in group.runs if run.folder in folders]
        some = f" seed {', '.join(map(str, seeds))}" if len(seeds) < len(group.runs) else ""
        parts += [name(group, groups) + some] if seeds else []
    return ", ".join(parts)


def _text(value) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_text, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:45]}…"
