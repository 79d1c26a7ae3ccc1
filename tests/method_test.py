"""Every method on every kind of sub-networks: a new method is tested by being registered.

Copies that run at once do so as on an accelerator, those of every second method with another run beside them.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import equations
from harness import ALL, CLASSES, KINDS, SHAPE, Training, configuration, draw_batch, refusal

from ffl_jax import methods
from ffl_jax.devices import backend
from ffl_jax.errors import ConfigError
from ffl_jax.methods.base import ENSEMBLE, FUSED, KNOWLEDGE, LABELS, NETWORK, TEACHER, logged
from ffl_jax.training import metrics, scoring, steps
from ffl_jax.workdir import checkpoint

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
    """One method on one kind of sub-networks, with its steps compiled and counted.

    Attributes:
      as_accelerator: whether they are made for one, and not for a CPU.
    """

    def __init__(self, name, kind):
        config = configuration(name, kind)
        super().__init__(methods.build(config, CLASSES), config)
        self.traces, self.as_accelerator = 0, KINDS[kind][2] == "vmap"
        self._several_runs = self.as_accelerator and list(methods.METHODS).index(name) % 2 == 1
        self.compiled_step = self._compiled(self._train_step)
        self._compiled_evaluation = self._compiled(self._evaluate)

    def train(self, state):
        with backend.as_accelerator(self.as_accelerator):
            return self.compiled_step(state, self.batch(BATCH))

    def evaluate(self, state):
        with backend.as_accelerator(self.as_accelerator):
            return self._compiled_evaluation(state.variables, draw_batch(BATCH))

    def _compiled(self, function):
        """A function of one run; where there are several, equal ones, what it gives for the first."""

        @jax.jit
        def compiled(*given):
            if not self._several_runs:
                return function(*given)
            together = jax.vmap(function)(*jax.tree.map(lambda x: jnp.stack([x, x]), given))
            return jax.tree.map(lambda x: x[0], together)

        return compiled

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
    return setup.evaluate(trained)


def test_many_steps_compile_once(setup, trained):
    assert setup.traces == 1
    assert int(trained.step) == 3


def layouts(program):
    """Those of all convolutions of a program."""
    return {
        equation.params["dimension_numbers"]
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "conv_general_dilated"
    }


def test_no_gradient_of_a_convolution_is_left_to_xla_on_a_cpu(setup, trained):
    """Those of another layout its CPU backend computes by plain loops within a `while_loop`."""
    for_cpu, batch = {((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))}, setup.batch(BATCH)
    with backend.as_accelerator(setup.as_accelerator):
        compiled = layouts(setup.compiled_step.trace(trained, batch).jaxpr)
    assert setup.traces == 1
    assert (compiled != for_cpu) == setup.as_accelerator
    if setup.as_accelerator:
        assert layouts(jax.make_jaxpr(setup.step)(trained, batch)) == for_cpu


def test_the_state_keeps_its_form(setup, trained):
    """Else it could not be restored: the first state says what a checkpoint must hold."""

    def forms(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}

    assert forms(trained) == forms(setup.state)


def test_a_checkpoint_keeps_the_state(setup, trained, tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, trained, {})
    restored = checkpoint.restore(tmp_path, 3, jax.eval_shape(lambda: setup.state))
    for leaf, expected in zip(*map(jax.tree.leaves, (restored, trained)), strict=True):
        assert leaf.dtype == expected.dtype
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(leaf, expected)


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
    assert setup.method.headline in trained.record["predictions"]


def test_trained_parameters_move_and_frozen_ones_do_not(setup, trained):
    for path, old in jax.tree_util.tree_leaves_with_path(setup.state.params):
        new = trained.params
        for key in path:
            new = new[key.key]
        path = "/".join(key.key for key in path)
        is_trained = any(re.fullmatch(pattern, path) for pattern in setup.method.trains.values())
        assert np.array_equal(old, new) != is_trained, path


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
    scores = scoring._scores(sums, setup.method.headline)
    assert scores["predictions"].keys() == predictions.keys()
    assert all(np.isfinite(one["nll"]) for one in scores["predictions"].values())
    json.dumps(scores)
