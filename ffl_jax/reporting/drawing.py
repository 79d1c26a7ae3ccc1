"""What the figures share: colours, panels, lines with a band, names beside lines, ticks."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ffl_jax.reporting import comparability
from ffl_jax.reporting.cells import scaled
from ffl_jax.reporting.groups import Group

WIDTH = 10.5  # inches
_DPI = 130


@dataclass(frozen=True)
class Theme:
    """Colours: of the paper, text, lines that matter little, what is shown, and what it is compared with."""

    paper: str
    text: str
    faint: str
    accent: str
    second: str
    reference: str
    lines: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1f2328", "#d5dae1", "#0b63c5", "#c2570c", "#7b8490",
    ("#0b63c5", "#c2570c", "#1a7f4b", "#8250df", "#b3261e", "#0e7c86", "#8a6d00", "#c2378d", "#4a5a00"),
)  # fmt: skip
DARK = Theme(
    "#161b22", "#e6edf3", "#363d47", "#6cb0ff", "#ffa657", "#9aa4b0",
    ("#6cb0ff", "#ffa657", "#56d394", "#c9a5ff", "#ff8a80", "#5fd4df", "#e3c341", "#ff9bd2", "#b6d057"),
)  # fmt: skip


def render(function: Callable, groups: Sequence[Group], theme: Theme) -> bytes | None:
    """The PNG of what `function(groups, theme)` draws, or None where it draws nothing."""
    settings = {"font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8, "grid.linewidth": 0.6}
    settings |= dict.fromkeys(("axes.grid", "axes.axisbelow"), True)
    settings |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
    settings |= dict.fromkeys(("grid.color", "axes.edgecolor"), theme.faint)
    settings |= dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), theme.paper)
    texts = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings |= dict.fromkeys(texts, theme.text)
    settings["text.parse_math"] = False  # a name may have a $
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name, that no font has: a box stands for it
        figure = function(groups, theme)
        if figure is None:
            return None
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=_DPI)
    return data.getvalue()


def small_multiples(groups: Sequence[Group], height: float):
    """(figure, [(group, axes)]), the best group first; places that are not used are empty."""
    ordered = sorted(groups, key=lambda group: -group.top1)
    columns = min(5 if len(ordered) > 8 else 4, len(ordered))
    rows = math.ceil(len(ordered) / columns)
    width = WIDTH if columns > 3 else 1 + 2.6 * columns
    figure = Figure(figsize=(width, height * rows + 0.5), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in places[len(ordered) :]:
        axes.set_visible(False)
    pairs = list(zip(ordered, places, strict=False))
    for group, axes in pairs:
        axes.set_title(comparability.name(group, groups), loc="left", fontweight="bold")
    for _, axes in pairs[-columns:]:  # with nothing below them
        axes.tick_params(labelbottom=True)
    return figure, pairs


def draw_line(axes, curve, color, label, style="-", band=True, **options):
    """Draws the mean over runs of a `Group.curve`, with a band of one deviation."""
    epochs, values = curve
    mean = values.mean(axis=0)
    marker = "o" if len(epochs) < 12 else None
    axes.plot(
        epochs, mean, style, color=color, label=label, marker=marker, markersize=3, linewidth=1.6, **options
    )
    if band and len(values) > 1:
        std = values.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)


def late_values(curves) -> np.ndarray | None:
    """Values of long curves after a quarter of the run, where differences are small; None for short ones."""
    curves = [curve for curve in curves if curve]
    if not curves or max(len(epochs) for epochs, _ in curves) < 20:
        return None
    begin = max(epochs[-1] for epochs, _ in curves) / 4
    return np.concatenate([values[:, epochs >= begin].ravel() for epochs, values in curves])


def labelled(figure, pairs, x, y):
    """Axes' names and one legend for all panels."""
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    entries = {}
    for _, axes in pairs:  # the first group's colours, which those of independent training are not
        entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) | entries
    legend(figure, entries, "outside upper right", len(entries))
    return figure


def legend(figure, entries: dict, place: str, columns: int):
    """A legend of {label: handle} outside the panels, in as many columns as there is room for, or fewer."""
    for ncols in range(min(columns, len(entries)), 0, -1):
        made = figure.legend(entries.values(), entries, loc=place, ncols=ncols)
        if ncols == 1 or made.get_window_extent().width < figure.bbox.width:
            return
        made.remove()


def within(axis, low: float | None = None, high: float | None = None):
    """Cuts an axis, `axes.xaxis` or `axes.yaxis`, off where nothing can be: an accuracy ends at 100 %."""
    begin, end = axis.get_view_interval()
    begin, end = begin if low is None else max(low, begin), end if high is None else min(high, end)
    if begin < end:  # else all that a damaged file holds is there
        axis.axes.set(**{f"{axis.axis_name}lim": (begin, end)})


def name_ends(axes, ends: list[tuple[float, float, str, str]]):
    """Writes each (x, y, name, color) to the right of the axes, at its height or as near as there is room."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.052
    ends = sorted(ends, key=lambda end: end[1])
    heights = spaced([end[1] for end in ends], gap)
    shift = 0.0
    if heights:  # as a whole, back into the axes
        shift = max(0.0, heights[-1] - high) or min(0.0, heights[0] - low)
    for (x, y, name, color), height in zip(ends, heights, strict=True):
        axes.annotate(
            name, (x, y), (1.03, height - shift), textcoords=("axes fraction", "data"), color=color,
            fontsize=7.5, va="center", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.5, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def spaced(values: list[float], gap: float) -> list[float]:
    """Ascending values moved apart to at least `gap`, as little as can be done in groups that touch."""
    blocks: list[tuple[float, int]] = []  # (centre, size) of neighbours that stand at equal distances
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1:
            (a, n), (b, m) = blocks[-2:]
            if b - a >= gap * (n + m) / 2:
                break
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [centre + gap * (i - (size - 1) / 2) for centre, size in blocks for i in range(size)]


def plain_ticks(axes, values):
    """A few round numbers on a logarithmic axis that may not hold a single power of ten."""
    low, high = values.min() / 1.15, values.max() * 1.15
    power = 10.0 ** np.floor(np.log10(low))
    ticks = np.unique([step * power * 10**i for i in range(8) for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)])
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    if len(ticks) > 7:
        ticks = ticks[:: math.ceil(len(ticks) / 7)]
    if len(ticks) < 3:
        ticks = MaxNLocator(4).tick_values(low, high)
        ticks = ticks[(ticks >= low) & (ticks <= high)]
    axes.set_xticks(ticks, [scaled(tick) if tick >= 1 else f"{tick:.2g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)
