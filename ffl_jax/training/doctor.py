"""What a machine has and lacks for one configuration, in words."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ffl_jax import data, methods
from ffl_jax.data import survey
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
    checks = {"configuration": _configuration, "images": _images, "dataset": _dataset}
    if methods.takes_teachers(config.method.name):
        checks["teachers"] = _teachers
    for title, check in checks.items():
        try:
            for found in check(config):
                yield title, found
        except FFLError as error:
            yield title, error
            if check is _images:
                return  # the others would say it again, or begin to decode


def _configuration(config):
    config_lib.check(config)
    devices = parallel.Parallel(**config.parallel, num_seeds=config.num_seeds)
    devices.check_batch_size(config.batch_size, config.accumulate)
    names = " + ".join(config_lib.network_names(config))
    yield f"{config.method.name} with {names}, {config.epochs} epochs of batch {config.batch_size}"
    yield f"learning rate {optimizers.course(config.optimizer, config.epochs)}"


def _images(config):
    """Says of all images what they are; of those that cannot be used, the first of each split by name."""
    surveys = survey.survey(config.data)
    for role, found in surveys.items():
        yield f"{role}: {found}"
        yield from found.bad[:_NAMED]
        if len(found.bad) > _NAMED:
            yield f"and {len(found.bad) - _NAMED} more of {role}"
    bad = [message for found in surveys.values() for message in found.bad]
    if bad:
        total = sum(len(found.labels) for found in surveys.values()) + len(bad)
        raise DatasetError(f"{len(bad)} of {total} images cannot be used, see above. The first: {bad[0]}")


def _dataset(config):
    dataset = data.load(config.data)
    made = experiment.Experiment(config, dataset)
    height, width, _ = made.image_shape
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items() if split is not None)
    yield (
        f"{dataset.name}: {sizes} images of {height}x{width}, {len(dataset.class_names)} classes, "
        f"{made.steps_per_epoch} steps an epoch"
    )
    for name, split in splits.items():
        if split is not None and split.labels is not None:
            yield f"{name}: {_counts(dataset.class_names, split.labels)}"


def _counts(class_names, labels):
    """Images of each class; of many classes the fewest and the most."""
    counts = np.bincount(labels, minlength=len(class_names))
    order = np.argsort(counts, kind="stable")[[0, -1]] if len(counts) > _NAMED else range(len(counts))
    return ", ".join(f"{class_names[label]} {counts[label]}" for label in order)


def _teachers(config):
    runs = teachers.named_runs(config)
    if not runs:
        yield f"{config.teachers.num} x {config.teachers.network}, to be trained before the student"
        return
    teachers.load(runs, experiment.Experiment(config, data.load(config.data)))
    yield f"found in {', '.join(runs)}"


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
