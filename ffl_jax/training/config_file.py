"""A configuration file: Python with a `get_config`, run as it is, and whatever it does told in one line."""

import importlib
import json
import sys
import traceback
import types
from pathlib import Path

from ml_collections import ConfigDict

from ffl_jax.errors import ConfigError, FFLError
from ffl_jax.registry import nearest
from ffl_jax.training.config import from_json
from ffl_jax.workdir.paths import CONFIGS

MAX_BYTES = 1_000_000


def names(suffix: str = "") -> list[str]:
    """Those of this project's configurations, "cifar10" and so on."""
    return sorted(path.stem + suffix for path in CONFIGS.glob("*.py") if path.stem != "common")


def _find_configs(folder: Path) -> None:
    """Makes `from configs import common` work in a file in `folder`, wherever it, and the project, lies.

    A folder `configs` of one's own has this project's configurations behind its own files.
    """
    if folder != CONFIGS and str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    try:
        configs = importlib.import_module("configs")
    except ModuleNotFoundError:
        configs = sys.modules["configs"] = types.ModuleType("configs")
        configs.__path__ = []
    if str(CONFIGS) not in getattr(configs, "__path__", [str(CONFIGS)]):
        configs.__path__.append(str(CONFIGS))


def _json(path: Path, presets: str) -> ConfigDict:
    values = json.loads(path.read_bytes())
    if presets or not isinstance(values, dict) or not isinstance(values.get("method"), dict):
        raise ConfigError(f"{path} is not the config.json of a run, or presets stand behind it, {presets!r}.")
    return from_json(values)


def read(chosen: str) -> ConfigDict:
    """What `get_config` of a file returns.

    Args:
      chosen: "FILE", or "FILE:PRESETS" for `get_config("PRESETS")`. What is not there is looked for beside
        the package, so that `configs/x.py` works from any folder.

    Raises:
      ConfigError: there is no such file, it cannot be run, or gives no configuration.
    """
    name, colon, presets = chosen.partition(":")
    path = Path(name) if Path(name).exists() else CONFIGS.parent / name
    if not path.is_file():
        # By their names: where this project lies must not decide what is near.
        there = [f"configs/{stem}" for stem in names(suffix=".py")]
        raise ConfigError(f"no configuration file {name}: {nearest(f'configs/{path.name}', there)}")
    module = types.ModuleType("config_file")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is no configuration file: it has more than {MAX_BYTES} bytes.")
        if path.suffix == ".json":
            return _json(path, presets)
        _find_configs(path.resolve().parent)
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"{path} has no function get_config(arg=None): see configs/digits.py.")
        config = module.get_config(presets) if colon else module.get_config()
    except FFLError:
        raise
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        where = f" ({path.name}:{lines[-1]})" if lines else ""
        raise ConfigError(f"{path}: {type(error).__name__}: {error}{where}") from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ConfigError(f"{path}: get_config returned {kind}: let it return what common.get_config gives.")
    return config
