"""Methods of online distillation, one file each. Importing a file registers its method's name."""

import dataclasses

from ffl_jax import subnetworks
from ffl_jax.errors import ConfigError
from ffl_jax.methods import ffl  # noqa: F401
from ffl_jax.methods.base import METHODS, Method
from ffl_jax.registry import nearest

__all__ = ["METHODS", "Method", "build", "hyper_parameters"]

_SET_BY_BUILD = ("subnetworks", "num_classes", "parent", "name")


def hyper_parameters(name: str) -> dict:
    """{field: default} of the method called `name`, which a configuration may set."""
    fields = dataclasses.fields(METHODS.lookup(name))
    return {field.name: field.default for field in fields if field.name not in _SET_BY_BUILD}


def build(config, num_classes: int) -> Method:
    """The method that the sections `method` and `subnetworks` of a configuration describe.

    Raises:
      ConfigError: a name or a hyper-parameter is unknown, or parts do not go together.
    """
    settings = dict(config.method)
    name = settings.pop("name")
    known = hyper_parameters(name)
    for key in settings:
        if key not in known:
            raise ConfigError(f"method {name} has no hyper-parameter {key!r}: {nearest(key, known)}")
    networks = subnetworks.build(num_classes=num_classes, **config.subnetworks)
    return METHODS[name](networks, num_classes, **settings)
