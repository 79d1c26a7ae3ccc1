"""`results.csv`: every number of a report, unrounded."""

import csv
import io
from collections.abc import Sequence

from ffl_jax.reporting.groups import Group, baseline, difference
from ffl_jax.reporting.statistics import spread
from ffl_jax.reporting.tables import published_for


def text(datasets: dict[str, list[Group]]) -> str:
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
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _prediction_columns(group: Group, groups: Sequence[Group], prediction: str) -> dict:
    ships = prediction == group.shipped
    columns = {"prediction": prediction, "ships": "yes" if ships else "no"}
    for key in ("top1", "top5", "nll", "ece"):
        columns |= _spread_columns(key, group.scores(prediction, key))
    columns |= _spread_columns("balanced_accuracy", group.value("balanced_accuracy", prediction))
    columns |= _spread_columns("validation_chosen_top1", group.best_scores(prediction))
    columns["validation_chosen_epochs"] = _joined(group.value("best", "epoch"))
    for key in ("parameters", "flops"):
        columns[key] = group.scores(prediction, key)[0]
    reference = baseline(group, groups) if ships else None
    one = reference and difference(group, reference)
    values = ("+".join(reference.networks), one.mean, one.low, one.high, one.count) if one else ("",) * 5
    keys = ("to", "mean", "low", "high", "seeds")
    columns |= {f"difference_{key}": value for key, value in zip(keys, values, strict=True)}
    figures = [f"{one.text} ({one.source.name})" for one, ours in published_for(group) if ours == prediction]
    columns["published_percent"] = "; ".join(figures)
    return columns


def _spread_columns(name: str, values: list[float | None]) -> dict:
    one = spread(values)
    std = one.std if one and one.std is not None else ""
    return {f"{name}_mean": one.mean if one else "", f"{name}_std": std}


def _joined(values: list) -> str:
    """Numbers with blanks between them, once if all are equal."""
    texts = [f"{value:g}" for value in values if value is not None]
    return " ".join(texts[:1] if len(set(texts)) == 1 else texts)
