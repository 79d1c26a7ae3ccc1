"""The tables of a report: cells of text with the number to sort by, and as Markdown or CSV."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ffl_jax.reporting import comparability, published
from ffl_jax.reporting.groups import Group, baseline, difference
from ffl_jax.reporting.statistics import Difference, Spread, spread

NONE = "–"


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and what the column is sorted by (the text where None)."""

    text: str
    value: float | None = None

    @property
    def empty(self) -> bool:
        return self.text == NONE


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head.

    Attributes:
      title, caption: above it, and what its columns mean.
      columns: the names; those of `numeric` stand to the right.
      left_out: columns in which no row has anything.
    """

    title: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    left_out: list[str] = field(default_factory=list)

    @property
    def numeric(self) -> list[bool]:
        return [any(row[i].value is not None for row in self.rows) for i in range(len(self.columns))]


class Sources:
    """Numbers the sources in the order in which they are quoted."""

    def __init__(self):
        self.numbers: dict[published.Source, int] = {}

    def mark(self, figure: published.Figure) -> str:
        number = self.numbers.setdefault(figure.source, len(self.numbers) + 1)
        return f"[{number}]{'†' if figure.second_hand else ''}"


def accuracy(groups: Sequence[Group], sources: Sources) -> Table:
    """A row for each group: what it ships, at both epochs, against independent training, and published."""
    rows = []
    for group in groups:
        shipped = group.spread(group.shipped, "top1")
        best = spread(group.best_scores(group.shipped))
        reference = baseline(group, groups)
        figures = [one for one in _published(group) if one.prediction != "ensemble"]
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
        "Published: with what is known of the recipe in a table below; † is second-hand."
    )
    return _without_empty("Accuracy", caption, columns, rows)


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
    return _without_empty("Every prediction", caption, columns, rows)


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
                    _plain(group.spread(group.shipped, key), digits)
                    for key, digits in (("nll", 3), ("ece", 3))
                ),
                _plain(group.spread(group.shipped, "top5"), 2, 100),
                _amount(size.get("parameters"), lambda x: f"{x:,.0f}"),
                _amount(size.get("flops"), scaled),
                _amount(flops and flops.mean, scaled),
                _amount(seconds and seconds.mean, duration),
                _plain(speed, 0),
                _plain(diversity[0], 1, 100),
                *(_plain(one, 3) for one in diversity[1:]),
            ]
        )
    columns = ["method", "networks", "NLL", "ECE", "top-5 %", "parameters", "FLOPs", "training FLOPs"]
    columns += ["training time", "images/s", "disagreement %", "KL", "CKA"]
    caption = (
        "Of the prediction to ship, after the last epoch: negative log-likelihood in nats, calibration error "
        "0..1, size, and FLOPs of one image (a multiply-add counts two). Of its training: all FLOPs, time, "
        "and images/s without evaluation and compilation. Of the sub-networks, on average over their pairs: "
        "images with different answers, KL of their probabilities in nats, linear CKA of their features."
    )
    return _without_empty("Calibration and cost", caption, columns, rows)


def beside_published(groups: Sequence[Group], sources: Sources) -> Table | None:
    """A row for each published figure that has the dataset, network and method of a group."""
    rows = []
    for group in groups:
        for figure in _published(group):
            ours = "ensemble" if figure.prediction == "ensemble" else group.shipped
            measured = group.spread(ours, "top1") if ours in group.predictions else None
            rows.append(
                [
                    Cell(group.method),
                    Cell(group.shipped_network),
                    Cell({"network": "one network"}.get(figure.prediction, figure.prediction)),
                    percent(measured),
                    _epochs(group),
                    Cell(f"{_figure(figure)} {sources.mark(figure)}", figure.top1),
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


def results(datasets: dict[str, list[Group]]) -> str:
    """CSV: a row for each prediction of each group, numbers as they are (accuracies 0..1)."""
    rows = []
    for dataset, groups in datasets.items():
        for group in groups:
            common = {
                "dataset": dataset,
                "method": group.method,
                "networks": "+".join(group.networks),
                "seeds": " ".join(map(str, group.seeds)),
                "runs": len(group.runs),
                "unfinished_runs": len(group.unusable),
                "epochs": _joined(group.value("epoch")),
            }
            common |= _spread_columns("images_per_second", group.value("images_per_second"))
            for key in ("flops", "seconds"):
                common |= _spread_columns(f"training_{key}", group.value("training", key))
            for key in ("disagreement", "kl", "cka"):
                common |= _spread_columns(f"diversity_{key}", group.value("diversity", key))
            for prediction in group.predictions:
                rows.append(common | _prediction_columns(group, groups, prediction))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _prediction_columns(group: Group, groups: Sequence[Group], prediction: str) -> dict:
    ships = prediction == group.shipped
    columns = {"prediction": prediction, "ships": "yes" if ships else "no"}
    for key in ("top1", "top5", "nll", "ece"):
        columns |= _spread_columns(key, group.scores(prediction, key))
    columns |= _spread_columns("validation_chosen_top1", group.best_scores(prediction))
    columns["validation_chosen_epochs"] = _joined(group.value("best", "epoch"))
    for key in ("parameters", "flops"):
        columns[key] = group.runs[0].predictors[prediction].get(key, "")
    reference = baseline(group, groups) if ships else None
    one = difference(group, reference) if reference else None
    columns |= {
        "difference_to": "+".join(reference.networks) if one else "",
        "difference_mean": one.mean if one else "",
        "difference_low": one.low if one and one.low is not None else "",
        "difference_high": one.high if one and one.high is not None else "",
        "difference_seeds": one.count if one else "",
    }
    kinds = {"ensemble": ("ensemble",)}.get(prediction, ("network", "unknown") if ships else ())
    figures = [one for one in _published(group) if one.prediction in kinds]
    columns["published_percent"] = "; ".join(f"{_figure(one)} ({one.source.name})" for one in figures)
    return columns


def _spread_columns(name: str, values: list[float | None]) -> dict:
    one = spread(values)
    std = one.std if one and one.std is not None else ""
    return {f"{name}_mean": one.mean if one else "", f"{name}_std": std}


def _joined(values: list) -> str:
    """Numbers with blanks between them, once if all are equal."""
    texts = [f"{value:g}" for value in values if value is not None]
    return " ".join(texts[:1] if len(set(texts)) == 1 else texts)


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown."""
    right = table.numeric
    lines = [
        _line(table.columns),
        _line(["---:" if numeric else "---" for numeric in right]),
        *(_line([escape(cell.text) for cell in row]) for row in table.rows),
    ]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text that Markdown shows as it is; underscores inside words need nothing."""
    for character in "\\|*<`":
        text = text.replace(character, f"\\{character}")
    return text


def scaled(value: float) -> str:
    """23514410 -> "23.5 M"."""
    power = min(max(int(math.log10(value)) // 3, 0), 7) if 0 < value < math.inf else 0
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}".strip()


def duration(seconds: float) -> str:
    """5025 -> "1 h 24 min"; days are hours too."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _without_empty(title, caption, columns, rows) -> Table:
    kept = [i for i in range(len(columns)) if not all(row[i].empty for row in rows)]
    left_out = [columns[i] for i in range(len(columns)) if i not in kept]
    return Table(
        title, caption, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], left_out
    )


def _published(group: Group) -> list[published.Figure]:
    return published.lookup(group.dataset, group.shipped_network, group.method)


def _figure(figure: published.Figure) -> str:
    return f"{figure.top1:.2f}" + (f" ± {figure.std:.2f}" if figure.std is not None else "")


def _epochs(group: Group) -> Cell:
    epochs = sorted({value for value in group.value("epoch") if value is not None})
    return Cell(", ".join(f"{value:g}" for value in epochs) or NONE, epochs[0] if epochs else None)


def percent(one: Spread | None) -> Cell:
    """0..1 as percent, two digits: "58.13 ± 0.95"; without a deviation for one run."""
    return _plain(one, 2, 100)


def _plain(one: Spread | None, digits: int, factor: float = 1) -> Cell:
    if one is None:
        return Cell(NONE)
    std = f" ± {factor * one.std:.{digits}f}" if one.std is not None else ""
    return Cell(f"{factor * one.mean:.{digits}f}{std}", factor * one.mean)


def _amount(value: float | None, form) -> Cell:
    return Cell(NONE) if value is None else Cell(form(value), value)


def _difference(one: Difference | None) -> Cell:
    if one is None:
        return Cell(NONE)
    text = f"{100 * one.mean:+.2f}"
    if one.low is not None:
        text += f" [{100 * one.low:+.2f}, {100 * one.high:+.2f}]"
    return Cell(f"{text}, n = {one.count}".replace("-", "−"), 100 * one.mean)


def _quoted(figures: Sequence[published.Figure], sources: Sources) -> str:
    """The first two; a table of their own has them all."""
    texts = [f"{_figure(one)} {sources.mark(one)}" for one in figures[:2]]
    return ", ".join(texts) + (f", {len(figures) - 2} more" if len(figures) > 2 else "") or NONE
