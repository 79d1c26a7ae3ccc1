"""A run's curves as a picture: curves.png."""

import io
from collections.abc import Sequence
from pathlib import Path

from ffl_jax.workdir.files import write_bytes
from ffl_jax.workdir.log import over_stretches

_STYLES = {"labels": "-", "knowledge": "--"}  # of a term, by its kind


def draw_curves(
    path: Path,
    rows: Sequence[dict],
    title: str,
    headline: str,
    predictions: Sequence[str],
    terms: dict[str, tuple[str, str]],
):
    """Draws a PNG of a run until now.

    Three panels: the loss terms in training, every prediction's accuracy, and how the sub-networks differ. A
    prediction has one colour in all of them.

    Args:
      path: of the picture.
      rows: of `metrics.jsonl`.
      title: above it.
      headline: the prediction to be shipped, which is drawn thicker.
      predictions: those that have a column NAME/top1.
      terms: {name: (kind, learner)} of the training's terms. Those of the kinds "labels" and "knowledge", as
        `methods.base` calls them, are drawn, in the colour of the prediction that learns by them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    learners = {name: learner or name for name, (kind, learner) in terms.items() if kind in _STYLES}
    looks = {
        name: {"color": f"C{i % 10}", "linewidth": 2.6 if name == headline else 1.3}
        for i, name in enumerate(dict.fromkeys([*predictions, *learners.values()]))
    }
    splits = {split: [row for row in rows if row["split"] == split] for split in ("validation", "test")}
    scored = {split: of for split, of in splits.items() if of}
    different = [row for row in splits["test"] if "diversity/kl" in row]
    figure = Figure(figsize=(15 if different else 11, 4.4), layout="constrained")
    losses, accuracy, *more = figure.subplots(1, 3 if different else 2)

    train = [row for row in over_stretches(rows) if row["split"] == "train"]
    for name, learner in learners.items():
        _plot(losses, train, name, _STYLES[terms[name][0]], **looks[learner])
    losses.set(title="Training: cross-entropy (–) and distillation (- -)", ylabel="nats per example")
    losses.set_yscale("symlog", linthresh=1e-2)
    for of, style in zip(scored.values(), ("-", "--"), strict=False):
        for name in predictions:
            _plot(accuracy, of, f"{name}/top1", style, 100, **looks[name])
    shown = " (–) and ".join(scored) + (" (- -)" if len(scored) == 2 else "")
    low, high = accuracy.get_ylim()
    accuracy.set(title=f"Top-1 accuracy, {shown} split", ylabel="%", ylim=(max(0, low), min(100, high)))
    for axes in more:
        _draw_differences(axes, different)
    last = max((row["epoch"] for row in rows), default=1.0)
    for axes in (losses, accuracy, *more):
        axes.grid(alpha=0.3)
        axes.set(xlabel="epoch", xlim=(0, 1.02 * last))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [losses.plot([], [], label=name, **look)[0] for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=10, fontsize=9, frameon=False)
    figure.suptitle(title)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_bytes(path, data.getvalue())


def _draw_differences(axes, rows):
    nats = axes.twinx()
    lines = []
    for place, key, label, style, color, factor in (
        (axes, "disagreement", "disagreement, %", "-", "0.1", 100),
        (axes, "cka", "CKA of feature maps, %", "--", "0.5", 100),
        (nats, "kl", "KL, nats (right)", ":", "C3", 1),
    ):
        lines += _plot(
            place, rows, f"diversity/{key}", style, factor, color=color, linewidth=1.3, label=label
        )
    axes.set(title="Between sub-networks, test split", ylabel="%", ylim=(0, 100))
    nats.set_ylim(bottom=0)
    axes.legend(handles=lines, fontsize=8)


def _plot(axes, rows, key, style, factor=1, **look):
    """A line over the epochs of the rows that have the key; the points are marked where they are few."""
    rows = [row for row in rows if key in row]
    marker = None if len(rows) > 30 else "o"
    epochs, values = [row["epoch"] for row in rows], [factor * row[key] for row in rows]
    return axes.plot(epochs, values, style, marker=marker, markersize=3.5, **look)
