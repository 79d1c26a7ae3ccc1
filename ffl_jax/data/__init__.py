"""Datasets: `load(config.data)` gives every source's images in the same form, checked and fingerprinted."""

import logging

import numpy as np

from ffl_jax.data import base, crops, limits, roles, tfds
from ffl_jax.data import cifar as cifar
from ffl_jax.data import cinic10 as cinic10
from ffl_jax.data import digits as digits
from ffl_jax.data import fashion_mnist as fashion_mnist
from ffl_jax.data import folder as folder
from ffl_jax.data import npz as npz
from ffl_jax.data import svhn as svhn
from ffl_jax.data import table as table
from ffl_jax.data import tiny_imagenet as tiny_imagenet
from ffl_jax.data.base import Dataset, Split, StreamedSplit
from ffl_jax.errors import ConfigError, DatasetError
from ffl_jax.registry import check_choice

__all__ = ["Dataset", "Split", "StreamedSplit", "eval_input", "load", "train_input"]


def load(config) -> Dataset:
    """Loads the dataset that `config.name` says: a source of this folder, or else a TFDS dataset.

    Args:
      config: the `data` section: `name`; `data_dir`, `manual_dir` and `cache_dir` (empty: the usual places);
        `validation_examples` to set aside from the training split, or `validation_fraction`;
        `test_fraction` of it to test on, where the source has no test split; `image_size` in pixels (0: as
        stored);
        `streaming` to leave images where they are until they are needed.

    Raises:
      ConfigError: a setting is out of its domain, or there is no dataset of that name.
      DatasetError: the data is missing, damaged, or does not fit the settings.
    """
    _check_settings(config)
    source = base.SOURCES.get(config.name, tfds.load)
    train, test, class_names, *validation = source(config)
    given = {"train": train, "test": test} | dict(zip(("validation",), validation, strict=False))
    if test is not None and config.test_fraction:
        raise ConfigError(f"{config.name} has a test split: set config.data.test_fraction to 0.")
    if test is None:
        del given["test"]
    if len(class_names) < 2:
        raise DatasetError(
            f"{config.name} has {len(class_names)} class ({', '.join(class_names)}); 2 or more are needed."
        )
    if not config.streaming:
        for role, split in given.items():
            given[role] = _checked(config.name, role, split, len(class_names))
            if given[role].image_shape != given["train"].image_shape:
                raise DatasetError(
                    f"{config.name}: train images have shape {given['train'].image_shape}, {role} images "
                    f"{given[role].image_shape}; set config.data.image_size to bring all to one size."
                )
        content = [array for split in given.values() for array in (split.images, split.labels)]
    elif isinstance(train, StreamedSplit):
        content = [split.records.identity for split in given.values()]
    else:
        raise ConfigError(
            f"{config.name} is always held in memory: set config.data.streaming=False and "
            "config.data.crop=pad, or choose another dataset."
        )
    carved = [str(config.validation_examples), *([str(config.test_fraction)] if test is None else [])]
    carved += [f"of each class {config.validation_fraction}"] if config.validation_fraction else []
    fingerprint = base.digest(*content, *class_names, *carved)
    if test is None:
        given["train"], given["test"] = _take_fraction(config, "test", given["train"], class_names)
    if config.validation_fraction:
        carved = _take_fraction(config, "validation", given["train"], class_names)
        given["train"], given["validation"] = carved
    if config.validation_examples:
        given["train"], given["validation"] = _carve(config, given["train"], class_names)
    return Dataset(config.name, class_names=class_names, fingerprint=fingerprint, **given)


def train_input(split: Split | StreamedSplit, config, parallel, views: int = 0):
    """What feeds the training step with a split.

    Args:
      split: of a `Dataset`.
      config: the whole configuration, with mean and std filled in.
      parallel: a `Parallel`.
      views: augmentations of each image, one for each sub-network; 0 for one that all see.

    Returns:
      An object with `steps_per_epoch`; `batches(epoch, position)`, an iterator over the arrays of this and
      the following batches of one epoch, on the devices; `kinds`, what they are for `parallel.map`;
      `batch(arrays, step)`, to be called inside the compiled step of one run, which gives `image` and `label`
      for this device; `reusable`, whether the arrays serve all steps of the epoch that follow rather than
      one; `close()`. What it gives is a pure function of the configuration's seed, the epoch and the
      position.
    """
    return _inputs(split).TrainInput(split, config, parallel, views)


def eval_input(split: Split | StreamedSplit, config, parallel):
    """What feeds evaluation with a split: `batches()` gives every example once, `batch_size` at a time.

    `batch(arrays)`, inside the compiled program, gives `image`, `label` and `weight`, which is 0 for padding;
    `kinds` says what they are for `parallel.map`.
    """
    return _inputs(split).EvalInput(split, config, parallel)


def _inputs(split: Split | StreamedSplit):
    from ffl_jax.data import resident, streaming  # here, so that data can be looked at without JAX

    return streaming if isinstance(split, StreamedSplit) else resident


def _check_settings(config):
    for key in ("validation_examples", "image_size", "workers"):
        if config[key] < 0:
            raise ConfigError(f"config.data.{key} must be 0 or more, got {config[key]}.")
    if config.image_size**2 > limits.MAX_PIXELS:
        raise ConfigError(
            f"config.data.image_size={config.image_size} counts the pixels of one side, and at most "
            f"{limits.MAX_PIXELS / 1e6:.0f} million pixels are allowed in all: set it lower."
        )
    for key in ("test_fraction", "validation_fraction"):
        if not 0 <= config[key] < 1:
            raise ConfigError(f"config.data.{key} must be in [0, 1), got {config[key]}.")
    if config.validation_fraction and config.validation_examples:
        raise ConfigError(
            "config.data.validation_examples and config.data.validation_fraction both set images aside: set "
            "one of them to 0."
        )
    if config.max_value < 1:
        raise ConfigError(f"config.data.max_value must be at least 1, got {config.max_value}.")
    check_choice("config.data.crop", config.crop, crops.CROPS)
    if not config.streaming and config.crop != "pad":
        raise ConfigError(
            f"config.data.crop={config.crop} cuts each image at its own size, which only streaming does: set "
            "config.data.streaming=True, or config.data.crop=pad."
        )
    if config.streaming and not config.image_size:
        raise ConfigError(
            "config.data.streaming brings images to one size: set config.data.image_size, in pixels, now 0."
        )
    if config.streaming and not config.mean:
        raise ConfigError(
            "config.data.streaming does not compute the channels' mean and std: set config.data.mean and "
            "config.data.std, (0.485,0.456,0.406) and (0.229,0.224,0.225) for photographs."
        )


def _checked(name: str, role: str, split: Split, num_classes: int) -> Split:
    images, labels = np.asarray(split.images), np.asarray(split.labels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DatasetError(
            f"{name}: {role} images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}; "
            "convert them."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise DatasetError(
            f"{name}: {role} labels must be integers [{len(images)}], one an image, got {labels.dtype} "
            f"{list(labels.shape)}; convert them."
        )
    if not images.size:
        raise DatasetError(f"{name}: the {role} split is empty; it needs at least one image.")
    # A label out of range would not fail later: one_hot turns it into zeros, an index wraps around.
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DatasetError(
            f"{name}: label {labels[wrong[0]]} at index {wrong[0]} of {role} is outside 0 .. "
            f"{num_classes - 1} ({len(wrong)} such labels); correct the labels or the list of classes."
        )
    return Split(images, labels.astype(np.int32))


def _take_fraction(config, role, train, class_names):
    """Takes the same fraction of every class, at random, the same ones for every seed: (rest, what is taken).

    Args: role: test or validation.
    """
    fraction = config[f"{role}_fraction"]
    if train.labels is None:
        raise ConfigError(
            f"config.data.{role}_fraction needs the labels of {config.name} before it is read: set "
            "config.data.streaming=False."
        )
    generator = np.random.default_rng({"test": 1, "validation": 2}[role])
    chosen, small = np.zeros(len(train), bool), []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(train.labels == label)
        count = max(1, round(fraction * len(members)))
        small += [name] if len(members) and count >= len(members) else []
        chosen[generator.permutation(members)[:count]] = True
    if small:
        raise DatasetError(
            f"config.data.{role}_fraction={fraction} leaves no training image of "
            f"{roles.some(small)}: set it lower, or add images."
        )
    logging.info("The %s split is %d of the %d training images.", role, chosen.sum(), len(chosen))
    return train.take(~chosen), train.take(chosen)


def _carve(config, train, class_names):
    """Sets validation examples aside: the same ones for every seed, so that runs compare."""
    count, total = config.validation_examples, len(train)
    if count >= total:
        raise DatasetError(
            f"config.data.validation_examples={count} leaves nothing of the {total} training examples of "
            f"{config.name}: set it below {total}."
        )
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(0).permutation(total)[:count]] = True
    rest, validation = train.take(~chosen), train.take(chosen)
    if train.labels is not None:
        before, after = (np.bincount(split.labels, minlength=len(class_names)) for split in (train, rest))
        emptied = [class_names[label] for label in np.flatnonzero((before > 0) & (after == 0))]
        if emptied:
            raise DatasetError(
                f"config.data.validation_examples={count} takes all training images of {len(emptied)} of "
                f"{len(class_names)} classes ({roles.some(emptied)}): set it lower; a tenth of the "
                f"{total} training images is {max(1, total // 10)}."
            )
        halved = [class_names[label] for label in np.flatnonzero(2 * after < before)]
        if halved:
            logging.warning(
                "config.data.validation_examples=%d takes over half of the training images of: %s.",
                count,
                roles.some(halved),
            )
    return rest, validation
