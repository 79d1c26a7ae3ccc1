"""The figure of what each method takes for what, in a light and a dark form."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ffl_jax.reporting import comparability
from ffl_jax.reporting.by_class import Confusion
from ffl_jax.reporting.drawing import DARK, LIGHT, WIDTH, Theme, name_ends, render
from ffl_jax.reporting.figures import Picture
from ffl_jax.reporting.groups import Group

_NUMBERED = 12  # classes whose numbers stand in the cells
_NAMED = 30  # classes whose names stand along the sides; of more, some errors have their names beside them
_ERRORS = 8  # that have names
_DRAWN = 250  # cells along a side
_LETTERS = 18  # of a name

_TITLE = "What is taken for what"
_CAPTION = (
    "Of what is shipped: the share of each class's test images (rows) that is taken for each class "
    "(columns), mean over seeds, in the order of the classes. Right answers lie on the diagonal, blue; "
    "errors are orange, by one scale for all panels on which small ones are stronger than they are. Of more "
    "than 250 classes a cell shows the largest share of several."
)


def draw(confusions: dict[Group, Confusion], prefix: str) -> tuple[list[Picture], list[str]]:
    """([the picture], []), or ([], [why there is none]), as `figures.draw`; `prefix` is of its name."""
    if not confusions:
        return [], [f"{_TITLE}: all seeds of a row need a confusion.csv, of the same classes."]
    figure = functools.partial(_panels, confusions=confusions)
    images = [render(figure, list(confusions), theme) for theme in (LIGHT, DARK)]
    return [Picture(f"{prefix}_confusion", _TITLE, _CAPTION, *images)], []


def _panels(groups: Sequence[Group], theme: Theme, confusions: dict[Group, Confusion]) -> Figure:
    """A matrix for each group, the best first."""
    ordered = sorted(groups, key=lambda group: -group.top1)
    few = all(len(one.names) <= _NAMED for one in confusions.values())
    columns = min(len(ordered), 3 if few else 2)
    rows = math.ceil(len(ordered) / columns)
    width = WIDTH if columns > 1 else 0.66 * WIDTH
    height = rows * (0.92 if few else 0.68) * width / columns
    figure = Figure(figsize=(width, height + 0.3), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[len(ordered) :]:
        axes.set_visible(False)
    shares = {group: _reduced(confusions[group].shares) for group in ordered}
    errors = [np.nanmax(_errors(one), initial=0) for one in shares.values()]
    scale = PowerNorm(0.5, 0, max(*errors, 0.01))
    for group, axes in zip(ordered, places, strict=False):
        axes.set_title(comparability.name(group, groups), loc="left", fontweight="bold")
        image = _matrix(axes, confusions[group], shares[group], scale, theme)
    percent = FuncFormatter(lambda value, _: f"{100 * value:.3g}")
    bar = figure.colorbar(image, ax=places, location="right", shrink=0.5, aspect=30, format=percent)
    bar.set_label("errors, % of the class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel("taken for", fontsize=9)
    figure.supylabel("true class", fontsize=9)
    return figure


def _matrix(axes, one: Confusion, shares: np.ndarray, scale, theme: Theme):
    """One panel; returns its errors, for the bar of colours."""
    upwards = shares[::-1]  # the first class is at the top
    diagonal = np.eye(len(shares), dtype=bool)[::-1]
    blue, orange = (
        LinearSegmentedColormap.from_list("shares", [theme.paper, color])
        for color in (theme.accent, theme.second)
    )
    look = {"origin": "lower", "interpolation": "nearest"}
    axes.imshow(np.where(diagonal, upwards, np.nan), blue, Normalize(0, 1), **look)
    image = axes.imshow(np.where(diagonal, np.nan, upwards), orange, scale, **look)
    axes.grid(False)
    axes.spines[:].set_visible(True)
    axes.tick_params(length=0)
    num = len(one.names)
    if num > _NAMED:
        axes.set(xticks=[], yticks=[])
        _name_errors(axes, one, len(shares), theme)
        return image
    names = [_short(name) for name in one.names]
    size = 7 if num <= _NUMBERED else 5
    axes.set_xticks(range(num), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
    axes.set_yticks(range(num), names[::-1], fontsize=size)
    if num <= _NUMBERED:
        _number(axes, upwards, scale, theme)
    return image


def _number(axes, upwards, scale, theme):
    """Percent in each cell where that is one or more."""
    for y, x in np.argwhere(np.rint(100 * upwards) >= 1):
        share, right = upwards[y, x], x == len(upwards) - 1 - y
        color = theme.paper if (share if right else scale(share)) > 0.6 else theme.text
        axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=color)


def _name_errors(axes, one, cells, theme):
    """The names of the most frequent errors, with a line to the cell of each."""
    place = {name: i * cells // len(one.names) for i, name in enumerate(one.names)}
    ends = [
        (
            place[pair["true"]],
            f"{_short(pair['true'])} → {_short(pair['predicted'])}: {100 * pair['share']:.0f} %",
            place[pair["predicted"]],
        )
        for pair in one.pairs(_ERRORS)
    ]
    name_ends(axes, [(x, cells - 1 - row, text, theme.text) for row, text, x in ends])


def _errors(shares):
    return np.where(np.eye(len(shares), dtype=bool), np.nan, shares)


def _reduced(shares: np.ndarray) -> np.ndarray:
    """At most `_DRAWN` cells along each side: each the largest of a block, for a mean would hide it."""
    step = math.ceil(len(shares) / _DRAWN)
    if step == 1:
        return shares
    starts = np.arange(0, len(shares), step)
    return np.fmax.reduceat(np.fmax.reduceat(shares, starts, axis=0), starts, axis=1)


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
