"""What a configuration and a dataset determine before any number is trained."""

import copy
import functools
import logging
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ffl_jax import __version__, methods
from ffl_jax.data import Dataset, Split, resident
from ffl_jax.devices import backend
from ffl_jax.errors import CheckpointError, ConfigError, DatasetError
from ffl_jax.methods.subnetworks import vectorized
from ffl_jax.training import config as config_lib
from ffl_jax.training import optimizers, start_weights, steps
from ffl_jax.training import recipe as recipe_lib
from ffl_jax.workdir import checkpoint

RUN_FORMAT = 4


class Experiment:
    """A configuration and a dataset, and all that follows from them.

    Attributes:
      config: with the channels' mean and std filled in.
      dataset: see `data.load`.
      image_shape: (H, W, 3).
      method: a `Method`.
      steps_per_epoch: batches that cover the training split.
      freeze_steps: the first so many hold the sub-networks, but for their heads.
      optimizers: {objective: its `Optimizer`}.
      recipe: a `Recipe`, or None where a batch stays as it is.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset):
        """Raises ConfigError or DatasetError where the two do not fit."""
        if len(dataset.train) < config.batch_size:
            raise DatasetError(
                f"{dataset.name}: {len(dataset.train)} training examples are fewer than one batch: "
                f"set config.batch_size to at most that, now {config.batch_size}."
            )
        height, width, _ = dataset.train.image_shape
        if config.data.pad >= min(height, width):
            raise ConfigError(
                f"config.data.pad={config.data.pad} reflects more than there is: it must be below the "
                f"images' size, {height}x{width}."
            )
        if config.evaluation.patience and dataset.validation is None:
            raise ConfigError(
                "config.evaluation.patience waits for a better validation score: set "
                "config.data.validation_examples, now 0."
            )
        self.config = resolve(config, dataset)
        self.dataset = dataset
        self.image_shape = dataset.train.image_shape
        self.method = methods.build(config, len(dataset.class_names))
        self.steps_per_epoch = resident.steps_per_epoch(len(dataset.train), config.batch_size)
        if self.total_steps >= 2**31:
            raise ConfigError(
                f"config.epochs={config.epochs} takes {self.total_steps} steps; they must be below 2^31."
            )
        self.freeze_steps = optimizers.freeze_steps(config, self.steps_per_epoch)
        if self.freeze_steps >= self.total_steps:
            raise ConfigError(
                f"config.subnetworks.freeze_epochs={config.subnetworks.freeze_epochs:g} is all of the run's "
                f"{self.total_steps} steps: set it to less, or train for longer."
            )
        self.recipe = recipe_lib.make(config, dataset)
        params, _ = self._abstract_variables
        self.optimizers = optimizers.make_optimizers(
            self.method.trains,
            params,
            config.optimizer,
            config.optimizer_rules,
            self.steps_per_epoch,
            config.epochs,
            self.freeze_steps,
        )

    def of_seed(self, seed: int) -> "Experiment":
        """The same of one run with this seed, as its checkpoints tell it."""
        self.abstract_state()  # what is traced for it serves all runs
        alone = copy.copy(self)
        alone.config = ConfigDict(self.config.to_dict())
        alone.config.update(seed=seed, num_seeds=1)
        return alone

    def with_method(self, method: methods.Method) -> "Experiment":
        """The same, where the method runs its sub-networks in another way."""
        other = copy.copy(self)
        other.method = method
        return other

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def identity(self) -> dict:
        """What must be the same wherever this is trained; where the data lies need not be."""
        config = config_lib.to_json(self.config)
        for key in config_lib.FREE_DATA_KEYS:
            del config["data"][key]
        return {"config": config, "fingerprint": self.dataset.fingerprint}

    def initial_state(self) -> steps.TrainState:
        """The state before the first step, on one device."""
        return self._create(jax.random.key(self.config.seed))

    def abstract_state(self) -> steps.TrainState:
        """Its shapes and types."""
        return self._abstract_state

    @functools.cached_property
    def terms(self) -> dict:
        """{name: `Term` with a shape for a value} of all that a step logs."""
        return steps.terms(self._looped, *self._abstract_variables, self.image_shape)

    def train_step(self, state: steps.TrainState, batch: dict) -> steps.TrainState:
        """The state after `observed_step`, alone."""
        return self.observed_step(state, batch)[0]

    def observed_step(self, state: steps.TrainState, batch: dict) -> tuple[steps.TrainState, dict]:
        """`steps.observed_step` with all that the configuration says of it."""
        return steps.observed_step(
            state,
            batch,
            method=self.method,
            optimizers=self.optimizers,
            steps_per_epoch=self.steps_per_epoch,
            precision=self.config.precision,
            accumulate=self.config.accumulate,
            recipe=self.recipe,
            freeze_steps=self.freeze_steps,
        )

    def abstract_batch(self, shares: int = 1) -> dict:
        """Shapes of `image`, or of its views, and `label`, in one of so many parts of a batch."""
        views = (self.method.num_views,) if self.method.views else ()
        size = self.config.batch_size // shares
        return {
            "image": jax.ShapeDtypeStruct((*views, size, *self.image_shape), np.float32),
            "label": jax.ShapeDtypeStruct((size,), np.int32),
        }

    # Tracing takes seconds. How sub-networks are run, which alone changes in a method, changes no shape and
    # nothing that is drawn: so one form of it is asked, before that is settled and after.
    @functools.cached_property
    def _looped(self):
        return vectorized(self.method, False)

    @functools.cached_property
    def _abstract_variables(self):
        return steps.init_variables.eval_shape(self._looped, jax.random.key(0), self.image_shape)

    @functools.cached_property
    def _create(self):
        create = functools.partial(
            steps.create_state, self._looped, self.optimizers, image_shape=self.image_shape
        )
        return jax.jit(create, compiler_options=backend.seldom_options())

    @functools.cached_property
    def _abstract_state(self):
        return self._create.eval_shape(jax.random.key(0))


def resolve(config: ConfigDict, dataset: Dataset) -> ConfigDict:
    """The configuration with what depends on the data or the start filled in: the channels' mean and std."""
    config = ConfigDict(config.to_dict())  # a copy at every depth
    start_weights.resolve(config)
    if not config.data.mean:
        images = dataset.train.images.reshape(-1, 3)
        counts = np.stack([np.bincount(images[:, channel], minlength=256) for channel in range(3)])
        values = np.arange(256.0)
        mean = counts @ values / len(images)
        # At least one grey level, for images of one colour.
        std = np.sqrt(np.maximum(counts @ values**2 / len(images) - mean**2, 1.0))
        config.data.mean = tuple(float(x) for x in mean / 255)
        config.data.std = tuple(float(x) for x in std / 255)
    return config


def stands_still(config: ConfigDict, steps_per_epoch: int, best: dict | None, evaluated_step: int) -> bool:
    """Whether a run was not better than at its best in `config.evaluation.patience` evaluations since.

    Known from what a checkpoint tells, so that a run that continues is judged as one that never stopped.
    While sub-networks are frozen none stands still.

    Args: best, evaluated_step: see `runs.Run`.
    """
    patience = config.evaluation.patience * config.evaluation.every_epochs * steps_per_epoch
    if not patience or best is None:
        return False
    since = max(best["step"], optimizers.freeze_steps(config, steps_per_epoch))
    return evaluated_step - since >= patience


def run_record(experiment: Experiment, devices: int = 1, **about) -> dict:
    """What a checkpoint holds beside the state: JSON-able, and all that scoring or continuing it needs.

    Args:
      experiment: whose state it is, of one seed.
      devices: how many trained it.
      **about: `metrics_bytes`, the size of `metrics.jsonl` then; `best`, `evaluated_step`, `scores` and
        `seconds`, see `runs.Run`. By default those of a run that was never evaluated.
    """
    dataset = experiment.dataset
    new = {"best": None, "evaluated_step": -1, "scores": {}, "metrics_bytes": 0, "seconds": 0.0}
    assert about.keys() <= new.keys(), about.keys() - new.keys()
    return {
        "format": RUN_FORMAT,
        "config": config_lib.to_json(experiment.config),
        "dataset": {
            "fingerprint": dataset.fingerprint,
            "train_examples": len(dataset.train),
            "class_names": list(dataset.class_names),
            "image_shape": list(experiment.image_shape),
        },
        **new,
        **about,
        "versions": versions(),
        "devices": devices,
    }


def remembered_dataset(run: dict, where: Path) -> Dataset:
    """The dataset of a checkpoint as that knows it: black images that take no memory, and no test split.

    Args: run: of `run_record`. where: the checkpoint's folder, for the error.

    Raises:
      CheckpointError: an older version wrote it, without what is needed.
    """
    about, data = run["dataset"], run["config"]["data"]
    needed = {key: about.get(key) for key in ("class_names", "image_shape")} | {"mean and std": data["mean"]}
    if missing := [key for key, value in needed.items() if not value]:
        raise CheckpointError(
            f"{where} was written by an older version and lacks the {', '.join(missing)} of its dataset: "
            "restore that, or name its folder by --data_dir."
        )
    count = about["train_examples"]
    images = np.broadcast_to(np.uint8(0), (count, *about["image_shape"]))
    train = Split(images, np.broadcast_to(np.int32(0), count))
    return Dataset(data["name"], train, None, tuple(about["class_names"]), about["fingerprint"])


def check_belongs(run: dict, experiment: Experiment, where: Path):
    """Raises CheckpointError, listing the differences, unless a checkpoint belongs to this experiment.

    Args: run: of `run_record`. where: the checkpoint's folder, for the error.
    """
    if run["format"] != RUN_FORMAT:
        raise CheckpointError(
            f"{where} has format {run['format']} (written with {run['versions']}); "
            f"this version reads {RUN_FORMAT}."
        )
    stored, current = (
        config_lib.fixed_part(values) for values in (run["config"], config_lib.to_json(experiment.config))
    )
    if experiment.config.subnetworks.start and not current["subnetworks"]["start_digests"]:
        # It is not there any more, nor needed.
        current["subnetworks"]["start_digests"] = stored["subnetworks"]["start_digests"]
    change, accepted = _dataset_change(run["dataset"], experiment)
    if change and accepted:
        logging.warning("%s: %s. Going on with it as it is now.", where, change)
        if not experiment.config.data.streaming:  # these may be computed from the images
            for values in (stored, current):
                del values["data"]["mean"], values["data"]["std"]
    different = checkpoint.differences({"config": stored}, {"config": current})
    different += [change] if change and not accepted else []
    if different:
        raise CheckpointError(
            f"{where} belongs to another run: {'; '.join(different)}. "
            "Undo the change, or choose another --workdir."
        )


def _dataset_change(stored: dict, experiment: Experiment) -> tuple[str, bool]:
    """(what has changed in the dataset since a checkpoint, "" for nothing; whether a run may continue so)."""
    dataset = experiment.dataset
    if stored["fingerprint"] == dataset.fingerprint:
        return "", True
    change = (
        f"dataset: fingerprint {stored['fingerprint'][:12]} ({stored['train_examples']} training examples) "
        f"in the checkpoint, {dataset.fingerprint[:12]} ({len(dataset.train)}) now"
    )
    names = list(dataset.class_names)
    if stored.get("class_names", names) != names:
        return f"{change}, with other classes", False
    if experiment.config.data.accept_changes:
        return change, True
    return f"{change} (to go on with it, add --config.data.accept_changes=True)", False


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"ffl_jax": __version__} | {name: metadata.version(name) for name in packages}
