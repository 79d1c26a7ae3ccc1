"""One method ready to be trained: what all tests that take training steps build on."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import draw_model, first_state

from configs import common
from ffl_jax import methods
from ffl_jax.training import optimizers, steps

SHAPE, CLASSES = (8, 8, 3), 10
# kind -> (networks in turn, stages on a shared trunk, execution, sub-networks beyond the fewest)
KINDS = {
    "shared": (("tiny",), 2, "loop", 0),
    "shared and one more, vmapped": (("tiny",), 1, "vmap", 1),
    "separate": (("tiny",), 0, "loop", 0),
    "separate and one more, vmapped": (("tiny",), 0, "vmap", 1),
    "mixed": (("tiny", "tiny_wide"), 0, "loop", 1),
}


def configuration(name, kind):
    """The configuration of a method on one kind of sub-networks: two and three, where it can do with two."""
    networks, shared_stages, execution, more = KINDS[kind]
    config = common.get_config(f"method={name},network=tiny")
    num = max(2, methods.METHODS[name].num[0]) + more
    if methods.METHODS[name].num[1] == 1 and len(networks) == 1:
        num = 1
    names = "tiny" if len(networks) == 1 else "+".join((networks * num)[:num])
    config.subnetworks.update(network=names, num=num, shared_stages=shared_stages, execution=execution)
    if "teachers" in config:
        config.teachers.update({"network": "tiny+tiny_wide", "num": 2})
    return config


def refusal(name, kind) -> str:
    """The reason that a method gives against a kind of sub-networks, empty if it runs on it."""
    method = methods.METHODS[name]
    if len(KINDS[kind][0]) > 1:
        return method.refuses_mixed or ("sub-network" if method.num[1] == 1 else method.needs_trunk)
    return method.refuses_trunk if KINDS[kind][1] else method.needs_trunk


ALL = [(name, kind) for name in methods.METHODS for kind in KINDS]
FIRST_KINDS = {name: kind for name, kind in reversed(ALL) if not refusal(name, kind)}  # of each method


class Training:
    """A method with the optimizers of a configuration, and the state before its first step.

    Attributes:
      method, optimizers: what `step` takes.
      state: the first; its variables are random unless they are given.
    """

    def __init__(self, method, config, image_shape=SHAPE, steps_per_epoch=2, variables=None):
        """Args: variables: (params, model_state) to begin with."""
        self.method, self._steps_per_epoch = method, steps_per_epoch
        params, model_state = variables or draw_model(method, image_shape)
        self.optimizers = optimizers.make_optimizers(
            method.trains,
            params,
            config.optimizer,
            config.optimizer_rules,
            steps_per_epoch,
            config.epochs,
        )
        self.state = first_state(method, self.optimizers, image_shape, params, model_state)

    @classmethod
    def of(cls, name, kind=None):
        """A method by its name on one kind of sub-networks, else on the first that it runs on."""
        config = configuration(name, kind or FIRST_KINDS[name])
        return cls(methods.build(config, CLASSES), config)

    def step(self, state, batch, **settings):
        """The state after one more step, not compiled; `settings` are those of `steps.train_step`."""
        return steps.train_step(
            state,
            batch,
            method=self.method,
            optimizers=self.optimizers,
            steps_per_epoch=self._steps_per_epoch,
            **settings,
        )

    def batch(self, size=8, seed=0):
        """As `draw_batch`, with images [K, size, H, W, 3] where the method asks for views."""
        batch = draw_batch(size, seed)
        if self.method.views:
            views = [batch["image"] + 0.1 * k for k in range(self.method.subnetworks.num)]
            batch["image"] = jnp.stack(views)
        return batch


def draw_batch(size=8, seed=0):
    """Random `image` [size, H, W, 3], float64 where that is enabled, and `label` [size]."""
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(size, *SHAPE))),
        "label": jnp.asarray(rng.integers(CLASSES, size=size), jnp.int32),
    }


def in_float64(tree):
    """A tree with its floating-point leaves in float64, which must be enabled."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
