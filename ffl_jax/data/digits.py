"""The handwritten digits that come with scikit-learn: 1797 images of 8x8 pixels, no download."""

import importlib.util
from pathlib import Path

import numpy as np

from ffl_jax.data import base
from ffl_jax.errors import ConfigError


@base.SOURCES.register("digits")
def load(config) -> tuple[base.Split, base.Split, tuple[str, ...]]:
    """Grey values 0 .. 16 are scaled to 0 .. 255 and repeated over three channels.

    The test split is fixed, stratified and free of random numbers: sort the 1797 examples by class, keeping
    their order within a class, and take every fifth, the first included. That makes 360 examples, a fifth of
    every class to within one; the other 1437 are the training split. Both keep the original order.
    """
    if config.image_size not in (0, 8):
        raise ConfigError(
            f"config.data.image_size={config.image_size} does not apply to digits, which have 8x8 pixels; "
            "leave it at 0."
        )
    # Its file alone: the whole package takes two seconds to import.
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    rows = np.loadtxt(package / "datasets/data/digits.csv.gz", delimiter=",")  # 64 pixels and a class each
    labels = rows[:, 64].astype(np.int64)
    grey = np.rint(rows[:, :64].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    is_test = np.zeros(len(images), bool)
    is_test[np.argsort(labels, kind="stable")[::5]] = True
    train = base.Split(images[~is_test], labels[~is_test])
    test = base.Split(images[is_test], labels[is_test])
    return train, test, tuple("0123456789")
