"""What a machine has and lacks for one configuration, in words."""

import collections
import os
import platform
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ffl_jax import data, methods
from ffl_jax.data import Dataset, roles, survey
from ffl_jax.devices import parallel
from ffl_jax.errors import DatasetError, FFLError
from ffl_jax.training import config as config_lib
from ffl_jax.training import experiment, optimizers, teachers
from ffl_jax.workdir.paths import cache_directory

_NAMED = 20  # classes or images that are listed one by one


def examine(config: ConfigDict, workdir: Path) -> Iterator[tuple[str, str | FFLError]]:
    """(title, what was found, or the refusal that training would end with), one after another."""
    yield "Python", f"{platform.python_version()} in {sys.prefix}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in experiment.versions().items())
    devices = jax.local_devices()
    kind = f"{devices[0].device_kind} ({jax.default_backend()})"
    yield "devices", f"{len(devices)} x {kind}, {os.cpu_count()} CPUs"
    for title, path in (("workdir", workdir), ("data cache", cache_directory(config.data.cache_dir))):
        yield title, f"{path}: {shutil.disk_usage(_existing(path)).free / 1e9:.1f} GB free"
    try:
        for text in _configuration(config):
            yield "configuration", text
    except FFLError as error:
        yield "configuration", error
    dataset = yield from _data(config)
    if dataset is None:  # the rest would say it again
        return
    checks = {"dataset": _dataset}
    if methods.takes_teachers(config.method.name):
        checks["teachers"] = _teachers
    for title, check in checks.items():
        try:
            for text in check(config, dataset):
                yield title, text
        except FFLError as error:
            yield title, error


def _configuration(config):
    config_lib.check(config)
    devices = parallel.Parallel(**config.parallel, num_seeds=config.num_seeds)
    devices.check_batch_size(config.batch_size, config.accumulate)
    names = " + ".join(config_lib.network_names(config))
    yield f"{config.method.name} with {names}, {config.epochs} epochs of batch {config.batch_size}"
    yield f"learning rate {optimizers.course(config.optimizer, config.epochs)}"
    falls = [epoch for epoch in config.optimizer.decay_epochs if epoch < config.epochs]
    if config.optimizer.schedule == "constant" or (config.optimizer.schedule == "step" and not falls):
        yield (
            f"warning: the learning rate never falls in {config.epochs} epochs: set "
            "config.optimizer.decay_epochs, or the schedule to cosine"
        )


def _data(config) -> Generator[tuple[str, str | FFLError], None, Dataset | None]:
    """Says what is in all images, and which cannot be used; returns the dataset, where it can be loaded.

    Images are decoded once: by loading, which also keeps them for the training, or else while looking.
    """
    dataset = refusal = None
    try:
        files = survey.find(config.data)
    except FFLError as error:
        yield "images", error
        return None
    try:
        dataset = data.load(config.data)
    except FFLError as error:
        refusal = error
    if files:
        surveys = survey.of_files(files, config.data, decode=dataset is None or config.data.streaming)
    else:
        surveys = survey.of_arrays(_splits(dataset)) if dataset else {}
    bad = []
    for role, found in surveys.items():
        bad += found.bad
        yield "images", f"{role}: {found}"
        for message in found.bad[:_NAMED]:
            yield "images", message
        if len(found.bad) > _NAMED:
            yield "images", f"and {len(found.bad) - _NAMED} more of {role}"
    if bad:
        total = sum(len(found.labels) for found in surveys.values()) + len(bad)
        message = f"{len(bad)} of {total} images cannot be used, see above. The first: {bad[0]}"
        yield "images", DatasetError(message)
        return None
    for text in (*_changes(config.data, surveys), *_duplicates(surveys)):
        yield "images", text
    if refusal:
        yield "dataset", refusal
        return None
    for role, split in _splits(dataset).items():
        if split.labels is None and role in surveys:  # which only looking at all of them tells
            yield "images", f"{role}: {_counts(dataset.class_names, surveys[role].labels)}"
    return dataset


def _changes(settings, surveys) -> Iterator[str]:
    """What is done to images before they are learned from."""
    size, white = settings.image_size, max((found.white for found in surveys.values()), default=0)
    sizes = sum((found.sizes for found in surveys.values()), collections.Counter())
    kinds = {
        "smaller ones enlarged": lambda width, height: min(width, height) < size,
        "larger ones reduced": lambda width, height: min(width, height) > size,
        "cut to a square": lambda width, height: width != height,
    }
    counts = {what: sum(n for side, n in sizes.items() if holds(*side)) for what, holds in kinds.items()}
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    if size and told:
        first = "random parts of training images are cut, and all " if settings.crop == "resized" else ""
        yield f"{first}brought to {size}x{size} pixels: of {sizes.total()} images, {told}"
    if white:
        text = f"greys of more than 8 bits up to {white}; {settings.max_value} becomes white"
        if white <= settings.max_value // 4:
            proposed = 2 ** white.bit_length() - 1
            text = f"warning: {text}, so that they are dark: set config.data.max_value={proposed} perhaps"
        yield text


def _duplicates(surveys) -> Iterator[str]:
    for role, other, count, differ, told in survey.duplicates(surveys):
        within = role == other
        text = f"copies within {role}" if within else f"images of {role} that are in {other} too"
        text += f": {count}"
        text += f", {differ} of them with another class" if differ else ""
        more = f" and {count - len(told)} more" if count > len(told) else ""
        yield "warning: " * (not within or differ > 0) + f"{text}: {', '.join(told)}{more}"


def _splits(dataset: Dataset) -> dict:
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {name: split for name, split in splits.items() if split is not None}


def _dataset(config, dataset):
    made = experiment.Experiment(config, dataset)
    height, width, _ = made.image_shape
    splits = _splits(dataset)
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
    classes = f"{len(dataset.class_names)} classes, {made.steps_per_epoch} steps an epoch"
    yield f"{config_lib.dataset_title(config)}: {sizes} images of {height}x{width}, {classes}"
    for name, split in splits.items():
        if split.labels is not None:
            yield f"{name}: {_counts(dataset.class_names, split.labels)}"


def _counts(class_names, labels) -> str:
    """Images of each class; of many classes the fewest and the most, and those that have few."""
    counts = np.bincount(labels, minlength=len(class_names))
    if len(counts) <= _NAMED:
        return ", ".join(f"{name} {count}" for name, count in zip(class_names, counts, strict=True))
    order = np.argsort(counts, kind="stable")
    fewest, most = (f"{class_names[label]} {counts[label]}" for label in order[[0, -1]])
    text = f"from {fewest} to {most}"
    usual = np.median(counts)
    small = [f"{class_names[label]} {counts[label]}" for label in order if counts[label] < usual / 10]
    return f"{text}; below a tenth of the usual: {roles.some(small)}" if small else text


def _teachers(config, dataset):
    runs = teachers.named_runs(config)
    if not runs:
        yield f"{config.teachers.num} x {config.teachers.network}, to be trained before the student"
        return
    teachers.load(runs, experiment.Experiment(config, dataset))
    yield f"found in {', '.join(runs)}"


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
