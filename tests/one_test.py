"""ONE: its gate, terms, gradients and a whole step, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import draw_variables

from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS, one
from ffl_jax.methods.base import logged
from ffl_jax.methods.subnetworks import build

NAMES = ("sub_0", "sub_1", "sub_2")


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def expected(logits, gate, ramp):
    """(terms, loss, gradients by the logits and by the gate); the fused logits depend on both."""
    fused = np.einsum("bk,kbc->bc", gate, logits)
    fused_ce, by_fused = reference.cross_entropy_slope(fused)
    terms, loss = {"cross_entropy/fused": fused_ce}, fused_ce
    by_logits = np.einsum("bk,bc->kbc", gate, by_fused)
    by_gate = np.einsum("bc,kbc->bk", by_fused, logits)
    for k, name in enumerate(NAMES[: len(logits)]):
        ce, by_ce = reference.cross_entropy_slope(logits[k])
        kd, by_kd, _ = reference.kl_divergence_slopes(logits[k], fused, 3.0)
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
    gradients = step.term_gradients()
    for k, name in enumerate(NAMES):
        for term in ("cross_entropy", "distillation"):
            gradient = gradients[f"{term}/{name}"]
            assert reference.largest(gradient["gate"]) == 0
            assert reference.largest(gradient["subnetworks"]["trunk"]) > 0
            for other in range(3):
                assert (reference.largest(reference.branch(gradient, other)) > 0) == (other == k)
    gradient = gradients["cross_entropy/fused"]
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


def make_method(num=3, network="tiny", classes=3, shared_stages=2, **settings):
    return METHODS["one"](build(network, num, classes, shared_stages), classes, **settings)


def run(module, params, model_state, images):
    return module.apply({"params": params, **model_state}, images, True, mutable=["batch_stats"])[0]


def draw(method):
    """(parameters, statistics, images [6, 8, 8, 3], labels [6])."""
    rng = np.random.default_rng(1)
    images, labels = jnp.asarray(rng.normal(size=(6, 8, 8, 3))), jnp.asarray(rng.integers(0, 3, 6))
    state = draw_variables(method, images)
    return state.pop("params"), state, images, labels


def test_gate_looks_at_the_trunk_by_the_statistics_of_the_batch():
    with jax.enable_x64(True):
        method = make_method()
        params, state, images, _ = draw(method)

        @jax.jit
        def both(params):
            outputs = run(method, params, state, images)
            own = {"batch_stats": state["batch_stats"]["subnetworks"]}
            trunk_map = run(method.subnetworks, params["subnetworks"], own, images)[0].trunk_map
            own = {"batch_stats": state["batch_stats"]["gate"]}
            return outputs, run(one.Gate(3), params["gate"], own, trunk_map)

        outputs, gate = both(params)
    np.testing.assert_allclose(outputs["gate"], gate, rtol=1e-10)
    assert np.ptp(np.array(gate), axis=0).min() > 1e-3  # every example has its own
    gate, logits = np.array(gate), np.array(outputs["logits"])
    fused = [sum(gate[n, k] * logits[k, n] for k in range(3)) for n in range(6)]
    np.testing.assert_allclose(outputs["fused_logits"], fused, rtol=1e-10)


def test_trunk_takes_the_plain_sum_of_all_gradients():
    """Along one direction through its parameters, against the difference of two cross-entropies."""
    with jax.enable_x64(True):
        method = make_method()
        params, state, images, labels = draw(method)
        rng = np.random.default_rng(3)
        trunk = params["subnetworks"]["trunk"]
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), trunk)

        @jax.jit
        @jax.value_and_grad
        def loss(trunk):
            moved = params | {"subnetworks": params["subnetworks"] | {"trunk": trunk}}
            terms = method.objectives(run(method, moved, state, images), labels, jnp.float32(0))[1]
            return sum(x for name, x in logged(terms).items() if name.startswith("cross_entropy/"))

        _, gradient = loss(trunk)
        ends = [
            float(loss(jax.tree.map(lambda x, d, step=step: x + step * d, trunk, direction))[0])
            for step in (1e-6, -1e-6)
        ]
        products = jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
        slope = float(sum(jax.tree.leaves(products)))
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("epoch", "settings", "weight"),  # exp(-5 (1 - e / 80)^2), NumPy in float64
    [(0.9, {}, 0.006738), (40.9, {}, 0.286505), (80.0, {}, 1.0), (0.0, {"rampup_epochs": 0.0}, 1.0)],
)
def test_weight_is_constant_within_an_epoch(epoch, settings, weight):
    outputs = {"logits": jnp.zeros((2, 2, 3)), "fused_logits": jnp.zeros((2, 3)), "gate": jnp.zeros((2, 2))}
    _, terms = make_method(2, **settings).objectives(outputs, jnp.array([0, 2]), jnp.float32(epoch))
    np.testing.assert_allclose(terms["distillation_weight"], weight, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shared_stages": 0}, r"ONE needs a shared trunk: its gate .*\.shared_stages to 1 or more, got 0"),
        ({"network": "tiny+tiny_wide", "num": 2, "shared_stages": 0}, r"ONE does not mix different networks"),
        ({"num": 1}, r"ONE takes at least 2 sub-network\(s\), got 1"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**settings).check()
