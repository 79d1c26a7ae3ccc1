"""Online knowledge distillation in JAX: several networks train together and teach one another."""

import importlib

__version__ = "0.2.0"
# What programs of users import from here lies in the rooms, and is loaded when it is asked for.
_PUBLIC = {
    "train": "training.loop",
    "evaluation": "training.scoring",
    "steps": "training.steps",
    "config": "training.config",
    "checkpoint": "workdir.checkpoint",
}


def __getattr__(name: str):
    if name in _PUBLIC:
        return importlib.import_module(f"{__name__}.{_PUBLIC[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
