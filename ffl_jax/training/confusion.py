"""Which classes a prediction takes for which, by name: for a summary, for people, and as a file."""

import csv
import io
from collections.abc import Sequence

import numpy as np

from ffl_jax.errors import ConfigError
from ffl_jax.training import metrics

MOST = 20  # pairs that a summary names
_LARGEST_COUNT = 1e15


def per_class(classes: dict, names: Sequence[str], prediction: str) -> dict:
    """What a summary says of the classes.

    Args:
      classes: of `metrics.class_scores`.
      names: of the classes.
      prediction: whose errors were counted.

    Returns:
      `prediction`; `names`, `images` and `accuracy`, 0..1, of the classes in their order, None where there
      are no images; `confused`, of `most_confused`, None where there are too many classes to count them.
    """
    pairs = zip(classes["right"], classes["images"], strict=True)
    confusion = matrix(classes)
    return {
        "prediction": prediction,
        "names": list(names),
        "images": classes["images"],
        "accuracy": [right / images if images else None for right, images in pairs],
        "confused": None if confusion is None else most_confused(confusion, classes["images"], names),
    }


def matrix(classes: dict) -> np.ndarray | None:
    """[C, C] images of each class (rows) that are taken for each (columns); None where nobody counted."""
    entries = classes["confusion"]
    if entries is None:
        return None
    counts = np.zeros((len(classes["images"]),) * 2, np.int64)
    counts[entries["true"], entries["predicted"]] = entries["images"]
    return counts


def most_confused(counts: np.ndarray, images: Sequence[float], names: Sequence[str], most=MOST) -> list[dict]:
    """The errors that are made most often, `true` taken for `predicted`, both by name.

    Args:
      counts: [C, C], integers or means of such.
      images: [C] of each class.
      names: of the classes.
      most: how many, at most.

    Returns:
      Each with its `images` and their `share`, 0..1, of the class. Of equal ones the larger share is first.
    """
    errors = counts - np.diag(np.diag(counts))
    true, predicted = np.nonzero(errors)
    number = errors[true, predicted]
    share = number / np.maximum(np.asarray(images, float)[true], 1)
    first = np.lexsort((predicted, true, -share, -number))[:most]
    return [
        {
            "true": names[true[i]],
            "predicted": names[predicted[i]],
            "images": number[i].item(),
            "share": share[i].item(),
        }
        for i in first
    ]


def csv_of(classes: dict, names: Sequence[str]) -> str:
    """CSV of the whole matrix: a row for each true class, a column for each that it was taken for.

    Args: classes: of `metrics.class_scores`. names: of the classes.

    Raises:
      ConfigError: there are too many classes to count it.
    """
    counts = matrix(classes)
    if counts is None:
        raise ConfigError(
            f"{len(names)} classes have too large a confusion matrix (at most {metrics.LARGEST_CONFUSION}): "
            "--per_class tells their accuracies."
        )
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # a name may have any letter
    writer.writerow(["true \\ predicted", *names])
    writer.writerows([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
    return file.getvalue()


def parse(data: bytes) -> tuple[list[str], np.ndarray]:
    """(names, matrix) of what `csv_of` gives; ValueError for anything else."""
    reader = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
    try:
        (_, *names), rows = next(reader, [None]), []
        if not 0 < len(names) <= metrics.LARGEST_CONFUSION:
            raise ValueError("no classes, or too many")
        for (name, *numbers), expected in zip(reader, names, strict=True):
            if name != expected or len(numbers) != len(names):
                raise ValueError(f"the row of {expected!r} is another one")
            rows.append([float(number) for number in numbers])
    except csv.Error as error:
        raise ValueError(str(error)) from error
    counts = np.array(rows)
    if not ((counts >= 0) & (counts < _LARGEST_COUNT)).all():
        raise ValueError("a count that no class has")
    return names, counts
