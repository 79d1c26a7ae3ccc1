"""Averaged weights of any method, against averages by NumPy in float64, and as predictions and exports."""

import json

import jax
import numpy as np
import pytest
from conftest import write_run
from harness import CLASSES, FIRST_KINDS, Training, configuration, draw_batch

from configs import common, digits
from ffl_jax import methods
from ffl_jax.deployment import card as cards
from ffl_jax.deployment import exporting, predictor
from ffl_jax.errors import ConfigError
from ffl_jax.methods.base import NETWORK
from ffl_jax.training import config as config_lib
from ffl_jax.training import scoring, teachers

DECAY = 0.3


def training(name, decay):
    config = configuration(name, FIRST_KINDS[name])
    config.ema_decay = decay
    return Training(methods.build(config, CLASSES), config)


def leaves(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("name", ["ffl", "kd"])
def test_averages_are_those_of_numpy(name):
    """d = min(0.3, (1 + t) / (10 + t)), which is 0.1, 2 / 11, 0.25 and 0.3; training does not see them."""
    made, plain = training(name, DECAY), training(name, 0.0)
    assert "averaged" not in plain.state.model_state
    ema = made.state.model_state["averaged"]
    assert ema.keys() == {"params", "batch_stats"}
    assert "teachers" not in ema["params"]
    step = jax.jit(lambda state, batch: made.step(state, batch, accumulate=2))
    plain_step = jax.jit(lambda state, batch: plain.step(state, batch, accumulate=2))
    state = made.state
    others = {kind: tree for kind, tree in state.model_state.items() if kind != "averaged"}
    unseen = plain.state.replace(params=state.params, model_state=others)
    expected = {key: value.astype(np.float64) for key, value in leaves(ema).items()}
    first = dict(expected)
    for t in range(4):
        batch = made.batch(8, seed=t)
        state, unseen = step(state, batch), plain_step(unseen, batch)
        decay = min(DECAY, [1 / 10, 2 / 11, 3 / 12, 4 / 13][t])
        new = leaves({"params": state.params, "batch_stats": state.model_state["batch_stats"]})
        expected = {key: decay * old + (1 - decay) * new[key] for key, old in expected.items()}
    for key, value in leaves(state.model_state["averaged"]).items():
        np.testing.assert_allclose(value, expected[key], rtol=2e-6, atol=1e-7, err_msg=key)
    assert sum(np.abs(expected[key] - value).max() > 1e-3 for key, value in first.items()) > 5
    others = {kind: tree for kind, tree in state.model_state.items() if kind != "averaged"}
    for one, other in zip(
        jax.tree.leaves((state.params, others, state.record)),
        jax.tree.leaves((unseen.params, unseen.model_state, unseen.record)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["ffl", "feed"])
def test_each_prediction_has_one_by_averages(name):
    """That of the plain method with the averages for its variables; of networks, as they are taken out."""
    method, plain = training(name, DECAY).method, training(name, 0.0).method
    state, images = training(name, DECAY).state, draw_batch(4)["image"]
    means = jax.tree.map(lambda x: 1.2 * x, state.model_state["averaged"])
    variables = state.variables | {"averaged": means}
    others = {kind: tree for kind, tree in state.variables.items() if kind != "averaged"}
    averaged = others | {kind: {**others[kind], **tree} for kind, tree in means.items()}

    @jax.jit
    def run(variables, others, averaged):
        found = method.predictions(method.apply(variables, images, train=False))
        alone = {}
        for name in method.network_names():
            network, own = method.extract(variables, name)
            alone[name] = network.apply(own, images, train=False).logits
        both = [plain.apply(one, images, train=False) for one in (others, averaged)]
        return found, alone, *map(plain.predictions, both)

    found, alone, now, mean = run(variables, others, averaged)
    learned = [key for key in now if not key.startswith("teacher")]
    assert found.keys() == method.roles().keys() == {*now, *(f"ema_{key}" for key in learned)}
    assert method.headline == plain.headline
    for key in learned:
        np.testing.assert_array_equal(found[key], now[key])
        np.testing.assert_allclose(found[f"ema_{key}"], mean[key], rtol=1e-6, atol=1e-6)
        assert np.abs(mean[key] - now[key]).max() > 1e-3
    assert set(alone) == {key for key, role in method.roles().items() if role.kind == NETWORK}
    for key, logits in alone.items():
        np.testing.assert_allclose(logits, found[key], rtol=1e-5, atol=1e-5)


def test_exports_hold_the_averages_alone(tmp_path):
    """A network without a trace of them; what takes several networks by a card that says so."""
    config = digits.get_config("network=tiny")
    config.ema_decay = DECAY
    write_run(tmp_path, config)
    restored = scoring.restore_checkpoint(tmp_path)
    images = restored.experiment.dataset.test.images[:3]
    for name in ("ema_sub_1", "ema_fused"):
        card, variables = exporting.describe(restored, name)
        assert card["predictor"] == name
        assert cards.parse(json.dumps(card).encode()) == card
        function, shapes = predictor.build(card)
        weights = predictor.weights(function, variables, (8, 8, 3))
        if name == "ema_sub_1":
            assert card["architecture"] == {"network": "tiny", "num_classes": 10}
        else:
            assert card["architecture"]["ema_decay"] == DECAY
            assert all(key.startswith("averaged/") for key in weights)
        taken, _ = predictor.variables(function, weights, shapes, (8, 8, 3))
        expected = exporting.reference(restored, name, images)
        np.testing.assert_allclose(jax.jit(function)(taken, images), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_averaged_is_refused():
    """PCL's own averages, by its own rule, cannot be joined by these."""
    assert type(training("pcl", 0.0).method) is methods.METHODS["pcl"]
    with pytest.raises(ConfigError, match=r"^PCL keeps averages of its own: set config\.ema_decay=0"):
        training("pcl", DECAY)
    config = common.get_config("method=ffl")
    config.ema_decay = 1.5
    with pytest.raises(ConfigError, match=r"config\.ema_decay must be at most 1, got 1\.5"):
        config_lib.check(config)


def test_what_was_trained_without_stays_so():
    """A configuration and a card of a version before, and the teachers of a student that has averages."""
    config = common.get_config("method=kd")
    config.ema_decay = DECAY
    assert teachers.teacher_config(config, 0).ema_decay == 0
    values = config_lib.to_json(config)
    del values["ema_decay"]
    assert config_lib.from_json(values).ema_decay == 0
    assert config_lib.fixed_part(values)["ema_decay"] == 0
