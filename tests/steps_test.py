"""The step on methods small enough to follow by hand: two objectives and a frozen part, and dropout."""

import functools
import textwrap
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Training

from configs import common
from ffl_jax import methods
from ffl_jax.training import optimizers, steps

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


def seen(made, state, **settings):
    """The gauges of one step."""
    step = functools.partial(
        steps.observed_step, method=made.method, optimizers=made.optimizers, steps_per_epoch=4
    )
    return {name: float(x) for name, x in step(state, BATCH, **settings)[1].items()}


def test_rates_and_gradient_norms_are_of_each_objective():
    """Of the parameters that it moves alone: d first / dc is 1 too. By hand, as above."""
    made = make(Toy(Pair(), 2), learning_rate=0.1)
    one = seen(made, made.state)
    assert one.pop("gradient_norm/first") == 3
    assert one.pop("gradient_norm/second") == 15
    assert one == pytest.approx({"learning_rate/first": 0.1, "learning_rate/second": 0.1})


def test_a_rule_with_a_rate_of_its_own_has_a_name():
    """Rates are those of the step that was done: the default falls to a tenth at step 4, a rule's never."""
    rules = (
        ("first/.*", {"momentum": 0.5}),
        ("second/.*", {"schedule": "constant", "learning_rate": 0.3}),
    )
    default = dict(common.get_config().optimizer.to_dict(), learning_rate=0.5, decay_epochs=(1,))
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}

    def rates(trains, *chosen):
        made = optimizers.make_optimizers(trains, params, default, chosen, 4, 3)
        norms = dict.fromkeys(made, 0.0)
        both = [steps.gauges(made, jnp.int32(step), norms) for step in (3, 4)]
        return {key: [float(x[key]) for x in both] for key in both[0] if "learning" in key}

    assert rates({"loss": ".*"}) == {"learning_rate": pytest.approx([0.5, 0.05])}
    # A rule that has everything is what there is; one that changes no rate is not worth a name.
    assert rates({"first": "a", "second": "b"}, *rules) == {
        "learning_rate/first": pytest.approx([0.5, 0.05]),
        "learning_rate/second": pytest.approx([0.3, 0.3]),
    }
    own = ("loss/b", {"learning_rate": 0.2})
    assert rates({"loss": ".*"}, own) == {
        "learning_rate": pytest.approx([0.5, 0.05]),
        "learning_rate/rule_0": pytest.approx([0.2, 0.02]),
    }
    frozen = make(Toy(Pair(), 2), learning_rate=0.1).optimizers["first"].trained
    assert frozen == {"a": True, "b": False, "c": False}


def test_a_gradient_norm_is_joined_over_devices(commands):
    """Over shares of the batch the mean gradient's, over devices with other sub-networks all of theirs."""
    script = """
    import jax, numpy as np
    from ffl_jax.devices import parallel
    rng = np.random.default_rng(0)
    params = {"branches": {"w": rng.normal(size=(4, 3)).astype("f")}, "head": rng.normal(size=5).astype("f")}
    params["frozen"] = params["head"]
    trained = {"branches": {"w": True}, "head": True, "frozen": False}
    batch = np.float32([1, 2, 4, 9])
    for settings in ({}, {"mode": "shard_map", "num_devices": 4, "subnetworks": 2}):
        runner = parallel.Parallel(**settings)
        def norm(params, batch):
            share = parallel.share(batch).mean()
            return parallel.norm(parallel.mean(jax.tree.map(lambda x: x * share, params)), trained)
        program = runner.map(norm, (parallel.OWN, parallel.SHARED))
        found = runner.fetch(program(runner.place(params, parallel.OWN), runner.place(batch)))
        wanted = 4 * np.sqrt((params["branches"]["w"] ** 2).sum() + (params["head"] ** 2).sum())
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    """
    commands.run("-c", textwrap.dedent(script), devices=4)


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
