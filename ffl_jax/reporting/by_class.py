"""Which classes are right how often, and what they are taken for: of one prediction, and of groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ffl_jax.reporting import comparability
from ffl_jax.reporting.cells import NONE, Cell, Table, line, markdown, percent, without_empty
from ffl_jax.reporting.groups import Group
from ffl_jax.reporting.statistics import spread
from ffl_jax.training import confusion
from ffl_jax.workdir import files

_WORST = 10  # classes that a terminal shows
_NAMED = 5  # classes, and pairs of them, in a row of a report
_LARGEST_FILE = 1 << 25  # bytes of a matrix


@dataclass(frozen=True)
class Confusion:
    """What the prediction that a group ships takes for what, mean over its runs.

    Attributes:
      names: of the classes.
      counts: [C, C] images of each class (rows) that are taken for each (columns).
    """

    names: list[str]
    counts: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """[C, C], each row 0..1 of the images that have an answer; NaN where there are none."""
        total = self.counts.sum(axis=1, keepdims=True)
        return np.divide(self.counts, total, out=np.full_like(self.counts, np.nan), where=total > 0)

    def pairs(self, most: int = _NAMED) -> list[dict]:
        """Of `confusion.most_confused`."""
        return confusion.most_confused(self.counts, self.counts.sum(axis=1), self.names, most)


def of_one(per_class: dict, everything: bool) -> str:
    """Tables for a terminal: the classes, worst first, and the pairs that are confused most often.

    Args: per_class: of `confusion.per_class`. everything: all classes, not the worst alone.
    """
    columns = [per_class[key] for key in ("names", "accuracy", "images")]
    rows = sorted((row for row in zip(*columns, strict=True) if row[2]), key=lambda row: row[1])
    shown = rows if everything else rows[:_WORST]
    some = f" ({len(shown)} of {len(rows)} classes; all with --per_class)" if len(shown) < len(rows) else ""
    classes = [[Cell(line(name)), _share(accuracy), _count(images)] for name, accuracy, images in shown]
    pairs = [
        [Cell(line(one["true"])), Cell(line(one["predicted"])), _count(one["images"]), _share(one["share"])]
        for one in (per_class["confused"] or ())[: None if everything else _WORST]
    ]
    text = [f"\n{per_class['prediction']} by class, worst first{some}"]
    text += [markdown(Table("", "", ["class", "accuracy %", "images"], classes))]
    if unseen := [line(name) for name, _, images in zip(*columns, strict=True) if not images]:
        text += [f"without images: {', '.join(unseen)}"]
    if pairs:
        columns = ["true class", "taken for", "images", "% of the class"]
        text += ["\nconfused most often", markdown(Table("", "", columns, pairs))]
    elif per_class["confused"] is None:
        text += ["too many classes to count which is taken for which"]
    return "\n".join(text)


def table(groups: Sequence[Group], confusions: dict[Group, Confusion]) -> Table | None:
    """A row for each group: what it ships, class by class; None where no run says anything of classes."""
    rows = []
    for group in groups:
        pairs = confusions[group].pairs() if group in confusions else []
        confused = [_words(f"{one['true']} → {one['predicted']}", one["share"]) for one in pairs]
        rows.append(
            {
                "method": Cell(comparability.name(group, groups)),
                "balanced %": percent(spread(group.value("balanced_accuracy", group.shipped))),
                "worst classes, %": Cell(", ".join(_worst(group)) or NONE),
                "confused most often, % of the class": Cell(", ".join(confused) or NONE),
            }
        )
    if all(cell.text == NONE for row in rows for cell in list(row.values())[1:]):
        return None
    caption = (
        "Test split, of the prediction to ship after the last epoch, mean over seeds. Balanced: the mean of "
        "the accuracies in each class. a → b: images of class a that are taken for b; the pairs "
        "that have most images are first."
    )
    return without_empty("Class by class", caption, rows)


def confusions(groups: Sequence[Group]) -> dict[Group, Confusion]:
    """Of those groups whose runs all have a matrix, of the same classes."""
    found = {group: _confusion(group) for group in groups}
    return {group: one for group, one in found.items() if one is not None}


def _confusion(group: Group) -> Confusion | None:
    total, names = 0.0, None
    for run in group.runs:
        try:
            found, counts = confusion.parse(files.read_bytes(run.folder / "confusion.csv", _LARGEST_FILE))
        except (OSError, ValueError):  # not there, or not ours
            return None
        if found != (names or found):
            return None
        names, total = found, total + counts
    return Confusion([line(name) for name in names], total / len(group.runs))


def _worst(group: Group) -> list[str]:
    """The classes of the lowest mean accuracy, with it in percent; [] where a run does not tell."""
    told = [run.summary.get("per_class", {}) for run in group.runs]
    names = told[0].get("names")
    try:
        values = np.array([one["accuracy"] for one in told], float)
        same = all(one["names"] == names for one in told)
    except (TypeError, ValueError, KeyError):  # not recorded, or damaged
        return []
    if not same or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    if values.shape != (len(told), len(names)):
        return []
    means = values.mean(axis=0)  # NaN for a class without images
    order = [i for i in np.argsort(means, kind="stable") if np.isfinite(means[i])]
    return [_words(names[i], means[i]) for i in order[:_NAMED]]


def _words(text: str, share: float) -> str:
    """With its number in percent, kept together in one line."""
    return f"{text}: {100 * share:.1f}".replace(" ", "\N{NO-BREAK SPACE}")


def _share(value: float) -> Cell:
    return Cell(f"{100 * value:.2f}", value)


def _count(value: int) -> Cell:
    return Cell(f"{value}", value)
