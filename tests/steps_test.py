"""The step on a method with two objectives and a frozen part, small enough to follow by hand."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from ffl_jax import methods
from ffl_jax.training import optimizers, steps


class Pair(nn.Module):
    num: int = 2

    @nn.compact
    def __call__(self, images, train):
        return None


class Toy(methods.Method):
    """first: (a + b)^2 / 2 moves a; second: (a - 3 b)^2 / 2 moves b; c is frozen though both depend on it."""

    trains: ClassVar = {"first": "a", "second": "b"}

    @nn.compact
    def __call__(self, images, train):
        value = {
            name: self.param(name, lambda key, x=x: jnp.float32(x))
            for name, x in (("a", 1), ("b", 2), ("c", 5))
        }
        return value | {"logits": jnp.zeros((2, len(images), 2)) + value["c"]}

    def objectives(self, outputs, labels, epoch):
        a, b, c = (outputs[name] for name in "abc")
        first, second = (a + b) ** 2 / 2 + c, (a - 3 * b) ** 2 / 2 + c
        return {"first": first, "second": second}, {"epoch": epoch}


def make(**settings):
    default = (
        common.get_config().optimizer.to_dict() | {"schedule": "constant", "weight_decay": 0.0} | settings
    )
    return optimizers.make_optimizers(Toy.trains, {"a": 0.0, "b": 0.0, "c": 0.0}, default, (), 1, 1)


def run(state, made, count):
    batch = {"image": jnp.zeros((4, 2, 2, 3)), "label": jnp.zeros(4, jnp.int32)}
    method = Toy(Pair(), 2)
    for _ in range(count):
        state = steps.train_step(state, batch, method=method, optimizers=made, steps_per_epoch=4)
    return state


def test_objectives_move_their_own_parameters_from_the_same_point():
    made = make(learning_rate=0.1, momentum=0.0)
    state = run(steps.create_state(Toy(Pair(), 2), made, jax.random.key(0), (2, 2, 3)), made, 1)
    # d first / da = a + b = 3; d second / db = -3 (a - 3 b) = 15, at the old a.
    np.testing.assert_allclose(state.params["a"], 1 - 0.1 * 3, rtol=1e-6)
    np.testing.assert_allclose(state.params["b"], 2 - 0.1 * 15, rtol=1e-6)
    assert float(state.params["c"]) == 5.0
    assert float(state.record["terms"]["first"]) == 4.5 + 5
    assert float(state.record["terms"]["second"]) == 12.5 + 5


def test_epoch_counts_in_fractions():
    made = make(learning_rate=0.0 + 1e-9)
    state = run(steps.create_state(Toy(Pair(), 2), made, jax.random.key(0), (2, 2, 3)), made, 5)
    assert float(state.record["terms"]["epoch"]) == 0 + 0.25 + 0.5 + 0.75 + 1.0


def test_the_first_step_that_is_not_finite_is_known():
    made = make(learning_rate=1e20, momentum=0.0)
    state = run(steps.create_state(Toy(Pair(), 2), made, jax.random.key(0), (2, 2, 3)), made, 6)
    # Step 1 is finite; from then on a is -3e20, whose square is beyond float32.
    assert int(state.record["steps"]) == 6
    assert int(state.record["finite_steps"]) == 1


@pytest.mark.parametrize("name", ["first", "second"])
def test_frozen_parameters_have_no_momentum(name):
    made = make()
    state = made[name].init({"a": jnp.zeros(()), "b": jnp.zeros(()), "c": jnp.zeros(())})
    traces = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32]
    assert len(traces) == 1
