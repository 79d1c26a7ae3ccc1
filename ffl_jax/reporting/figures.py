"""The figures of a report, each in a light and a dark form."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ffl_jax.reporting import comparability
from ffl_jax.reporting.drawing import (
    DARK,
    LIGHT,
    WIDTH,
    Theme,
    draw_line,
    labelled,
    late_values,
    name_ends,
    plain_ticks,
    render,
    small_multiples,
)
from ffl_jax.reporting.groups import BASELINE, Group, baseline, difference
from ffl_jax.reporting.statistics import spread

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
    marks = {"ensemble": "s", "fused": "D"}
    for y, group in enumerate(ordered):
        color = theme.reference if group.method == BASELINE else theme.accent
        for prediction, marker in marks.items():
            if prediction in group.predictions and prediction != group.shipped:
                mean = 100 * group.spread(prediction, "top1").mean
                style = {"marker": marker, "s": 26, "facecolors": "none", "edgecolors": theme.second}
                left.scatter(mean, y, **style, linewidths=1.1, zorder=2, label=prediction)
        values = 100 * np.array(group.scores(group.shipped, "top1"), float)
        left.scatter(values, [y] * len(values), s=16, color=color, alpha=0.55, linewidths=0, label="one seed")
        left.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2.4, label="mean, shipped")
    alone = [group for group in groups if group.method == BASELINE]
    if len(alone) == 1:
        left.axvline(100 * alone[0].top1, color=theme.reference, linewidth=1, linestyle="--", zorder=1)
    left.set_yticks(range(len(ordered)), [comparability.name(group, groups) for group in ordered])
    left.set(title="Test top-1 of what is shipped", xlabel="%", ylim=(-0.7, len(ordered) - 0.3))
    entries = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    entries = {label: entries[label] for label in ("mean, shipped", "one seed", *marks) if label in entries}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=4)
    if compared:
        _differences(both[1], ordered, references, theme)
    return figure


def _differences(axes, ordered, references, theme):
    axes.axvline(0, color=theme.reference, linewidth=1, linestyle="--", zorder=1)
    for y, (group, reference) in enumerate(zip(ordered, references, strict=True)):
        one = difference(group, reference) if reference else None
        if one is None:
            continue
        color = theme.accent if one.clear else theme.reference
        if one.low is not None:
            axes.plot(
                [100 * one.low, 100 * one.high], [y, y], color=color, linewidth=1.8, solid_capstyle="round"
            )
        axes.plot(100 * one.mean, y, "o", color=color, markersize=5)
    axes.tick_params(labelleft=False, left=False)
    axes.set(title="Against independent: mean, 95 % interval", xlabel="points")


def _accuracy_curves(groups: Sequence[Group], theme: Theme) -> Figure | None:
    """A panel for each group, with independent training behind it."""
    curves = {id(group): group.curve("test", f"{group.shipped}/top1") for group in groups}
    if not any(curves.values()):
        return None
    figure, pairs = small_multiples(groups, 1.75, sharex=True, sharey=True)
    for group, axes in pairs:
        reference = baseline(group, groups)
        behind = reference and reference.curve("test", "sub_0/top1")
        if behind:
            draw_line(axes, behind, theme.reference, BASELINE, 100, "--", band=False, zorder=1)
        if curves[id(group)]:
            color = theme.reference if group.method == BASELINE else theme.accent
            draw_line(axes, curves[id(group)], color, "shipped: mean ± std over seeds", 100)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    pairs[0][1].set_xlim(left=0)
    late = late_values(list(curves.values()))
    if late is not None:
        pairs[0][1].set_ylim(bottom=max(0, 100 * (late.min() - 0.1 * np.ptp(late))))
    return labelled(figure, pairs, "epoch", "test top-1, %")


def _loss_curves(groups: Sequence[Group], theme: Theme) -> Figure | None:
    splits = {"train": (theme.second, "training images, augmented"), "test": (theme.accent, "test images")}
    curves = {
        id(group): {split: group.curve(split, f"{group.shipped}/nll") for split in splits} for group in groups
    }
    if not any(curve for both in curves.values() for curve in both.values()):
        return None
    figure, pairs = small_multiples(groups, 1.75, sharex=True, sharey=True)
    for group, axes in pairs:
        for split, (color, label) in splits.items():
            if curves[id(group)][split]:
                draw_line(axes, curves[id(group)][split], color, f"{label}: mean ± std over seeds")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    pairs[0][1].set_xlim(left=0)
    late = late_values([curve for both in curves.values() for curve in both.values()])
    if late is not None:
        pairs[0][1].set_ylim(top=late.max() + 0.1 * np.ptp(late))
    return labelled(figure, pairs, "epoch", "cross-entropy, nats")


def _reliability(groups: Sequence[Group], theme: Theme) -> Figure | None:
    """How often an answer is right, against how sure it was; the bins' sizes below."""
    sums = {id(group): _bins(group) for group in groups}
    shown = [group for group in groups if sums[id(group)] is not None]
    if not shown:
        return None
    figure, pairs = small_multiples(shown, 2.3, sharex=True, sharey=True)
    for group, axes in pairs:
        count, confidence, accuracy = sums[id(group)]
        few, many = (count > 0) & (count < _FEW), count >= _FEW
        left = np.arange(len(count)) / len(count)
        axes.bar(
            left,
            count / count.sum(),
            1 / len(count),
            align="edge",
            color=theme.faint,
            label="share of images",
        )
        axes.plot([0, 1], [0, 1], "--", color=theme.reference, linewidth=1, label="as sure as right")
        axes.plot(confidence[few], accuracy[few], "o", color=theme.accent, alpha=0.3, markersize=2.5)
        axes.plot(
            confidence[many], accuracy[many], "o-", color=theme.accent, markersize=3.5, linewidth=1.4,
            label="share of right answers",
        )  # fmt: skip
        ece = group.spread(group.shipped, "ece")
        if ece:
            axes.set_title(f"ECE {ece.mean:.3f}", loc="right", fontsize=8)
        ticks = (0, 0.5, 1)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=ticks, yticks=ticks)
    return labelled(figure, pairs, "confidence of the answer", "share")


def _bins(group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Counts, mean confidences and accuracies of the bins over all seeds; None where one lacks them."""
    recorded = [run.summary.get("reliability", {}).get(group.shipped) for run in group.runs]
    try:
        bins = np.array(
            [[one[key] for key in ("count", "confidence", "accuracy")] for one in recorded], float
        )
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
    panels = {
        "disagreement": ("different answers, %", 100),
        "kl": ("KL of the probabilities, nats", 1),
        "cka": ("linear CKA of the features", 1),
    }
    curves = {
        key: [(group, curve) for group in groups if (curve := group.curve("test", f"diversity/{key}"))]
        for key in panels
    }
    if not any(curves.values()):
        return None
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    count = len(theme.lines)
    colors = {id(group): theme.lines[i % count] for i, group in enumerate(groups)}
    styles = {id(group): ("-", "-.", ":")[i // count % 3] for i, group in enumerate(groups)}
    for axes, (key, (label, factor)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        ends = []
        for group, curve in curves[key]:
            color = theme.reference if group.method == BASELINE else colors[id(group)]
            style = "--" if group.method == BASELINE else styles[id(group)]
            draw_line(axes, curve, color, None, factor, style, band=len(curves[key]) < 4)
            ends.append(
                (curve[0][-1], factor * curve[1].mean(axis=0)[-1], comparability.name(group, groups), color)
            )
        axes.set_xlim(left=0)
        name_ends(axes, ends)
        axes.set(title=label, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _cost(groups: Sequence[Group], theme: Theme) -> Figure | None:
    """Accuracy against what a prediction costs, and against what its training took."""
    running = [
        (
            group,
            prediction,
            group.runs[0].predictors[prediction].get("flops"),
            group.spread(prediction, "top1"),
        )
        for group in groups
        for prediction in group.predictions
        if not prediction.startswith("teacher")
    ]
    running = [point for point in running if point[2] and point[3]]
    training = {}
    for key in ("flops", "seconds"):
        spent = [(group, spread(group.value("training", key))) for group in groups]
        training = training or {id(group): (key, one.mean) for group, one in spent if one and one.mean > 0}
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
    flops = np.array([point[2] for point in points], float)
    top1 = np.array([100 * point[3].mean for point in points])
    ships = np.array([prediction == group.shipped for group, prediction, _, _ in points])
    axes.scatter(flops[ships], top1[ships], s=24, color=theme.accent, label="shipped", zorder=3, linewidths=0)
    axes.scatter(
        flops[~ships],
        top1[~ships],
        s=22,
        facecolors="none",
        edgecolors=theme.second,
        linewidths=1,
        label="others",
    )
    best, front = -np.inf, []
    for i in np.lexsort((-top1, flops)):
        if top1[i] > best:
            best = top1[i]
            front.append(i)
    axes.step(
        flops[front], top1[front], where="post", color=theme.reference, linewidth=1, label="best for its cost"
    )
    labelled = []
    for i in reversed(front):  # the best first; those too near to one that has its name go without
        place = np.array(
            [np.log(flops[i] / flops.min()) / np.log(flops.max() / flops.min()), top1[i] / np.ptp(top1)]
        )
        if any((np.abs(place - other) < (0.3, 0.06)).all() for other in labelled):
            continue
        labelled.append(place)
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
    axes.legend(loc="lower right")


def _training_cost(axes, training, groups, theme):
    shown = [group for group in groups if id(group) in training]
    key = training[id(shown[0])][0]
    x = np.array([training[id(group)][1] / (1 if key == "flops" else 3600) for group in shown])
    y = np.array([100 * group.top1 for group in shown])
    alone = [group.method == BASELINE for group in shown]
    axes.scatter(
        x, y, s=24, c=[theme.reference if one else theme.accent for one in alone], linewidths=0, zorder=3
    )
    axes.set(title="What its training took", ylabel="test top-1, %")
    axes.set_xlabel("FLOPs" if key == "flops" else "hours, all starts together")
    axes.set_xscale("log")
    plain_ticks(axes, x)
    axes.margins(x=0.1, y=0.08)
    ends = [
        (a, b, comparability.name(group, groups), theme.reference if one else theme.text)
        for a, b, group, one in zip(x, y, shown, alone, strict=True)
    ]
    name_ends(axes, ends)


_FIGURES = {
    "accuracy": (
        _accuracy,
        "At a glance",
        "Dots are seeds, bars their mean, open marks the means of other predictions; the dashed line is "
        "independent training. Right: intervals that leave out zero are coloured; one in twenty does so "
        "by chance.",
        "nothing to show",
    ),
    "curves": (
        _accuracy_curves,
        "Test accuracy over the epochs",
        "The shipped prediction's mean and sample standard deviation over seeds; dashed grey: independent "
        "training. Of long runs, the first quarter may lie outside.",
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
