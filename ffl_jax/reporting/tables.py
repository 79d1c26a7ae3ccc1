"""The tables of a report: a row for each group."""

from collections.abc import Sequence

from ffl_jax.methods.base import ENSEMBLE, FUSED, NETWORK, TEACHER
from ffl_jax.reporting import comparability, published
from ffl_jax.reporting.cells import NONE, Cell, Table, amount, duration, percent, plain, scaled, without_empty
from ffl_jax.reporting.groups import Group, baseline, difference
from ffl_jax.reporting.statistics import Difference, spread


class Sources:
    """Numbers the sources in the order in which they are quoted."""

    def __init__(self):
        self.numbers: dict[published.Source, int] = {}

    def mark(self, figure: published.Figure) -> str:
        """ "[1]", or "[1]†" where it is second-hand."""
        number = self.numbers.setdefault(figure.source, len(self.numbers) + 1)
        return f"[{number}]{'†' if figure.second_hand else ''}"


def accuracy(groups: Sequence[Group], sources: Sources) -> Table:
    """A row for each group: what it ships, at both epochs, against independent training, and published."""
    rows = []
    for group in groups:
        reference = baseline(group, groups)
        figures = [figure for figure, ours in published_for(group) if ours == group.shipped]
        lost = f" of {len(group.runs) + len(group.unusable)}" if group.unusable else ""
        rows.append(
            {
                "method": Cell(group.method),
                "networks": Cell(comparability.networks(group.networks)),
                "ships": Cell(group.shipped),
                "top-1 %": percent(group.spread(group.shipped, "top1")),
                "chosen by validation, %": percent(spread(group.best_scores(group.shipped))),
                "against independent, points": _difference(reference and difference(group, reference)),
                "published, %": Cell(_quoted(figures, sources)),
                "seeds": Cell(f"{len(group.runs)}{lost}", len(group.runs)),
                "epochs": _epochs(group),
            }
        )
    caption = (
        "Test split. Top-1 of the prediction to ship after the last epoch, and after the epoch that the "
        "validation split chose: mean ± sample standard deviation over seeds. Against independent: mean "
        "difference to `sub_0` of `independent`, seed by seed, its 95 % Student-t interval, and n seeds. "
        "Published figures compare only where the recipe is the same: see the table below; † is second-hand."
    )
    return without_empty("Accuracy", caption, rows)


def predictions(groups: Sequence[Group]) -> Table:
    """A row for each group: top-1 of all that it can predict with."""
    columns = {NETWORK: "one network", ENSEMBLE: "ensemble", FUSED: "fused", TEACHER: "teachers"}
    rows = []
    for group in groups:
        texts = {kind: [] for kind in columns}
        for name in group.predictions:
            text = f"{name} {percent(group.spread(name, 'top1')).text}"
            texts[group.kind(name)].append(text.replace(" ", "\N{NO-BREAK SPACE}"))
        cells = {column: Cell(", ".join(texts[kind]) or NONE) for kind, column in columns.items()}
        rows.append({"method": Cell(group.method)} | cells)
    caption = (
        "Test top-1 in percent after the last epoch, mean ± sample standard deviation over seeds: of each "
        "network alone, the one to ship first; of means of several networks; of fusion modules and gates; of "
        "teachers."
    )
    return without_empty("Every prediction", caption, rows)


def cost(groups: Sequence[Group]) -> Table:
    """A row for each group: calibration and size of what it ships, and what its training took."""
    rows = []
    for group in groups:
        parameters, forward = (group.scores(group.shipped, key)[0] for key in ("parameters", "flops"))
        nll, ece, top5 = (group.spread(group.shipped, key) for key in ("nll", "ece", "top5"))
        flops, seconds = (spread(group.value("training", key)) for key in ("flops", "seconds"))
        disagreement, kl, cka = (
            spread(group.value("diversity", key)) for key in ("disagreement", "kl", "cka")
        )
        rows.append(
            {
                "method": Cell(group.method),
                "networks": Cell(comparability.networks(group.networks)),
                "NLL": plain(nll, 3),
                "ECE": plain(ece, 3),
                "top-5 %": percent(top5),
                "parameters": amount(parameters, lambda x: f"{x:,.0f}"),
                "FLOPs": amount(forward, scaled),
                "training FLOPs": amount(flops and flops.mean, scaled),
                "training time": amount(seconds and seconds.mean, duration),
                "images/s": plain(spread(group.value("images_per_second")), 0),
                "disagreement %": plain(disagreement, 1, 100),
                "KL": plain(kl, 3),
                "CKA": plain(cka, 3),
            }
        )
    caption = (
        "Of the prediction to ship, after the last epoch: negative log-likelihood in nats, calibration error "
        "0..1, size, and FLOPs of one image (a multiply-add counts two). Of its training: all FLOPs and "
        "time, with those of teachers that were trained for it, and images/s without evaluation and "
        "compilation. Of the sub-networks, on average over their pairs: images with different answers, KL of "
        "their probabilities in nats, linear CKA of their features."
    )
    return without_empty("Calibration and cost", caption, rows)


def beside_published(groups: Sequence[Group], sources: Sources) -> Table | None:
    """A row for each published figure that has the dataset, network and method of a group."""
    rows = [
        {
            "method": Cell(group.method),
            "network": Cell(group.shipped_network),
            "prediction": Cell({"network": "one network"}.get(figure.prediction, figure.prediction)),
            "ours, top-1 %": percent(ours and group.spread(ours, "top1")),
            "our epochs": _epochs(group),
            "published, %": Cell(f"{figure.text} {sources.mark(figure)}", figure.top1),
            "runs": Cell(str(figure.runs or NONE), figure.runs),
            "epochs": Cell(str(figure.epochs or NONE), figure.epochs),
            "which epoch": Cell({"unknown": NONE}.get(figure.selection, figure.selection)),
            "recipe and remarks": Cell(figure.note or NONE),
        }
        for group in groups
        for figure, ours in published_for(group)
    ]
    if not rows:
        return None
    caption = (
        "A published figure and a measured one compare only where the recipe is the same: epochs, batch "
        "size, weight decay, schedule, augmentation, number and kind of networks, and which epoch was taken. "
        "†: second-hand, not read where it was first published. `–`: not said."
    )
    return Table("Beside published figures", caption, list(rows[0]), [list(row.values()) for row in rows])


def published_for(group: Group) -> list[tuple[published.Figure, str | None]]:
    """The published figures of a group's method, each with our prediction that it stands beside, if any.

    Figures of ensembles belong to the group's first, all others to what it ships, unless that is an ensemble;
    those of a network that is not known to be the very same stand alone.
    """
    ensemble = next(iter(group.of_kind(ENSEMBLE)), None)
    network = group.shipped if group.kind(group.shipped) != ENSEMBLE else None
    figures = published.lookup(group.dataset, group.shipped_network, group.method)
    beside = [ensemble if figure.prediction == "ensemble" else network for figure in figures]
    return [
        (figure, ours if figure.same_network else None) for figure, ours in zip(figures, beside, strict=True)
    ]


def _epochs(group: Group) -> Cell:
    epochs = sorted({value for value in group.value("epoch") if value is not None})
    return Cell(", ".join(f"{value:g}" for value in epochs) or NONE, epochs[0] if epochs else None)


def _difference(one: Difference | None) -> Cell:
    if one is None:
        return Cell(NONE)
    text = f"{100 * one.mean:+.2f}"
    if one.low is not None:
        text += f" [{100 * one.low:+.2f}, {100 * one.high:+.2f}]"
    return Cell(f"{text}, n = {one.count}".replace("-", "−"), 100 * one.mean)


def _quoted(figures: Sequence[published.Figure], sources: Sources) -> str:
    """The first two; a table of their own has them all."""
    texts = [f"{one.text} {sources.mark(one)}" for one in figures[:2]]
    return ", ".join(texts) + (f", {len(figures) - 2} more" if len(figures) > 2 else "") or NONE
