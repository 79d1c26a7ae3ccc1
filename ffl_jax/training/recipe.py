"""What the training step makes of a batch before the method sees it: weighted and smoothed labels."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from ffl_jax.data import Dataset
from ffl_jax.errors import ConfigError, DatasetError
from ffl_jax.losses import SoftLabels

BALANCED = ("balanced",)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Pure, and the same on every device.

    Attributes:
      num_classes: C.
      class_weights: C numbers, or none.
      label_smoothing: e: a label becomes (1 - e) of itself and e / C of every class. Szegedy et al., 2016.
    """

    num_classes: int
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0

    def __call__(self, batch: dict[str, jax.Array], key: jax.Array) -> dict:
        """`image` as it is, and `label` as `SoftLabels`, of a batch as the training step has it.

        Args: batch: see `steps.train_step`. key: of this step.
        """
        labels = jax.nn.one_hot(batch["label"], self.num_classes)
        labels = (1 - self.label_smoothing) * labels + self.label_smoothing / self.num_classes
        return {"image": batch["image"], "label": SoftLabels(labels, self.class_weights)}


def check(config: ConfigDict):
    """Raises ConfigError for a value that no run can have."""
    weights = config.class_weights
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in weights]
    if weights != BALANCED and not all(numbers):
        raise ConfigError(
            f"config.class_weights takes one number for each class, or balanced, or nothing, got {weights}."
        )
    if weights and weights != BALANCED and not any(weights):
        raise ConfigError("config.class_weights are all 0, and nothing would be learned: set some above 0.")
    if weights == BALANCED and config.data.sampling == "balanced":
        raise ConfigError(
            "config.class_weights=balanced and config.data.sampling=balanced would even the classes out "
            "twice: choose one of them."
        )
    if config.label_smoothing >= 1:
        raise ConfigError(
            f"config.label_smoothing must be below 1, or nothing is left of the labels, got "
            f"{config.label_smoothing}."
        )


def make(config: ConfigDict, dataset: Dataset) -> Recipe | None:
    """The recipe that a configuration asks for; None if batches stay as they are.

    Raises:
      ConfigError: there is not one weight for each class, or labels are needed and not known.
      DatasetError: a class has no training image, and so no balanced weight.
    """
    if config.data.sampling == "balanced":
        _labels("config.data.sampling", dataset)
    made = Recipe(len(dataset.class_names), _class_weights(config, dataset), config.label_smoothing)
    return None if made == Recipe(made.num_classes) else made


def _labels(key, dataset):
    if dataset.train.labels is None:
        raise ConfigError(
            f"{key}=balanced needs the labels of {dataset.name} before it is read: set "
            "config.data.streaming=False."
        )
    return dataset.train.labels


def _class_weights(config, dataset) -> tuple[float, ...]:
    weights, names = config.class_weights, dataset.class_names
    if weights == BALANCED:
        labels = _labels("config.class_weights", dataset)
        counts = np.bincount(labels, minlength=len(names))
        if not counts.all():
            raise DatasetError(
                f"config.class_weights=balanced: no training image of {names[counts.argmin()]} in "
                f"{dataset.name}; add some, or give the weights as numbers."
            )
        return tuple((len(labels) / (len(names) * counts)).tolist())
    if weights and len(weights) != len(names):
        raise ConfigError(
            f"config.class_weights has {len(weights)} number(s), but {dataset.name} has {len(names)} "
            f"classes, in this order: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}."
        )
    return tuple(map(float, weights))
