"""Online knowledge distillation in JAX: several networks train together and teach one another.

docs/interface.md says what programs may take from here, and what of it stays as it is.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers, which do not see __getattr__
    from ffl_jax import errors as errors
    from ffl_jax.deployment import Model as Model
    from ffl_jax.deployment import load as load
    from ffl_jax.deployment.exporting import export as export_checkpoint
    from ffl_jax.training.config_file import read as get_config
    from ffl_jax.training.loop import train as train
    from ffl_jax.training.scoring import evaluate_checkpoint as evaluate_checkpoint

__version__ = "0.2.0"
__all__ = ["Model", "errors", "evaluate_checkpoint", "export_checkpoint", "get_config", "load", "train"]
# (module, what of it, None for itself); imported when it is asked for, since JAX takes a second to start.
_NAMES = {
    "Model": ("deployment", "Model"),
    "errors": ("errors", None),
    "evaluate_checkpoint": ("training.scoring", "evaluate_checkpoint"),
    "export_checkpoint": ("deployment.exporting", "export"),
    "get_config": ("training.config_file", "read"),
    "load": ("deployment", "load"),
    "train": ("training.loop", "train"),
    # Where programs written for 0.1 look.
    "checkpoint": ("workdir.checkpoint", None),
    "config": ("training.config", None),
    "evaluation": ("training.scoring", None),
    "steps": ("training.steps", None),
}

if not TYPE_CHECKING:

    def __getattr__(name: str):
        if name not in _NAMES:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
            )
        module, attribute = _NAMES[name]
        value = importlib.import_module(f"{__name__}.{module}")
        if attribute:
            value = getattr(value, attribute)
        if name == "train":
            value.train = value  # in 0.1 a module, whose function was train.train
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
