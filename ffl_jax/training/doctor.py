"""What a machine has and lacks for one configuration, in words."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ffl_jax import data, methods
from ffl_jax.devices import parallel
from ffl_jax.errors import FFLError
from ffl_jax.training import config as config_lib
from ffl_jax.training import experiment, teachers
from ffl_jax.workdir.paths import cache_directory


def examine(config: ConfigDict, workdir: Path) -> Iterator[tuple[str, str | FFLError]]:
    """(title, what was found, or the refusal that training would end with), one after another."""
    yield "Python", f"{platform.python_version()} in {sys.prefix}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in experiment.versions().items())
    devices = jax.local_devices()
    kind = f"{devices[0].device_kind} ({jax.default_backend()})"
    yield "devices", f"{len(devices)} x {kind}, {os.cpu_count()} CPUs"
    for title, path in (("workdir", workdir), ("data cache", cache_directory(config.data.cache_dir))):
        yield title, f"{path}: {shutil.disk_usage(_existing(path)).free / 1e9:.1f} GB free"
    checks = {"configuration": _configuration, "dataset": _dataset}
    if methods.takes_teachers(config.method.name):
        checks["teachers"] = _teachers
    for title, check in checks.items():
        try:
            found = check(config)
        except FFLError as error:
            found = error
        yield title, found


def _configuration(config):
    config_lib.check(config)
    devices = parallel.Parallel(**config.parallel, num_seeds=config.num_seeds)
    devices.check_batch_size(config.batch_size, config.accumulate)
    names = " + ".join(config_lib.network_names(config))
    return f"{config.method.name} with {names}, {config.epochs} epochs of batch {config.batch_size}"


def _dataset(config):
    dataset = data.load(config.data)
    made = experiment.Experiment(config, dataset)
    height, width, _ = made.image_shape
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items() if split is not None)
    return (
        f"{dataset.name}: {sizes} images of {height}x{width}, {len(dataset.class_names)} classes, "
        f"{made.steps_per_epoch} steps an epoch"
    )


def _teachers(config):
    runs = teachers.named_runs(config)
    if not runs:
        return f"{config.teachers.num} x {config.teachers.network}, to be trained before the student"
    teachers.load(runs, experiment.Experiment(config, data.load(config.data)))
    return f"found in {', '.join(runs)}"


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
