"""Averaged weights of any method: moving averages of what it trains, as predictions of their own."""

import functools

import jax
import jax.numpy as jnp

from ffl_jax.errors import ConfigError
from ffl_jax.methods.base import TEACHER, Method

_KINDS = ("params", "batch_stats")  # what is averaged
_MEANS = "averaged"  # the collection of the model state that holds it, and what outputs are by it


@functools.cache
def averaging(cls: type[Method]) -> type[Method]:
    """The same method, which also keeps averages of its parameters and batch statistics.

    After step t = 0, 1, ... they become d old + (1 - d) new with d = min(average_decay, (1 + t) / (10 + t)),
    as in TensorFlow's ExponentialMovingAverage with `num_updates`. They begin as what they average; teachers
    are left out. Training does not see them. In evaluation each prediction has another one, `ema_NAME`: that
    of the method with the averages in place of its variables.

    Raises:
      ConfigError: the method keeps averages of its own.
    """
    if cls.averages:
        raise ConfigError(
            f"{cls.__name__} keeps averages of its own: set config.ema_decay=0, or take another method."
        )

    class Averaging(cls):  # type: ignore[misc, valid-type]  # any method
        average_decay: float = 0.0

        averages = (_MEANS,)

        def without_means(self, images, train):
            return super().__call__(images, train)

        def __call__(self, images, train):
            outputs = self.without_means(images, train)
            if train:
                return outputs
            copy, variables = self.unbind()
            if self.is_initializing():
                for kind, tree in _averaged(variables).items():
                    self.put_variable(_MEANS, kind, tree)
            means = copy.apply(_with_means(self.variables), images, False, method="without_means")
            return outputs | {_MEANS: means}

        def predictions(self, outputs):
            predictions = super().predictions(outputs)
            if _MEANS not in outputs:  # in training
                return predictions
            means = super().predictions(outputs[_MEANS])
            return predictions | {name: means[of] for name, of in self._means().items()}

        def roles(self):
            roles = super().roles()
            return roles | {name: roles[of] for name, of in self._means().items()}

        def _means(self):
            """{prediction by averages: that which it is the average of}."""
            return {f"ema_{of}": of for of, role in super().roles().items() if role.kind != TEACHER}

        def extract(self, variables, name):
            means = self._means()
            if name not in means:
                return super().extract(variables, name)
            return super().extract(_with_means(variables), means[name])

        def after_step(self, params, model_state, step):
            model_state = super().after_step(params, model_state, step)
            decay = jnp.minimum(self.average_decay, (1 + step) / (10 + step))

            def mean(old, new):
                # The mean of two equal numbers may be rounded; what is kept, or frozen, stays to the bit.
                return jnp.where(old == new, old, decay * old + (1 - decay) * new)

            new = _averaged({"params": params, **model_state})
            return {**model_state, _MEANS: jax.tree.map(mean, model_state[_MEANS], new)}

    Averaging.__name__ = Averaging.__qualname__ = cls.__name__  # in errors
    return Averaging


def _averaged(variables):
    """What of a method's variables is averaged."""
    return {
        kind: {name: tree for name, tree in variables[kind].items() if name != "teachers"}
        for kind in _KINDS
        if kind in variables
    }


def _with_means(variables):
    """A method's variables with the averages in place of what they are of."""
    means = variables[_MEANS]
    others = {kind: tree for kind, tree in variables.items() if kind != _MEANS}
    return others | {kind: {**variables[kind], **tree} for kind, tree in means.items()}
