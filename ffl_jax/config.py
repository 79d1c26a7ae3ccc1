"""Configurations: the domain of every value, and the way to JSON and back."""

import json
import math

from ml_collections import ConfigDict

from ffl_jax import optimizers, subnetworks
from ffl_jax.errors import ConfigError

# Changing these does not change what is trained, so that a run may continue with another value.
FREE_KEYS = ("epochs", "log_every_steps", "evaluation", "checkpoint", "parallel")
FREE_DATA_KEYS = ("data_dir", "manual_dir", "cache_dir")


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
        "log_every_steps": 1,
        "evaluation.batch_size": 1,
        "evaluation.every_epochs": 1,
        "checkpoint.every_epochs": 1,
        "checkpoint.keep": 1,
        "subnetworks.num": 2,
    }
    for key, bound in at_least.items():
        if values[key] < bound:
            raise ConfigError(f"config.{key} must be at least {bound}, got {values[key]}.")
    if values.get("method.temperature") == 0:
        raise ConfigError(f"config.method.temperature must be > 0, got {values['method.temperature']}.")
    for key in ("mean", "std"):
        if len(config.data[key]) not in (0, 3):
            raise ConfigError(
                f"config.data.{key} takes three channels, or none to compute it, got {config.data[key]}."
            )
    if any(value <= 0 for value in config.data.std) or bool(config.data.mean) != bool(config.data.std):
        raise ConfigError("config.data: set mean and std together, each std > 0, or leave both empty.")
    optimizers.merge_rules(config.optimizer, config.optimizer_rules)
    subnetworks.network_names(config.subnetworks.network, config.subnetworks.num)


def network_names(config: ConfigDict) -> list[str]:
    """The names of the K sub-networks."""
    return subnetworks.network_names(config.subnetworks.network, config.subnetworks.num)


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
    fixed["data"] = {key: value for key, value in values["data"].items() if key not in FREE_DATA_KEYS}
    if values["optimizer"]["schedule"] == "cosine":
        fixed["epochs"] = values["epochs"]  # the schedule ends there
    return fixed
