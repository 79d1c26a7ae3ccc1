"""The tables of a report: a row for each group."""

from collections.abc import Sequence

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
        shipped = group.spread(group.shipped, "top1")
        best = spread(group.best_scores(group.shipped))
        reference = baseline(group, groups)
        figures = [one for one in published_for(group) if one.prediction != "ensemble"]
        lost = f" of {len(group.runs) + len(group.unusable)}" if group.unusable else ""
        rows.append(
            [
                Cell(group.method),
                Cell(comparability.networks(group.networks)),
                Cell(group.shipped),
                percent(shipped),
                percent(best),
                _difference(difference(group, reference) if reference else None),
                Cell(_quoted(figures, sources)),
                Cell(f"{len(group.runs)}{lost}", len(group.runs)),
                _epochs(group),
            ]
        )
    columns = ["method", "networks", "ships", "top-1 %", "chosen by validation, %"]
    columns += ["against independent, points", "published, %", "seeds", "epochs"]
    caption = (
        "Test split. Top-1 of the prediction to ship after the last epoch, and after the epoch that the "
        "validation split chose: mean ± sample standard deviation over seeds. Against independent: mean "
        "difference to `sub_0` of `independent`, seed by seed, its 95 % Student-t interval, and n seeds. "
        "Published figures compare only where the recipe is the same: see the table below; † is second-hand."
    )
    return without_empty("Accuracy", caption, columns, rows)


def predictions(groups: Sequence[Group]) -> Table:
    """A row for each group: top-1 of all that it can predict with."""
    rows = []
    for group in groups:
        kinds = {"network": [], "ensemble": [], "fused": [], "teacher": []}
        for name in group.predictions:
            kind = next((kind for kind in ("teacher", "ensemble", "fused") if kind in name), "network")
            text = f"{name} {percent(group.spread(name, 'top1')).text}"
            kinds[kind].append(text.replace(" ", "\N{NO-BREAK SPACE}"))
        rows.append([Cell(group.method), *(Cell(", ".join(texts) or NONE) for texts in kinds.values())])
    caption = (
        "Test top-1 in percent after the last epoch, mean ± sample standard deviation over seeds: of each "
        "network alone, the one to ship first; of means of several networks; of fusion modules and gates; of "
        "teachers."
    )
    columns = ["method", "one network", "ensemble", "fused", "teachers"]
    return without_empty("Every prediction", caption, columns, rows)


def cost(groups: Sequence[Group]) -> Table:
    """A row for each group: calibration and size of what it ships, and what its training took."""
    rows = []
    for group in groups:
        size = group.runs[0].predictors[group.shipped]
        flops, seconds = (spread(group.value("training", key)) for key in ("flops", "seconds"))
        speed = spread(group.value("images_per_second"))
        diversity = [spread(group.value("diversity", key)) for key in ("disagreement", "kl", "cka")]
        rows.append(
            [
                Cell(group.method),
                Cell(comparability.networks(group.networks)),
                *(
                    plain(group.spread(group.shipped, key), digits)
                    for key, digits in (("nll", 3), ("ece", 3))
                ),
                plain(group.spread(group.shipped, "top5"), 2, 100),
                amount(size.get("parameters"), lambda x: f"{x:,.0f}"),
                amount(size.get("flops"), scaled),
                amount(flops and flops.mean, scaled),
                amount(seconds and seconds.mean, duration),
                plain(speed, 0),
                plain(diversity[0], 1, 100),
                *(plain(one, 3) for one in diversity[1:]),
            ]
        )
    columns = ["method", "networks", "NLL", "ECE", "top-5 %", "parameters", "FLOPs", "training FLOPs"]
    columns += ["training time", "images/s", "disagreement %", "KL", "CKA"]
    caption = (
        "Of the prediction to ship, after the last epoch: negative log-likelihood in nats, calibration error "
        "0..1, size, and FLOPs of one image (a multiply-add counts two). Of its training: all FLOPs and "
        "time, with those of teachers that were trained for it, and images/s without evaluation and "
        "compilation. Of the sub-networks, on average over their pairs: images with different answers, KL of "
        "their probabilities in nats, linear CKA of their features."
    )
    return without_empty("Calibration and cost", caption, columns, rows)


def beside_published(groups: Sequence[Group], sources: Sources) -> Table | None:
    """A row for each published figure that has the dataset, network and method of a group."""
    rows = []
    for group in groups:
        for figure in published_for(group):
            ours = "ensemble" if figure.prediction == "ensemble" else group.shipped
            measured = group.spread(ours, "top1") if ours in group.predictions else None
            rows.append(
                [
                    Cell(group.method),
                    Cell(group.shipped_network),
                    Cell({"network": "one network"}.get(figure.prediction, figure.prediction)),
                    percent(measured),
                    _epochs(group),
                    Cell(f"{figure.text} {sources.mark(figure)}", figure.top1),
                    Cell(str(figure.runs or NONE), figure.runs),
                    Cell(str(figure.epochs or NONE), figure.epochs),
                    Cell({"unknown": NONE}.get(figure.selection, figure.selection)),
                    Cell(figure.note or NONE),
                ]
            )
    if not rows:
        return None
    columns = [
        "method",
        "network",
        "prediction",
        "ours, top-1 %",
        "our epochs",
        "published, %",
        "runs",
        "epochs",
    ]
    columns += ["which epoch", "recipe and remarks"]
    caption = (
        "A published figure and a measured one compare only where the recipe is the same: epochs, batch "
        "size, weight decay, schedule, augmentation, number and kind of networks, and which epoch was taken. "
        "†: second-hand, not read where it was first published. `–`: not said."
    )
    return Table("Beside published figures", caption, columns, rows)


def published_for(group: Group) -> list[published.Figure]:
    """The published figures of what a group ships, and of its ensemble."""
    return published.lookup(group.dataset, group.shipped_network, group.method)


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
