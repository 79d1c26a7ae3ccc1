"""DML: its terms and gradients against NumPy in float64, and a whole step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS
from ffl_jax.methods.base import logged
from ffl_jax.methods.dml import mean_probability_logits
from ffl_jax.methods.subnetworks import build

DML = METHODS["dml"]
LOGITS = np.array([[[1.0, 2, 3], [0, 0, 0]], [[2, 0, -1], [1, 1, 0]], [[0, 1, 0], [-1, 0, 2]]])
NETWORKS = ("sub_0", "sub_1", "sub_2")


def make_method(num=3, **settings):
    return DML(build("tiny", num, reference.CLASSES), reference.CLASSES, **settings)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def targets(logits, k, variant, temperature):
    """What network k learns from: one target or several."""
    others = [z for other, z in enumerate(logits) if other != k]
    if variant == "pairwise":
        return others
    if variant == "mean_logits":
        return [np.mean(others, axis=0)]
    return [temperature * np.log(np.mean([reference.softmax(z / temperature) for z in others], axis=0))]


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize(
    ("variant", "temperature", "normalize"),
    [
        ("pairwise", 1.0, True),
        ("pairwise", 3.0, False),
        ("mean_probabilities", 2.0, True),
        ("mean_logits", 3.0, True),
    ],
)
def test_loss_and_gradient(num, variant, temperature, normalize):
    logits = reference.draw_logits(num)
    method = make_method(num, variant=variant, temperature=temperature, normalize=normalize)
    loss, terms, gradients = reference.loss_and_gradients(method, {"logits": logits})
    expected, total = np.empty_like(logits), 0.0
    for k, name in enumerate(NETWORKS[:num]):
        ce, expected[k] = reference.cross_entropy_slope(logits[k])
        of = targets(logits, k, variant, temperature)
        share = 1 / len(of) if normalize else 1
        pairs = [reference.kl_divergence_slopes(logits[k], target, temperature) for target in of]
        kd = share * sum(value for value, _, _ in pairs)
        expected[k] += share * sum(gradient for _, gradient, _ in pairs)
        np.testing.assert_allclose(terms[f"cross_entropy/{name}"], ce, rtol=1e-10)
        np.testing.assert_allclose(terms[f"distillation/{name}"], kd, rtol=1e-10)
        total += ce + kd
    np.testing.assert_allclose(loss, total, rtol=1e-10)
    np.testing.assert_allclose(gradients["logits"], expected, rtol=1e-9, atol=1e-12)


def test_published_loss_has_pairs_at_temperature_1_divided_by_their_number():
    method = make_method()
    assert (method.variant, method.temperature, method.normalize) == ("pairwise", 1.0, True)


def test_equal_networks_have_nothing_to_teach():
    logits = np.stack([reference.draw_logits(1)[0]] * 3)
    for variant in ("pairwise", "mean_probabilities", "mean_logits"):
        _, terms, _ = reference.loss_and_gradients(make_method(variant=variant), {"logits": logits})
        assert all(abs(terms[f"distillation/{name}"]) < 1e-12 for name in NETWORKS)


@pytest.fixture(scope="module")
def step():
    return reference.Step("method=dml,network=tiny", 3)


def test_no_term_reaches_another_network(step):
    gradients = step.term_gradients()
    for k, name in enumerate(NETWORKS):
        for term in ("cross_entropy", "distillation"):
            gradient = gradients[f"{term}/{name}"]
            for other in range(3):
                assert (reference.largest(reference.branch(gradient, other)) > 0) == (other == k)


def test_a_step(step):
    """The logits' gradient by NumPy, taken back through the networks, then SGD by hand."""
    logits = np.asarray(step.outputs["logits"])
    by_logits = np.empty_like(logits)
    for k in range(3):
        _, by_logits[k] = reference.cross_entropy_slope(logits[k])
        for target in targets(logits, k, "pairwise", 1.0):
            by_logits[k] += reference.kl_divergence_slopes(logits[k], target, 1.0)[1] / 2
    step.check_sgd(step.gradients({"logits": by_logits}), nesterov=True)


def test_recipe():
    config = reference.common.get_config("method=dml", "cifar100")
    assert (config.epochs, config.batch_size, config.optimizer.decay_epochs) == (200, 64, (60, 120, 180))
    assert (config.subnetworks.num, config.subnetworks.shared_stages) == (2, 0)


def test_unknown_variant():
    config = reference.common.get_config("method=dml")
    config.method.variant = "triple"
    with pytest.raises(ConfigError, match="pairwise, mean_probabilities, mean_logits, got 'triple'"):
        methods.build(config, 10)


@pytest.mark.parametrize(
    ("variant", "distillation"),  # by the formulas, number after number, with Python's `math`
    [
        ("pairwise", (0.693251, 1.020861, 0.847322)),
        ("mean_probabilities", (0.450966, 0.891803, 0.659828)),
        ("mean_logits", (0.478909, 0.924325, 0.611334)),
    ],
)
def test_figures(variant, distillation):
    _, terms = make_method(variant=variant).objectives(
        {"logits": jnp.float32(LOGITS)}, jnp.array([0, 2]), jnp.float32(0)
    )
    actual = [terms[f"distillation/sub_{k}"].value for k in range(3)]
    np.testing.assert_allclose(actual, distillation, atol=1e-6)


@pytest.mark.parametrize("variant", DML.choices["variant"])
def test_extreme_logits(variant):
    """Finite, and by hand: the divergence is the difference of two logits that lie 2000 apart."""
    logits = 1000 * np.array([[[1.0, -1, 0]], [[-1, 1, 0]]]).repeat(2, axis=1)
    method = make_method(2, variant=variant)

    def loss(logits):
        scalars, terms = method.objectives({"logits": logits}, jnp.array([0, 2]), jnp.float32(0))
        return scalars["loss"], logged(terms)

    gradient, terms = jax.grad(loss, has_aux=True)(jnp.float32(logits))
    np.testing.assert_allclose(terms["distillation/sub_0"], 2000, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_mean_of_probabilities():
    """At temperature 2 the softmax of the target is the mean of the networks', by its definition."""
    target = mean_probability_logits(jnp.float32(LOGITS), 2.0)
    np.testing.assert_allclose(
        np.exp(np.float64(target) / 2), reference.softmax(LOGITS / 2).mean(0), rtol=1e-5
    )
    assert mean_probability_logits(jnp.bfloat16(LOGITS), 2.0).dtype == jnp.float32


def test_predictions():
    predictions = make_method().predictions({"logits": jnp.float32(LOGITS)})
    assert list(predictions) == ["sub_0", "sub_1", "sub_2", "ensemble", "probability_ensemble"]
    mean = np.float64(predictions["probability_ensemble"])
    np.testing.assert_allclose(np.exp(mean), reference.softmax(LOGITS).mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        predictions["ensemble"], [[1, 1, 2 / 3], [0, 1 / 3, 2 / 3]], atol=1e-6
    )  # by hand
