"""Methods of online distillation, one file each. Importing a file registers its method's name."""

import dataclasses
import functools

from ffl_jax.errors import ConfigError
from ffl_jax.methods import afd as afd
from ffl_jax.methods import cl_ilr as cl_ilr
from ffl_jax.methods import dml as dml
from ffl_jax.methods import feed as feed
from ffl_jax.methods import ffl as ffl
from ffl_jax.methods import ffsd as ffsd
from ffl_jax.methods import independent as independent
from ffl_jax.methods import kd as kd
from ffl_jax.methods import kdcl as kdcl
from ffl_jax.methods import mfef as mfef
from ffl_jax.methods import okddip as okddip
from ffl_jax.methods import one as one
from ffl_jax.methods import pcl as pcl
from ffl_jax.methods import subnetworks
from ffl_jax.methods.averaging import averaging
from ffl_jax.methods.base import METHODS, Method
from ffl_jax.models import NETWORKS
from ffl_jax.registry import check_choice, nearest

__all__ = ["METHODS", "Method", "build", "hyper_parameters", "takes_teachers"]

EXECUTIONS = ("auto", "loop", "vmap")  # auto is resolved where the devices are known, see `execution`
_SET_BY_BUILD = ("subnetworks", "num_classes", "teachers", "parent", "name")


def hyper_parameters(name: str) -> dict:
    """{field: default} of the method called `name`, which a configuration may set."""
    fields = dataclasses.fields(METHODS.lookup(name))
    return {field.name: field.default for field in fields if field.name not in _SET_BY_BUILD}


def takes_teachers(name: str) -> bool:
    """Whether the method called `name` learns from networks that are trained before it."""
    return any(field.name == "teachers" for field in dataclasses.fields(METHODS.lookup(name)))


def build(config, num_classes: int) -> Method:
    """The method that `method`, `subnetworks`, `teachers` and `ema_decay` of a configuration describe.

    The last two may be missing.

    Raises:
      ConfigError: a name or a hyper-parameter is unknown, or parts do not go together.
    """
    settings = dict(config.method)
    name = settings.pop("name")
    known = hyper_parameters(name)
    for key in settings:
        if key not in known:
            raise ConfigError(f"method {name} has no hyper-parameter {key!r}: {nearest(key, known)}")
    if takes_teachers(name):
        teachers = subnetworks.network_names(config.teachers.network, config.teachers.num, "teachers")
        settings["teachers"] = subnetworks.Mixed(
            tuple(NETWORKS.lookup(teacher)(num_classes) for teacher in teachers)
        )
    networks = dict(config.subnetworks)
    execution = networks.pop("execution")
    for key in ("start", "start_digests", "freeze_epochs"):  # says nothing of what is built
        networks.pop(key, None)
    check_choice("config.subnetworks.execution", execution, EXECUTIONS)
    networks = subnetworks.build(num_classes=num_classes, vectorize=execution == "vmap", **networks)
    decay, cls = getattr(config, "ema_decay", 0.0), METHODS[name]
    if decay:
        cls = functools.partial(averaging(cls), average_decay=decay)
    method = cls(networks, num_classes, **settings)
    method.check()
    return method
