"""The step on methods small enough to follow by hand: two objectives and a frozen part, and dropout."""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Training

from configs import common
from ffl_jax import methods
from ffl_jax.training import steps

SHAPE = (2, 2, 3)
BATCH = {"image": jnp.zeros((4, *SHAPE)), "label": jnp.zeros(4, jnp.int32)}


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


def make(method, learning_rate, momentum=0.0):
    """A method of this file with plain SGD, and the parameters that it asks for."""
    config = common.get_config()
    config.optimizer_rules = ()
    config.optimizer.update(
        learning_rate=learning_rate, momentum=momentum, schedule="constant", weight_decay=0.0
    )
    variables = steps.init_variables(method, jax.random.key(0), SHAPE)
    return Training(method, config, SHAPE, 4, variables)


def run(made, count):
    state = made.state
    for _ in range(count):
        state = made.step(state, BATCH)
    return state


def test_objectives_move_their_own_parameters_from_the_same_point():
    state = run(make(Toy(Pair(), 2), learning_rate=0.1), 1)
    # d first / da = a + b = 3; d second / db = -3 (a - 3 b) = 15, at the old a.
    np.testing.assert_allclose(state.params["a"], 1 - 0.1 * 3, rtol=1e-6)
    np.testing.assert_allclose(state.params["b"], 2 - 0.1 * 15, rtol=1e-6)
    assert float(state.params["c"]) == 5.0
    assert float(state.record["terms"]["first"]) == 4.5 + 5
    assert float(state.record["terms"]["second"]) == 12.5 + 5


def test_epoch_counts_in_fractions():
    state = run(make(Toy(Pair(), 2), learning_rate=1e-9, momentum=0.9), 5)
    assert float(state.record["terms"]["epoch"]) == 0 + 0.25 + 0.5 + 0.75 + 1.0


def test_the_first_step_that_is_not_finite_is_known():
    state = run(make(Toy(Pair(), 2), learning_rate=1e20), 6)
    # Step 1 is finite; from then on a is -3e20, whose square is beyond float32.
    assert int(state.record["steps"]) == 6
    assert int(state.record["finite_steps"]) == 1


class Dropping(methods.Method):
    """The loss is w times a mask of 0s and 2s, so that a step of SGD at rate 1 takes the mask from w."""

    @nn.compact
    def __call__(self, images, train):
        w = self.param("w", nn.initializers.zeros, (64,))
        kept = nn.Dropout(0.5, deterministic=not train)(w)
        return {"logits": jnp.zeros((2, len(images), 2)), "kept": kept}

    def objectives(self, outputs, labels, epoch):
        return {"loss": outputs["kept"].sum()}, {}


@pytest.fixture(scope="module")
def dropping():
    return make(Dropping(Pair(), 2), learning_rate=1.0)


def masks(step, state, count):
    """(what each of the next steps takes from w, the states after them)."""
    states = [state]
    for _ in range(count):
        states.append(step(states[-1], BATCH))
    weights = np.array([state.params["w"] for state in states])
    return -np.diff(weights, axis=0), states[1:]


def test_every_step_drops_others(dropping):
    taken, _ = masks(jax.jit(dropping.step), dropping.state, 4)
    assert set(taken.ravel()) == {0.0, 2.0}
    assert len({one.tobytes() for one in taken}) == 4


def test_every_part_of_a_batch_drops_others(dropping):
    """The gradient is the mean over the parts: 1 where one of two dropped what the other kept."""
    taken, _ = masks(jax.jit(functools.partial(dropping.step, accumulate=2)), dropping.state, 2)
    assert all(set(one) == {0.0, 1.0, 2.0} for one in taken)
    assert not np.array_equal(*taken)


def test_a_continued_run_drops_the_same_and_another_run_others(dropping):
    step = jax.jit(dropping.step)
    taken, states = masks(step, dropping.state, 3)
    stored = jax.device_get(states[0].replace(rng=jax.random.key_data(states[0].rng)))
    restored = stored.replace(rng=jax.random.wrap_key_data(stored.rng))
    np.testing.assert_array_equal(masks(jax.jit(make(dropping.method, 1.0).step), restored, 2)[0], taken[1:])
    other, _ = masks(step, dropping.state.replace(rng=jax.random.key(1)), 3)
    assert not any(map(np.array_equal, other, taken))


@pytest.mark.parametrize("name", ["first", "second"])
def test_frozen_parameters_have_no_momentum(name):
    made = make(Toy(Pair(), 2), learning_rate=0.1, momentum=0.9)
    traces = [leaf for leaf in jax.tree.leaves(made.state.opt_state[name]) if leaf.dtype == jnp.float32]
    assert len(traces) == 1
