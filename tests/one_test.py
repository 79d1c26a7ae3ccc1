"""ONE: its gate, terms, gradients and a whole step, against NumPy in float64."""

import jax
import numpy as np
import pytest
import reference
from conftest import draw_variables

from ffl_jax.methods import METHODS, one
from ffl_jax.subnetworks import build

NAMES = ("sub_0", "sub_1", "sub_2")


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def expected(logits, gate, ramp):
    """(terms, loss, gradients by the logits and by the gate); the fused logits depend on both."""
    fused = np.einsum("bk,kbc->bc", gate, logits)
    fused_ce, by_fused = reference.cross_entropy(fused)
    terms, loss = {"cross_entropy/fused": fused_ce}, fused_ce
    by_logits = np.einsum("bk,bc->kbc", gate, by_fused)
    by_gate = np.einsum("bc,kbc->bk", by_fused, logits)
    for k, name in enumerate(NAMES[: len(logits)]):
        ce, by_ce = reference.cross_entropy(logits[k])
        kd, by_kd, _ = reference.kl_divergence(logits[k], fused, 3.0)
        terms |= {f"cross_entropy/{name}": ce, f"distillation/{name}": kd, f"gate/{name}": gate[:, k].mean()}
        by_logits[k] += by_ce + ramp * by_kd
        loss += ce + ramp * kd
    return terms, loss, by_logits, by_gate


@pytest.fixture(scope="module")
def step():
    return reference.Step("method=one,network=tiny")


def test_gate():
    """Average pool, linear, batch norm, ReLU, softmax, layer by layer."""
    trunk_map = np.random.default_rng(0).normal(size=(4, 2, 2, 5))
    gate = one.Gate(3)
    variables = draw_variables(gate, trunk_map)
    pooled = trunk_map.mean((1, 2))
    linear, norm = variables["params"]["linear"], variables["params"]["norm"]
    x = pooled @ linear["kernel"] + linear["bias"]
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * norm["scale"] + norm["bias"]
    weights, _ = gate.apply(variables, trunk_map, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(weights, reference.softmax(np.maximum(x, 0)), rtol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_terms(step):
    """Three branches by the recipe, at half of the ramp."""
    assert step.outputs["logits"].shape == (3, reference.BATCH, reference.CLASSES)
    logits, gate = (np.asarray(step.outputs[name]) for name in ("logits", "gate"))
    terms, loss, _, _ = expected(logits, gate, reference.RAMP)
    for name, value in terms.items():
        np.testing.assert_allclose(float(step.terms[name]), value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(float(step.terms["loss"]), loss, rtol=1e-6)
    assert np.ptp(gate) > 0.1


def test_a_step(step):
    logits, gate = (np.asarray(step.outputs[name]) for name in ("logits", "gate"))
    _, _, by_logits, by_gate = expected(logits, gate, np.float32(reference.RAMP))
    # The fused logits have been taken apart by hand, so that none flows through them here.
    gradients = step.gradients({"logits": by_logits, "gate": by_gate})
    step.check_sgd(gradients, nesterov=False)


def test_which_gradient_reaches_what(step):
    for k, name in enumerate(NAMES):
        for term in ("cross_entropy", "distillation"):
            gradient = reference.term_gradients(step, f"{term}/{name}")
            assert reference.largest(gradient["gate"]) == 0
            assert reference.largest(gradient["subnetworks"]["trunk"]) > 0
            for other in range(3):
                assert (reference.largest(reference.branch(gradient, other)) > 0) == (other == k)
    gradient = reference.term_gradients(step, "cross_entropy/fused")
    assert reference.largest(gradient["gate"]) > 0
    assert all(reference.largest(reference.branch(gradient, k)) > 0 for k in range(3))


def test_predictions():
    method = METHODS["one"](build("tiny", 2, 3, 2), 3)
    logits, fused = reference.draw_logits(2), reference.draw_logits(1)[0]
    predictions = method.predictions({"logits": logits, "fused_logits": fused})
    assert list(predictions) == ["sub_0", "sub_1", "ensemble", "fused"]
    np.testing.assert_array_equal(predictions["fused"], fused)


def test_recipe():
    config = reference.common.get_config("method=one", "cifar10")
    assert (config.subnetworks.num, config.subnetworks.shared_stages) == (3, 2)
    assert (config.optimizer.nesterov, config.optimizer.decay_epochs) == (False, (151, 225))
    assert (config.optimizer.weight_decay, config.data.pad_mode) == (1e-4, "zero")
