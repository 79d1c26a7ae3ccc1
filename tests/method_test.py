"""Every method on every kind of sub-networks: a new method is tested by being registered."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import common
from ffl_jax import methods, metrics, optimizers, steps

SHAPE, CLASSES, BATCH = (8, 8, 3), 10, 8
KINDS = {
    "shared": {"network": "resnet8", "num": 2, "shared_stages": 2, "vectorize": False},
    "shared of three, vmapped": {"network": "resnet8", "num": 3, "shared_stages": 2, "vectorize": True},
    "separate": {"network": "resnet8", "num": 2, "shared_stages": 0, "vectorize": False},
    "mixed": {"network": "resnet8+resnet14", "num": 2, "shared_stages": 0, "vectorize": False},
}


class Setup:
    """One method on one kind of sub-networks, and its first steps."""

    def __init__(self, name, kind):
        self.config = common.get_config(f"method={name}")
        self.config.subnetworks = ml_collections.ConfigDict(KINDS[kind])
        self.method = methods.build(self.config, CLASSES)
        key = jax.random.key(0)
        shapes, _ = jax.eval_shape(lambda: steps.init_variables(self.method, key, SHAPE))
        self.optimizers = optimizers.make_optimizers(
            self.method.trains, shapes, self.config.optimizer, self.config.optimizer_rules, 2, 300
        )
        self.traces = 0
        self.train_step = jax.jit(self._train_step)
        self.state = jax.jit(lambda: steps.create_state(self.method, self.optimizers, key, SHAPE))()
        rng = np.random.default_rng(0)
        self.batch = {
            "image": jnp.asarray(rng.normal(size=(BATCH, *SHAPE)), jnp.float32),
            "label": jnp.asarray(rng.integers(CLASSES, size=BATCH), jnp.int32),
        }

    def _train_step(self, state, batch):
        self.traces += 1
        return steps.train_step(
            state, batch, method=self.method, optimizers=self.optimizers, steps_per_epoch=2
        )


@pytest.fixture(scope="module", params=[(m, k) for m in methods.METHODS for k in KINDS], ids=" ".join)
def setup(request):
    return Setup(*request.param)


@pytest.fixture(scope="module")
def trained(setup):
    state = setup.state
    for _ in range(3):
        state = setup.train_step(state, setup.batch)
    return state


def test_many_steps_compile_once(setup, trained):
    assert setup.traces == 1
    assert int(trained.step) == 3


def test_objectives_are_finite_and_named_as_in_trains(setup, trained):
    outputs = setup.method.apply(
        {"params": trained.params, **trained.model_state}, setup.batch["image"], train=False
    )
    scalars, terms = setup.method.objectives(outputs, setup.batch["label"], jnp.float32(1))
    assert scalars.keys() == setup.method.trains.keys()
    for name, value in (scalars | terms).items():
        assert value.shape == (), name
        assert np.isfinite(float(value)), name
    assert set(trained.record["terms"]) == set(scalars | terms)


def test_record_holds_the_sums_of_its_steps(setup, trained):
    state, sums = setup.state, {}
    for _ in range(3):
        fresh = state.replace(record=jax.tree.map(jnp.zeros_like, state.record))
        state = setup.train_step(fresh, setup.batch)
        for name, value in state.record["terms"].items():
            sums[name] = sums.get(name, 0.0) + float(value)
    assert int(trained.record["steps"]) == int(trained.record["finite_steps"]) == 3
    for name, value in trained.record["terms"].items():
        np.testing.assert_allclose(float(value), sums[name], rtol=1e-5, atol=1e-6)
    for name, one in trained.record["predictions"].items():
        assert float(one["count"]) == 3 * BATCH, name
        assert 0 <= metrics.classification_scores(one)["top1"] <= 1


def test_every_trained_parameter_moves(setup, trained):
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), setup.state.params, trained.params)
    still = [
        jax.tree_util.keystr(path) for path, yes in jax.tree_util.tree_leaves_with_path(moved) if not yes
    ]
    assert not still


def test_subnetwork_taken_out_repeats_its_joint_prediction(setup, trained):
    variables = {"params": trained.params, **trained.model_state}
    outputs = setup.method.apply(variables, setup.batch["image"], train=False)
    predictions = setup.method.predictions(outputs)
    assert setup.method.headline in predictions
    joint = {kind: tree["subnetworks"] for kind, tree in variables.items()}
    for k, name in enumerate(setup.method.subnetwork_names()):
        network = setup.method.subnetworks.member(k)
        alone = network.apply(setup.method.subnetworks.extract(joint, k), setup.batch["image"], train=False)
        np.testing.assert_allclose(alone.logits, predictions[name], rtol=1e-5, atol=1e-5)


def test_evaluation_leaves_the_state_alone(setup, trained):
    variables = {"params": trained.params, **trained.model_state}
    batch = setup.batch | {"weight": jnp.ones(BATCH)}
    before = [np.array(leaf) for leaf in jax.tree.leaves(variables)]
    sums = steps.eval_step(variables, batch, method=setup.method)
    assert all(float(one["count"]) == BATCH for one in sums.values())
    for old, new in zip(before, jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(old, new)
