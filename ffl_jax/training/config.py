"""Configurations: the domain of every value, and the way to JSON and back."""

import json
import math

from ml_collections import ConfigDict

from ffl_jax import methods
from ffl_jax.data.augment import PAD_MODES
from ffl_jax.errors import ConfigError
from ffl_jax.methods import subnetworks
from ffl_jax.registry import check_choice
from ffl_jax.training import optimizers
from ffl_jax.training.steps import PRECISIONS

# Changing these does not change what is trained, so that a run may continue with another value.
FREE_KEYS = (
    *("epochs", "log_every_steps", "log_histograms", "wandb", "evaluation", "checkpoint", "parallel"),
)
FREE_DATA_KEYS = ("data_dir", "manual_dir", "cache_dir", "workers")


def check(config: ConfigDict):
    """Raises ConfigError, naming key, value and bound, for a value that no run can have."""
    values = flatten(config.to_dict())
    for key, value in values.items():
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, int | float)]
        if not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise ConfigError(f"config.{key} must be finite and not negative, got {value}.")
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
    if config.seed + config.num_seeds > 2**32:
        raise ConfigError(f"config.seed must be below 2^32, that of the last run too, got {config.seed}.")
    if values.get("method.temperature") == 0:
        raise ConfigError(f"config.method.temperature must be > 0, got {values['method.temperature']}.")
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
    for key in ("mean", "std"):
        if len(config.data[key]) not in (0, 3):
            raise ConfigError(
                f"config.data.{key} takes three channels, or none to compute it, got {config.data[key]}."
            )
    if any(value <= 0 for value in config.data.std) or bool(config.data.mean) != bool(config.data.std):
        raise ConfigError("config.data: set mean and std together, each std > 0, or leave both empty.")
    check_choice("config.data.pad_mode", config.data.pad_mode, PAD_MODES)
    optimizers.merge_rules(config.optimizer, config.optimizer_rules)
    # With any number of classes: what does not go together is refused before the data is looked for.
    method = methods.build(config, num_classes=2)
    if method.uses_validation and not config.data.validation_examples:
        raise ConfigError(
            f"this {config.method.name} learns from a validation split of the training images: set "
            "config.data.validation_examples, now 0."
        )


def network_names(config: ConfigDict) -> list[str]:
    """The names of the K sub-networks."""
    return subnetworks.network_names(config.subnetworks.network, config.subnetworks.num)


def teacher_names(config: ConfigDict) -> list[str]:
    """The names of the teachers' networks; empty for a method without."""
    if "teachers" not in config:
        return []
    return subnetworks.network_names(config.teachers.network, config.teachers.num, "teachers")


def stretch(values: dict, epochs: int, standard: int) -> dict:
    """Settings of a run of `standard` epochs for one of `epochs`: what counts epochs follows in proportion.

    These are the keys that end in `_epochs`, at any depth, those in `optimizer_rules` included. Ramps and
    warm-ups are rounded, decays fall at the beginning of a whole epoch.
    """

    def one(key, value):
        if isinstance(value, dict):
            return stretch(value, epochs, standard)
        if key.endswith("optimizer_rules"):
            return tuple((pattern, stretch(overrides, epochs, standard)) for pattern, overrides in value)
        if not key.endswith("_epochs") or key == "every_epochs":
            return value
        if isinstance(value, tuple):
            return tuple(sorted({int(x * epochs // standard) for x in value} - {0}))
        return float(round(value * epochs / standard))

    return {key: one(key, value) for key, value in values.items()}


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_json(config: ConfigDict) -> dict:
    """The configuration as plain JSON values; tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def from_json(values: dict) -> ConfigDict:
    """The inverse of `to_json`."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(tuples(inner) for inner in value) if isinstance(value, list) else value

    return ConfigDict(tuples(values))


def fixed_part(values: dict) -> dict:
    """What of `to_json(config)` must stay the same when a run continues."""
    fixed = {key: value for key, value in values.items() if key not in FREE_KEYS}
    if "teachers" in values:
        fixed["teachers"] = {key: value for key, value in values["teachers"].items() if key != "runs"}
    free = ("execution", "remat")
    fixed["subnetworks"] = {key: value for key, value in values["subnetworks"].items() if key not in free}
    fixed["data"] = {key: value for key, value in values["data"].items() if key not in FREE_DATA_KEYS}
    if values["optimizer"]["schedule"] == "cosine":
        fixed["epochs"] = values["epochs"]  # the schedule ends there
    return fixed
