"""The figures of a report, each in a light and a dark form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ffl_jax.methods.base import ENSEMBLE, FUSED, TEACHER
from ffl_jax.reporting import comparability
from ffl_jax.reporting.drawing import (
    DARK,
    LIGHT,
    WIDTH,
    Theme,
    draw_line,
    labelled,
    late_values,
    legend,
    name_ends,
    plain_ticks,
    render,
    small_multiples,
    within,
)
from ffl_jax.reporting.groups import BASELINE, Group, baseline, difference
from ffl_jax.reporting.statistics import spread

_BARS = {True: "mean over seeds, shipped", False: "shipped, one seed"}  # by whether there are several
_FEW = 10  # images of a bin, whose share of right answers is chance


@dataclass(frozen=True)
class Picture:
    """One figure: PNG bytes for light and dark, what it is called, and how to read it."""

    name: str
    title: str
    caption: str
    light: bytes
    dark: bytes

    @property
    def width(self) -> int:
        """In pixels, as the head of a PNG has it."""
        return int.from_bytes(self.light[16:20], "big")


def draw(groups: Sequence[Group], prefix: str) -> tuple[list[Picture], list[str]]:
    """Draws what the runs of one dataset have recorded.

    Args:
      groups: of one dataset.
      prefix: of the names.

    Returns:
      (pictures, what could not be drawn and why).
    """
    pictures, missing = [], []
    for name, (function, title, caption, lacking) in _FIGURES.items():
        images = [render(function, groups, theme) for theme in (LIGHT, DARK)]
        if None in images:
            missing.append(f"{title}: {lacking}.")
        else:
            pictures.append(Picture(f"{prefix}_{name}", title, caption, *images))
    return pictures, missing


def _accuracy(groups: Sequence[Group], theme: Theme) -> Figure:
    """Left: every seed and the mean; right: the paired difference and its interval."""
    ordered = sorted(groups, key=lambda group: group.top1)
    references = [baseline(group, groups) for group in ordered]
    compared = any(references)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.3 * len(groups)), layout="constrained")
    both = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2)) if compared else [figure.subplots()]
    left = both[0]
    marks = {ENSEMBLE: "s", FUSED: "D"}
    for y, group in enumerate(ordered):
        color = theme.reference if group.method == BASELINE else theme.accent
        for kind, marker in marks.items():
            others = [name for name in group.of_kind(kind) if name != group.shipped]
            if top1 := others and group.spread(others[0], "top1"):
                style = {"marker": marker, "s": 26, "facecolors": "none", "edgecolors": theme.second}
                left.scatter(100 * top1.mean, y, **style, linewidths=1.1, zorder=2, label=kind)
        values = 100 * np.array(group.scores(group.shipped, "top1"), float)
        bar = _BARS[len(values) > 1]
        if bar == _BARS[True]:
            style = {"s": 16, "color": color, "alpha": 0.55, "linewidths": 0}
            left.scatter(values, [y] * len(values), **style, label="one seed")
        left.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2.4, label=bar)
    alone = [group for group in groups if group.method == BASELINE]
    if len(alone) == 1:
        left.axvline(100 * alone[0].top1, color=theme.reference, linewidth=1, linestyle="--", zorder=1)
    left.set_yticks(range(len(ordered)), [comparability.name(group, groups) for group in ordered])
    left.set(title="Test top-1 of what is shipped", xlabel="%", ylim=(-0.7, len(ordered) - 0.3))
    within(left.xaxis, 0, 100)
    entries = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    order = (_BARS[True], "one seed", _BARS[False], *marks)
    legend(figure, {label: entries[label] for label in order if label in entries}, "outside lower center", 5)
    if compared:
        _differences(both[1], ordered, references, theme)
    return figure


def _differences(axes, ordered, references, theme):
    axes.axvline(0, color=theme.reference, linewidth=1, linestyle="--", zorder=1)
    for y, (group, reference) in enumerate(zip(ordered, references, strict=True)):
        one = reference and difference(group, reference)
        if one is None:
            continue
        color = theme.accent if one.clear else theme.reference
        if one.low is not None:
            ends = [100 * one.low, 100 * one.high]
            axes.plot(ends, [y, y], color=color, linewidth=1.8, solid_capstyle="round")
        axes.plot(100 * one.mean, y, "o", color=color, markersize=5)
    axes.tick_params(labelleft=False, left=False)
    axes.set(title="Against independent: mean, 95 % interval", xlabel="points")


def _accuracy_curves(groups: Sequence[Group], theme: Theme) -> Figure | None:
    """With independent training behind each."""

    def lines(group):
        reference = baseline(group, groups)
        if reference:
            behind = {"style": "--", "band": False, "zorder": 1}
            yield reference, "test", {"color": theme.reference, "label": BASELINE} | behind
        color = theme.reference if group.method == BASELINE else theme.accent
        yield group, "test", {"color": color, "label": f"shipped{_over(group)}"}

    return _curves(groups, lines, "top1", 100, "test top-1, %", "bottom", 100)


def _over(group: Group) -> str:
    """What a line with its band is, behind its name."""
    return ": mean ± std over seeds" if len(group.runs) > 1 else ", one seed"


def _loss_curves(groups: Sequence[Group], theme: Theme) -> Figure | None:
    splits = {"train": (theme.second, "training images, augmented"), "test": (theme.accent, "test images")}

    def lines(group):
        for split, (color, label) in splits.items():
            yield group, split, {"color": color, "label": f"{label}{_over(group)}"}

    return _curves(groups, lines, "nll", 1, "cross-entropy, nats", "top", None)


def _curves(
    groups, lines: Callable, score: str, factor: float, label: str, side: str, most: float | None
) -> Figure | None:
    """A panel for each group, of what groups ship over the epochs; None where nothing is recorded.

    Args:
      lines: group -> (group, split, options of `draw_line`) of each line in its panel.
      score, factor, label: what is shown, times which factor, and how the axis calls it.
      side: "top" or "bottom", where long curves may begin outside.
      most: that it can be; the least is 0.
    """
    drawn = {}
    for group in groups:
        curves = [
            (one.curve(split, f"{one.shipped}/{score}", factor), look) for one, split, look in lines(group)
        ]
        drawn[group] = [(curve, look) for curve, look in curves if curve]
    if not any(drawn.values()):
        return None
    figure, pairs = small_multiples(groups, 1.75)
    for group, axes in pairs:
        for curve, look in drawn[group]:
            draw_line(axes, curve, **look)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    pairs[0][1].set_xlim(left=0)
    late = late_values([curve for of in drawn.values() for curve, _ in of])
    if late is not None:
        margin = 0.1 * np.ptp(late)
        limit = late.max() + margin if side == "top" else late.min() - margin
        pairs[0][1].set_ylim(**{side: limit})
    within(pairs[0][1].yaxis, 0, most)
    return labelled(figure, pairs, "epoch", label)


def _reliability(groups: Sequence[Group], theme: Theme) -> Figure | None:
    """How often an answer is right, against how sure it was; the bins' sizes below."""
    sums = {group: _bins(group) for group in groups}
    shown = [group for group in groups if sums[group] is not None]
    if not shown:
        return None
    figure, pairs = small_multiples(shown, 2.3)
    for group, axes in pairs:
        count, confidence, accuracy = sums[group]
        few, many = (count > 0) & (count < _FEW), count >= _FEW
        left = np.arange(len(count)) / len(count)
        share, width = count / count.sum(), 1 / len(count)
        axes.bar(left, share, width, align="edge", color=theme.faint, label="share of images")
        axes.plot([0, 1], [0, 1], "--", color=theme.reference, linewidth=1, label="as sure as right")
        axes.plot(confidence[few], accuracy[few], "o", color=theme.accent, alpha=0.3, markersize=2.5)
        axes.plot(
            confidence[many], accuracy[many], "o-", color=theme.accent, markersize=3.5, linewidth=1.4,
            label="share of right answers",
        )  # fmt: skip
        if ece := group.spread(group.shipped, "ece"):
            axes.set_title(f"ECE {ece.mean:.3f}", loc="right", fontsize=8)
        ticks = (0, 0.5, 1)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=ticks, yticks=ticks)
    return labelled(figure, pairs, "confidence of the answer", "share")


def _bins(group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Counts, mean confidences and accuracies of the bins over all seeds; None where one lacks them."""
    recorded = [run.summary.get("reliability", {}).get(group.shipped) for run in group.runs]
    keys = ("count", "confidence", "accuracy")
    try:
        bins = np.array([[one[key] for key in keys] for one in recorded], float)
    except (TypeError, ValueError, KeyError):  # not recorded, or damaged
        return None
    if bins.ndim != 3 or not bins[:, 0].any():
        return None
    count, confidence, accuracy = bins.transpose(1, 0, 2)
    total = count.sum(axis=0)
    some = np.maximum(total, 1e-12)
    return total, (count * confidence).sum(axis=0) / some, (count * accuracy).sum(axis=0) / some


def _diversity(groups: Sequence[Group], theme: Theme) -> Figure | None:
    """Three panels over the epochs, a line for each group with its name at the end."""
    panels = {  # key, factor, the most that it can be
        "different answers, %": ("diversity/disagreement", 100, 100),
        "KL of the probabilities, nats": ("diversity/kl", 1, None),
        "linear CKA of the features": ("diversity/cka", 1, 1),
    }
    curves = {
        label: [(group, curve) for group in groups if (curve := group.curve("test", *shown[:2]))]
        for label, shown in panels.items()
    }
    if not any(curves.values()):
        return None
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    count = len(theme.lines)
    colors = {group: theme.lines[i % count] for i, group in enumerate(groups)}
    styles = {group: ("-", "-.", ":")[i // count % 3] for i, group in enumerate(groups)}
    for axes, (label, lines) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        ends = []
        for group, curve in lines:
            color = theme.reference if group.method == BASELINE else colors[group]
            style = "--" if group.method == BASELINE else styles[group]
            draw_line(axes, curve, color, None, style, band=len(lines) < 4)
            name = comparability.name(group, groups)
            ends.append((curve[0][-1], curve[1].mean(axis=0)[-1], name, color))
        axes.set_xlim(left=0)
        within(axes.yaxis, 0, panels[label][2])
        name_ends(axes, ends)
        axes.set(title=label, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _cost(groups: Sequence[Group], theme: Theme) -> Figure | None:
    """Accuracy against what a prediction costs, and against what its training took."""
    running = []
    for group in groups:
        for name in group.predictions:
            flops, top1 = group.scores(name, "flops")[0], group.spread(name, "top1")
            if flops and flops > 0 and top1 and group.kind(name) != TEACHER:
                running.append((group, name, flops, 100 * top1.mean))
    training = {}
    for key in ("flops", "seconds"):
        spent = [(group, spread(group.value("training", key))) for group in groups]
        training = training or {group: (key, one.mean) for group, one in spent if one and one.mean > 0}
    several = len({point[2] for point in running}) > 1
    if not several and len(training) < 2:
        return None
    count = several + (len(training) > 1)
    figure = Figure(figsize=(WIDTH if count == 2 else 0.65 * WIDTH, 4.2), layout="constrained")
    places = list(figure.subplots(1, count, squeeze=False).flat)
    if several:
        _running_cost(places[0], running, groups, theme)
    if len(training) > 1:
        _training_cost(places[-1], training, groups, theme)
    return figure


def _running_cost(axes, points, groups, theme):
    flops, top1 = np.array([point[2:] for point in points], float).T
    ships = np.array([prediction == group.shipped for group, prediction, _, _ in points])
    axes.scatter(flops[ships], top1[ships], s=24, color=theme.accent, label="shipped", zorder=3, linewidths=0)
    open_marks = {"s": 22, "facecolors": "none", "edgecolors": theme.second, "linewidths": 1}
    axes.scatter(flops[~ships], top1[~ships], **open_marks, label="others")
    best, front = -np.inf, []
    for i in np.lexsort((-top1, flops)):
        if top1[i] > best:
            best = top1[i]
            front.append(i)
    look = {"color": theme.reference, "linewidth": 1, "label": "best for its cost"}
    axes.step(flops[front], top1[front], where="post", **look)
    width, height = np.log(flops.max() / flops.min()), np.ptp(top1) or 1  # where all score the same
    named = []
    for i in reversed(front):  # the best first; those too near to one that has its name go without
        place = np.array([np.log(flops[i] / flops.min()) / width, top1[i] / height])
        if any((np.abs(place - other) < (0.3, 0.06)).all() for other in named):
            continue
        named.append(place)
        group, prediction = points[i][:2]
        text = f"{comparability.name(group, groups)} {prediction}"
        right = place[0] > 0.6
        note = axes.annotate(
            text, (flops[i], top1[i]), (0 if right else -4, 7), textcoords="offset points", fontsize=7.5,
            ha="right" if right else "left",
        )  # fmt: skip
        note.set_path_effects([withStroke(linewidth=3, foreground=theme.paper)])
    axes.set(title="What a prediction costs", xlabel="FLOPs of one image", ylabel="test top-1, %")
    axes.set_xscale("log")
    plain_ticks(axes, flops)
    axes.margins(x=0.15, y=0.12)
    within(axes.yaxis, 0, 100)
    axes.legend(loc="lower right")


# The first that the longest training takes two of.
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


def _training_cost(axes, training, groups, theme):
    shown = [group for group in groups if group in training]
    key = training[shown[0]][0]
    x = np.array([training[group][1] for group in shown])
    unit = "FLOPs"
    if key != "flops":
        name, seconds = next(pair for pair in _UNITS if pair[1] <= max(x.max() / 2, 1))
        x, unit = x / seconds, f"{name}, all starts together"
    y = np.array([100 * group.top1 for group in shown])
    alone = [group.method == BASELINE for group in shown]
    colors = [theme.reference if one else theme.accent for one in alone]
    axes.scatter(x, y, s=24, c=colors, linewidths=0, zorder=3)
    axes.set(title="What its training took", ylabel="test top-1, %")
    axes.set_xlabel(unit)
    axes.set_xscale("log")
    plain_ticks(axes, x)
    axes.margins(x=0.1, y=0.08)
    within(axes.yaxis, 0, 100)
    ends = [
        (a, b, comparability.name(group, groups), theme.reference if one else theme.text)
        for a, b, group, one in zip(x, y, shown, alone, strict=True)
    ]
    name_ends(axes, ends)


_FIGURES = {
    "accuracy": (
        _accuracy,
        "At a glance",
        "Dots are seeds, bars their mean, or the one seed that there is; open marks are the same of other "
        "predictions, the dashed line of independent training. Right, where methods are compared with it: "
        "intervals that leave out zero are coloured; one in twenty does so by chance.",
        "nothing to show",
    ),
    "curves": (
        _accuracy_curves,
        "Test accuracy over the epochs",
        "The shipped prediction's mean and sample standard deviation over seeds, or the one seed that there "
        "is; dashed grey: independent training. Of long runs, the first quarter may lie outside.",
        "no epoch is in metrics.jsonl of all seeds of a row",
    ),
    "losses": (
        _loss_curves,
        "Cross-entropy over the epochs",
        "Of the shipped prediction with the labels, without any distillation term, so that methods compare. "
        "Of long runs, the first quarter may lie outside.",
        "no epoch is in metrics.jsonl of all seeds of a row",
    ),
    "cost": (
        _cost,
        "Accuracy and cost",
        "Up and to the left is better. Teachers are left out on the left side.",
        "the runs record no training cost, and all predictions cost the same",
    ),
    "reliability": (
        _reliability,
        "Reliability",
        "Test split, all seeds together, 15 bins of confidence. Below the diagonal a network is too sure, "
        "above it too modest; ECE is the mean distance from it, weighted by the bins' share of images. "
        "Bins of fewer than ten images are pale dots.",
        "the runs record no `reliability`",
    ),
    "diversity": (
        _diversity,
        "Diversity of the sub-networks",
        "On the test split, mean over pairs of sub-networks and over seeds. Falling disagreement and KL and "
        "rising CKA say that the networks become alike.",
        "the runs record no `diversity/…`, or have one sub-network",
    ),
}
