"""What the training step makes of a batch before the method sees it: mixed images, soft labels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ffl_jax.data import Dataset
from ffl_jax.errors import ConfigError, DatasetError
from ffl_jax.losses import SoftLabels

BALANCED = ("balanced",)
_MIXING = 0x5EED0313  # away from the keys of dropout, which the same step has


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Pure. Mixes each two neighbours of a batch, so that any even part of it can be on a device of its own.

    One share, or one box, holds for a whole batch, as in the authors' code of both, and for all views of an
    image: its label is one, and what peers say of it is compared.

    Attributes:
      num_classes: C.
      class_weights: C numbers, or none.
      label_smoothing: e: a label becomes (1 - e) of itself and e / C of every class. Szegedy et al., 2016.
      mixup_alpha: a > 0: images and labels become s of their own and 1 - s of their neighbour's, with s from
        Beta(a, a). Zhang et al., 2018, arXiv 1710.09412.
      cutmix_alpha: a > 0: a box of about 1 - s of the area comes from the neighbour, and as much of its label
        as there are pixels in the box. Yun et al., 2019, arXiv 1905.04899.
      probability: that a batch is mixed.
      cutmix_share: where both are on, the probability that it is CutMix.
    """

    num_classes: int
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    cutmix_share: float = 0.5

    def __call__(self, batch: dict[str, jax.Array], key: jax.Array) -> dict:
        """`image`, mixed, and `label` as `SoftLabels`, of a batch as the training step has it.

        Args: batch: see `steps.train_step`. key: of this step.
        """
        images, labels = batch["image"], jax.nn.one_hot(batch["label"], self.num_classes)
        labels = (1 - self.label_smoothing) * labels + self.label_smoothing / self.num_classes
        if self.mixup_alpha or self.cutmix_alpha:
            own = self.draw_mask(jax.random.fold_in(key, _MIXING), images.shape[-3:-1])
            images = _with_neighbours(images, own[..., None], axis=images.ndim - 4)
            labels = _with_neighbours(labels, own.mean(), axis=0)
        return {"image": images, "label": SoftLabels(labels, self.class_weights)}

    def draw_mask(self, key: jax.Array, sides: tuple[int, int]) -> jax.Array:
        """How much of each pixel stays the image's own, 0..1: [H, W]."""
        which, whether, beta, *places = jax.random.split(key, 5)
        chance = (self.cutmix_share if self.mixup_alpha else 1.0) if self.cutmix_alpha else 0.0
        cut = jax.random.uniform(which) < chance
        alpha = jnp.where(cut, self.cutmix_alpha, self.mixup_alpha)
        share = jax.random.beta(beta, alpha, alpha)
        share = jnp.where(jax.random.uniform(whether) < self.probability, share, 1.0)

        def inside(place, side):
            half = (side * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
            centre = jax.random.randint(place, (), 0, side)
            return (jnp.arange(side) >= centre - half) & (jnp.arange(side) < centre + half)

        rows, columns = (inside(place, side) for place, side in zip(places, sides, strict=True))
        return jnp.where(cut, 1.0 - (rows[:, None] & columns), share)


def _with_neighbours(x, own, axis):
    """`own` of each example of an even number and the rest of the one it makes a pair with, along an axis."""
    if x.shape[axis] % 2:
        raise ConfigError(
            "mixup and CutMix take the examples of a batch in pairs: set config.batch_size so that each "
            f"device has an even number, not {x.shape[axis]}."
        )
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    return own * x + (1 - own) * jnp.flip(pairs, axis + 1).reshape(x.shape)


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
    for key in ("probability", "cutmix_share"):
        if config.mixing[key] > 1:
            raise ConfigError(f"config.mixing.{key} must be in 0..1, got {config.mixing[key]}.")
    if (config.mixing.mixup_alpha or config.mixing.cutmix_alpha) and config.batch_size % 2:
        raise ConfigError(
            "mixup and CutMix take the examples of a batch in pairs: set config.batch_size to an even "
            f"number, got {config.batch_size}."
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
    weights, mixing = _class_weights(config, dataset), config.mixing
    made = Recipe(len(dataset.class_names), weights, config.label_smoothing, **mixing)
    mixes = mixing.probability and (mixing.mixup_alpha or mixing.cutmix_alpha)
    return made if weights or config.label_smoothing or mixes else None


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
