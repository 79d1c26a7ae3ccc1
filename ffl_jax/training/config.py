"""Configurations: the domain of every value, and the way to JSON and back."""

import collections
import difflib
import json
import math
from collections.abc import Iterable

from ml_collections import ConfigDict

from ffl_jax import methods
from ffl_jax.data.augment import PAD_MODES, POLICIES
from ffl_jax.data.base import FILES
from ffl_jax.data.sampling import SAMPLINGS
from ffl_jax.errors import ConfigError
from ffl_jax.methods import subnetworks
from ffl_jax.registry import check_choice, import_modules
from ffl_jax.training import optimizers, recipe
from ffl_jax.training.defaults import every_key, flatten
from ffl_jax.training.steps import PRECISIONS
from ffl_jax.workdir.paths import expanded

# Changing these does not change what is trained, so that a run may continue with another value.
FREE_KEYS = (
    *(
        "modules",
        "epochs",
        "log_every_steps",
        "log_histograms",
        "wandb",
        "evaluation",
        "checkpoint",
        "parallel",
    ),
)
FREE_DATA_KEYS = (
    *("title", "data_dir", "manual_dir", "cache_dir", "cache_gigabytes", "workers", "accept_changes"),
)
# Numbers that cost time or memory before anything could be refused for its size.
AT_MOST = {
    "subnetworks.num": 128,
    "teachers.num": 128,
    "teachers.generations": 128,
    "num_seeds": 1024,
    "ema_decay": 1,
}
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}


def check_keys(config: ConfigDict):
    """Raises ConfigError unless all keys of the method are there, no others, and each value has its type."""
    values = flatten(config.to_dict())
    _import_modules(values)
    method = values.get("method.name")
    if not isinstance(method, str):
        raise ConfigError(
            f"config.method.name must name a method, got {method!r}: begin with common.get_config."
        )
    known = flatten(every_key(method).to_dict())
    for key, default in known.items():
        if key not in values:
            raise ConfigError(
                f"the configuration lacks config.{key}: begin with common.get_config, which sets every key."
            )
        fine = (int, float) if isinstance(default, float) else type(default)
        if isinstance(values[key], bool) != isinstance(default, bool) or not isinstance(values[key], fine):
            raise ConfigError(f"config.{key} must be {_KINDS[type(default)]}, got {values[key]!r}.")
    for key in values.keys() - known.keys():
        raise unknown_key(key, known)


def _import_modules(values: dict):
    modules = values.get("modules", ())
    if not isinstance(modules, tuple | list) or not all(isinstance(name, str) for name in modules):
        raise ConfigError(f"config.modules must be a tuple of names, got {modules!r}.")
    import_modules(modules)


def nearest_keys(key: str, known: Iterable[str]) -> list[str]:
    """Those that a mistyped or misplaced key may stand for.

    Only typing errors are guessed at, whatever the section: `teacher_smoothing` is not `method.smoothing`.
    """
    places = collections.defaultdict(list)
    for name in sorted(known):
        places[name.rpartition(".")[2]].append(name)
    last = key.rpartition(".")[2]
    close = [last] if last in places else difflib.get_close_matches(last, places, cutoff=0.8)
    return [name for one in close for name in places[one]]


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error of a key that is none, with those that it may stand for, or with all."""
    near = nearest_keys(key, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}."
    return ConfigError(f"unknown configuration key config.{key}: {hint}")


def check(config: ConfigDict):
    """Raises ConfigError, naming key, value and bound, for a value that no run can have."""
    check_keys(config)
    values = flatten(config.to_dict())
    for key, value in values.items():
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, int | float)]
        if not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise ConfigError(f"config.{key} must be finite and not negative, got {value}.")
        if key != "seed" and any(x >= 2**31 for x in numbers if isinstance(x, int)):
            raise ConfigError(f"config.{key} must be below 2^31, got {value}.")
    at_least = {
        "epochs": 1,
        "batch_size": 1,
        "accumulate": 1,
        "num_seeds": 1,
        "log_every_steps": 1,
        "evaluation.batch_size": 1,
        "evaluation.every_epochs": 1,
        "checkpoint.every_epochs": 1,
        "checkpoint.keep": 1,
        "teachers.num": 1,
        "teachers.generations": 1,
    }
    for key, bound in at_least.items():
        if values.get(key, bound) < bound:
            raise ConfigError(f"config.{key} must be at least {bound}, got {values[key]}.")
    for key, bound in AT_MOST.items():
        if values.get(key, bound) > bound:
            raise ConfigError(f"config.{key} must be at most {bound}, got {values[key]}.")
    if config.seed + config.num_seeds > 2**32:
        raise ConfigError(f"config.seed must be below 2^32, that of the last run too, got {config.seed}.")
    if values.get("method.temperature") == 0:
        raise ConfigError(f"config.method.temperature must be > 0, got {values['method.temperature']}.")
    if values.get("method.smoothing", 0) >= 1:
        raise ConfigError("config.method.smoothing is added to probabilities: it must be below 1.")
    _check_start(config.subnetworks, config.epochs)
    if config.num_seeds > 1 and config.checkpoint.keep < 2:
        raise ConfigError(
            "config.checkpoint.keep must be at least 2 with several seeds, got 1: a kill may come when some "
            "of them have saved a step and others have not."
        )
    if config.num_seeds > 1 and config.data.streaming:
        raise ConfigError(
            f"config.num_seeds={config.num_seeds} shares a dataset in memory, but config.data.streaming is "
            "set: train one seed at a time, each with its own --config.seed and --workdir."
        )
    check_choice("config.precision", config.precision, PRECISIONS)
    recipe.check(config)
    _check_data(config.data)
    optimizers.merge_rules(config.optimizer, config.optimizer_rules)
    # With any number of classes: what does not go together is refused before the data is looked for.
    method = methods.build(config, num_classes=2)
    if method.uses_validation and not (config.data.validation_examples or config.data.validation_fraction):
        raise ConfigError(
            f"this {config.method.name} learns from a validation split of the training images: set "
            "config.data.validation_examples or config.data.validation_fraction, both now 0."
        )


def _check_data(data: ConfigDict):
    _check_channels("mean", data.mean, 0.0)
    _check_channels("std", data.std, 1 / 255)
    if bool(data.mean) != bool(data.std):
        raise ConfigError("config.data: set mean and std together, or leave both empty.")
    check_choice("config.data.pad_mode", data.pad_mode, PAD_MODES)
    check_choice("config.data.policy", data.policy, POLICIES)
    if data.erasing > 1:
        raise ConfigError(f"config.data.erasing is a probability: it must be in 0..1, got {data.erasing}.")
    check_choice("config.data.sampling", data.sampling, SAMPLINGS)


def _check_start(section: ConfigDict, epochs: int):
    """Refuses what sub-networks cannot start from, and rates at which nothing of them is left."""
    for key in ("start", "start_digests"):
        if not all(isinstance(value, str) for value in section[key]):
            raise ConfigError(
                f"config.subnetworks.{key}={section[key]} is read as a number: write ./ before it."
            )
    if len(section.start) not in (0, 1, section.num):
        raise ConfigError(
            f"config.subnetworks.start names {len(section.start)} files or runs: give one for all "
            f"{section.num} sub-networks, or one for each."
        )
    if len(section.start_digests) not in (0, len(section.start)):
        raise ConfigError("config.subnetworks.start_digests has one for each of config.subnetworks.start.")
    for key, usual in (("freeze_epochs", 0), ("statistics", "adapted")):
        if section[key] != usual and not section.start:
            raise ConfigError(
                f"config.subnetworks.{key}={section[key]} holds what sub-networks start from: name it by "
                f"config.subnetworks.start, or set it to {usual}."
            )
    if section.freeze_epochs >= epochs:
        raise ConfigError(
            f"config.subnetworks.freeze_epochs={section.freeze_epochs:g} of {epochs} epochs would freeze the "
            "sub-networks for ever: set it to less, or train for longer."
        )
    for key in ("dropout", "drop_path"):
        if section[key] >= 1:
            raise ConfigError(f"config.subnetworks.{key} must be below 1, got {section[key]}.")


def _check_channels(key: str, values: tuple, least: float):
    """Refuses a mean or std that is not in the unit of pixels 0..1; `least` is the lowest that can be."""
    if not all(isinstance(value, int | float) for value in values) or len(values) not in (0, 3):
        raise ConfigError(f"config.data.{key} takes three numbers, or none to compute it, got {values}.")
    if not all(least <= value <= 1 for value in values):
        proposed = ",".join(f"{value / 255:.4g}" for value in values)
        advice = f" If that is of pixels from 0 to 255, set ({proposed})." if max(values) > 1 else ""
        raise ConfigError(
            f"config.data.{key}={values}: mean and std are those of pixels from 0 to 1, so that each {key} "
            f"is in {least:.2g}..1.{advice}"
        )


def network_names(config: ConfigDict) -> list[str]:
    """The names of the K sub-networks."""
    return subnetworks.network_names(config.subnetworks.network, config.subnetworks.num)


def dataset_title(config: ConfigDict) -> str:
    """What the dataset is called in tables, cards and names of runs."""
    name, place = config.data.name, expanded(config.data.data_dir).absolute()
    if config.data.title or name != "folder" or not config.data.data_dir:
        return config.data.title or name
    return place.stem if place.suffix.lower() in FILES else place.name


def teacher_names(config: ConfigDict) -> list[str]:
    """The names of the teachers' networks; empty for a method without."""
    if "teachers" not in config:
        return []
    return subnetworks.network_names(config.teachers.network, config.teachers.num, "teachers")


def to_json(config: ConfigDict) -> dict:
    """The configuration as plain JSON values; tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def from_json(values: dict) -> ConfigDict:
    """The inverse of `to_json`; what a version before did not know has its default, which is as it was."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(tuples(inner) for inner in value) if isinstance(value, list) else value

    _import_modules(values)
    config = every_key(values["method"]["name"]).unlock()
    with config.ignore_type():
        config.update(ConfigDict(tuples(values)))
    return config


def fixed_part(values: dict) -> dict:
    """What of `to_json(config)`, of this version or one before, must stay the same when a run continues."""
    values = to_json(from_json(values))
    fixed = {key: value for key, value in values.items() if key not in FREE_KEYS}
    if "teachers" in values:
        fixed["teachers"] = {key: value for key, value in values["teachers"].items() if key != "runs"}
    free = ("execution", "remat", "start")  # the start's digests are not
    fixed["subnetworks"] = {key: value for key, value in values["subnetworks"].items() if key not in free}
    fixed["data"] = {key: value for key, value in values["data"].items() if key not in FREE_DATA_KEYS}
    if values["optimizer"]["schedule"] == "cosine":
        fixed["epochs"] = values["epochs"]  # the schedule ends there
    return fixed
