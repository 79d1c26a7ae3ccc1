"""Every method on every kind of sub-networks: a new method is tested by being registered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import equations
from harness import ALL, CLASSES, SHAPE, Training, configuration, draw_batch, refusal

from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.methods.base import ENSEMBLE, FUSED, KNOWLEDGE, LABELS, NETWORK, TEACHER, logged
from ffl_jax.training import metrics, steps

BATCH = 8
# What runs on the second kind need not run on the first as well; parallel_methods_test.py takes the first
# kind of each method, by the loop.
COVERED = {
    "shared": "shared and one more, vmapped",
    "separate": "mixed",
    "separate and one more, vmapped": "shared and one more, vmapped",
}
RUN = [
    (name, kind)
    for name, kind in ALL
    if not refusal(name, kind) and (kind not in COVERED or refusal(name, COVERED[kind]))
]


@pytest.mark.parametrize(("name", "kind"), [pair for pair in ALL if refusal(*pair)])
def test_refuses_what_it_cannot_do_and_says_why(name, kind):
    with pytest.raises(ConfigError, match=re.escape(refusal(name, kind))):
        methods.build(configuration(name, kind), CLASSES)


class Setup(Training):
    """One method on one kind of sub-networks, with its steps compiled and counted."""

    def __init__(self, name, kind):
        config = configuration(name, kind)
        super().__init__(methods.build(config, CLASSES), config)
        self.traces = 0
        self.train_step = jax.jit(self._train_step)
        self.evaluate = jax.jit(self._evaluate)

    def train(self, state):
        return self.train_step(state, self.batch(BATCH))

    def _train_step(self, state, batch):
        self.traces += 1
        return self.step(state, batch)

    def _evaluate(self, variables, batch):
        """All that the tests look at in evaluation mode, in one program."""
        method, taken_out = self.method, {}
        outputs = method.apply(variables, batch["image"], train=False)
        for name in method.network_names():
            network, alone = method.extract(variables, name)
            taken_out[name] = network.apply(alone, batch["image"], train=False).logits
        scalars, terms = method.objectives(outputs, batch["label"], jnp.float32(1))
        sums = steps.eval_step(variables, batch | {"weight": jnp.ones(BATCH)}, method=method)
        return (scalars, logged(terms)), method.predictions(outputs), taken_out, sums


@pytest.fixture(scope="module", params=RUN, ids=" ".join)
def setup(request):
    return Setup(*request.param)


@pytest.fixture(scope="module")
def trained(setup):
    state = setup.state
    for _ in range(3):
        state = setup.train(state)
    return state


@pytest.fixture(scope="module")
def evaluated(setup, trained):
    """(objectives and terms, predictions, logits of the networks taken out, sums of scores)."""
    return setup.evaluate({"params": trained.params, **trained.model_state}, draw_batch(BATCH))


def test_many_steps_compile_once(setup, trained):
    assert setup.traces == 1
    assert int(trained.step) == 3


def test_no_gradient_of_a_convolution_is_left_to_xla(setup, trained):
    """Those of another layout its CPU backend computes by plain loops within a `while_loop`."""
    program = setup.train_step.trace(trained, setup.batch(BATCH)).jaxpr
    layouts = {
        equation.params["dimension_numbers"]
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "conv_general_dilated"
    }
    assert layouts == {((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))}
    assert setup.traces == 1


def test_the_state_keeps_its_form(setup, trained):
    """Else it could not be restored: the first state says what a checkpoint must hold."""

    def forms(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}

    assert forms(trained) == forms(setup.state)


def test_predictions_and_terms_say_what_they_are(setup, evaluated):
    """A network has the form of one of the sub-networks."""
    roles, logits, method = setup.method.roles(), evaluated[1], setup.method
    assert roles.keys() == logits.keys()
    for name, role in roles.items():
        assert role.kind in (NETWORK, ENSEMBLE, FUSED, TEACHER)
        assert (role.network is not None) == (role.kind == NETWORK) == (name in method.network_names())
    state = setup.state
    for name, term in steps.terms(method, state.params, state.model_state, SHAPE).items():
        assert term.kind in ("", LABELS, KNOWLEDGE), name
        assert name.endswith(f"/{term.learner}") or not term.learner


def test_objectives_are_finite_and_named_as_in_trains(setup, trained, evaluated):
    scalars, terms = evaluated[0]
    assert scalars.keys() == setup.method.trains.keys()
    for name, value in (scalars | terms).items():
        assert value.shape == (), name
        assert np.isfinite(float(value)), name
    assert set(trained.record["terms"]) == set(scalars | terms)


def test_record_holds_the_sums_of_its_steps(setup, trained):
    state, sums = setup.state, {}
    for _ in range(3):
        fresh = state.replace(record=jax.tree.map(jnp.zeros_like, state.record))
        state = setup.train(fresh)
        for name, value in state.record["terms"].items():
            sums[name] = sums.get(name, 0.0) + float(value)
    assert int(trained.record["steps"]) == int(trained.record["finite_steps"]) == 3
    for name, value in trained.record["terms"].items():
        np.testing.assert_allclose(float(value), sums[name], rtol=1e-5, atol=1e-6)
    for name, one in trained.record["predictions"].items():
        assert float(one["count"]) == 3 * BATCH, name
        assert 0 <= metrics.classification_scores(one)["top1"] <= 1


def test_trained_parameters_move_and_frozen_ones_do_not(setup, trained):
    for path, old in jax.tree_util.tree_leaves_with_path(setup.state.params):
        new = trained.params
        for key in path:
            new = new[key.key]
        path = "/".join(key.key for key in path)
        is_trained = any(re.fullmatch(pattern, path) for pattern in setup.method.trains.values())
        assert bool((old != new).any()) == is_trained, path


def test_statistics_of_frozen_networks_stay(setup, trained):
    for old, new in zip(
        jax.tree.leaves(setup.state.model_state["batch_stats"].get("teachers", {})),
        jax.tree.leaves(trained.model_state["batch_stats"].get("teachers", {})),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)


def test_network_taken_out_repeats_its_joint_prediction(setup, evaluated):
    _, predictions, taken_out, _ = evaluated
    assert setup.method.headline in predictions
    assert set(taken_out) == set(setup.method.network_names())
    for name, logits in taken_out.items():
        np.testing.assert_allclose(logits, predictions[name], rtol=1e-5, atol=1e-5)


def test_evaluation_counts_every_example(setup, evaluated):
    _, predictions, _, sums = evaluated
    assert sums["predictions"].keys() == predictions.keys()
    assert all(float(one["count"]) == BATCH for one in sums["predictions"].values())
