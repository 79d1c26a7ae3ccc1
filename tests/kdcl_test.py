"""KDCL: its targets, losses and gradients against NumPy in float64, and what it learns from validation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables
from reference import check_reach, cross_entropy, first_state, kl_divergence, slopes, softmax, term_gradients

from configs import cifar100, common, digits
from ffl_jax.data import augment
from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS, kdcl
from ffl_jax.methods.base import logged
from ffl_jax.methods.subnetworks import Stacked
from ffl_jax.methods.subnetworks import build as build_subnetworks
from ffl_jax.models import Network
from ffl_jax.models.base import batch_norm
from ffl_jax.training import config as config_lib
from ffl_jax.training import loop
from ffl_jax.training.experiment import Experiment
from ffl_jax.workdir import checkpoint

KDCL = METHODS["kdcl"]

LOGITS = np.array([[[1.0, 2, 3], [0, 0, 0]], [[2, 0, -1], [1, 1, 0]], [[0, 1, 0], [-1, 0, 2]]])
LABELS = np.array([0, 2])
WEIGHTS = np.array([0.75, 0.5, -0.25])


def make_method(num=3, network="tiny", classes=3, shared_stages=0, vectorize=False, **settings):
    return KDCL(build_subnetworks(network, num, classes, shared_stages, vectorize), classes, **settings)


def bisect(logits, labels):
    """The target of "linear" for two networks: where the slope of the convex loss changes sign, or an end."""
    target = np.empty(logits.shape[1:])
    for i, (label, first, second) in enumerate(zip(labels, *logits, strict=True)):

        def slope(a, first=first, second=second, label=label):
            error = softmax(a * first + (1 - a) * second) - np.eye(len(first))[label]
            return error @ (first - second)

        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        target[i] = low * first + (1 - low) * second
    return target


# By hand, from LOGITS: example 0 has label 0, example 1 label 2.
MINLOGIT = np.array(
    [[0.0, -2, -3], [-3, -2, 0]]
)  # of (0 1 2), (0 -2 -3), (0 1 0); (0 0 0), (1 1 0), (-3 -2 0)
NAIVE = np.array([[2.0, 0, -1], [-1, 0, 2]])  # networks 1 and 2
MEAN = np.array([[1.0, 1, 2 / 3], [0, 1 / 3, 2 / 3]])
GENERAL = np.array([[1.75, 1.25, 1.75], [0.75, 0.5, -0.5]])  # 3/4 z_0 + 1/2 z_1 - 1/4 z_2
TARGETS = {"minlogit": MINLOGIT, "naive": NAIVE, "mean": MEAN, "general": GENERAL}


def case(variant):
    """(outputs, target): three networks, and two for "linear", whose target has a slope to bisect there."""
    if variant == "linear":
        return {"logits": LOGITS[:2]}, bisect(LOGITS[:2], LABELS)
    return {"logits": LOGITS} | ({"weights": WEIGHTS} if variant == "general" else {}), TARGETS[variant]


def evaluate(outputs, method):
    """Objectives, terms, and the gradient of the loss by the logits."""

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(logits):
        scalars, terms = method.objectives(outputs | {"logits": logits}, LABELS, jnp.float32(0))
        return scalars["loss"], (scalars, logged(terms))

    outputs = {name: jnp.asarray(value, jnp.float32) for name, value in outputs.items()}
    by_logits, (scalars, terms) = gradient(outputs["logits"])
    return scalars, terms, by_logits


@pytest.mark.parametrize("variant", kdcl.KDCL.choices["variant"])
def test_loss_and_gradient(variant):
    """The target is a constant: d loss / d z_k = [c (softmax(z_k) - y) + w T (softmax(z_k / T) - q)] / B."""
    outputs, target = case(variant)
    logits = outputs["logits"]
    temperature = 4.0 if variant == "mean" else 2.0
    settings = {"temperature": temperature, "cross_entropy_weight": 0.5, "distillation_weight": 0.3}
    scalars, terms, by_logits = evaluate(outputs, make_method(len(logits), variant=variant, **settings))
    ce, kd = cross_entropy(logits, LABELS).mean(-1), kl_divergence(logits, target, temperature).mean(-1)
    names = [f"sub_{k}" for k in range(len(logits))]
    expected = dict(zip([f"cross_entropy/{name}" for name in names], ce, strict=True))
    expected |= dict(zip([f"distillation/{name}" for name in names], kd, strict=True))
    expected["cross_entropy/target"] = cross_entropy(target, LABELS).mean()
    if variant == "general":
        expected |= {f"target_weight/{name}": w for name, w in zip(names, WEIGHTS, strict=True)}
    assert terms.keys() == expected.keys()
    # "linear": float32 sees no slope within 1e-3 of the best mixture.
    tolerance = 1e-3 if variant == "linear" else 1e-6
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, atol=tolerance, err_msg=name)
    assert scalars.keys() == {"loss"}
    np.testing.assert_allclose(scalars["loss"], 0.5 * ce.sum() + 0.3 * kd.sum(), rtol=1e-5, atol=tolerance)
    slope = 0.5 * (softmax(logits) - np.eye(3)[LABELS])
    slope += 0.3 * temperature * (softmax(logits / temperature) - softmax(target / temperature))
    np.testing.assert_allclose(by_logits, slope / 2, atol=tolerance)


def test_loss_by_default():
    """MinLogit at temperature 2 with weights 1, sums over the networks: NumPy, float64."""
    scalars, terms, _ = evaluate({"logits": LOGITS}, make_method())
    kd = kl_divergence(LOGITS, MINLOGIT, 2.0).mean(-1)
    np.testing.assert_allclose(terms["distillation/sub_0"], kd[0], rtol=1e-5)
    expected = cross_entropy(LOGITS, LABELS).mean(-1).sum() + kd.sum()
    np.testing.assert_allclose(scalars["loss"], expected, rtol=1e-5)


def random_logits(num, classes, scale, count=64):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, scale, (num, count, classes)), rng.integers(classes, size=count)
    logits[:, np.arange(count), labels] += rng.uniform(0, 2 * scale, (num, count))
    return logits, labels


def test_minlogit_is_as_sure_as_the_surest_and_naive_as_the_best():
    logits, labels = random_logits(4, 10, 2.0)
    losses = cross_entropy(logits, labels)
    target = kdcl.minlogit_target(jnp.float32(logits), labels)
    assert (target[np.arange(64), labels] == 0).all()
    assert (cross_entropy(np.float64(target), labels) <= losses.min(0) + 1e-6).all()
    target = kdcl.naive_target(jnp.float32(logits), labels)
    np.testing.assert_allclose(cross_entropy(np.float64(target), labels), losses.min(0), rtol=1e-5)
    assert len(set(losses.argmin(0))) == 4  # every network is somebody's best


def test_linear_by_hand():
    """3 exp(3 a) = 6 exp(6 (1 - a)) has a = (6 + log 2) / 9; the second example is at a corner, a = 1."""
    logits = [[[2.0, 3, 0], [5, 0, 0]], [[2, 0, 6], [1, 0, 0]]]
    a = (6 + math.log(2)) / 9
    expected = [[2, 3 * a, 6 * (1 - a)], [5, 0, 0]]
    target = kdcl.linear_target(jnp.float32(logits), jnp.array([0, 0]), 50)
    np.testing.assert_allclose(target, expected, atol=1e-3)  # float32 sees no slope from there on
    with jax.enable_x64(True):
        target = kdcl.linear_target(jnp.asarray(logits), jnp.array([0, 0]), 50)
    np.testing.assert_allclose(target, expected, atol=1e-6)


@pytest.mark.parametrize(("scale", "tolerance"), [(0.5, 1e-4), (2.0, 1e-3)])
def test_linear_of_three_against_all_mixtures(scale, tolerance):
    """The least loss on a grid over the simplex with 1 / 100 between neighbours, NumPy in float64."""
    logits, labels = random_logits(3, 10, scale)
    first, second = (x.ravel() for x in np.meshgrid(np.arange(101), np.arange(101)))
    first, second = first[first + second <= 100], second[first + second <= 100]
    grid = np.stack([first, second, 100 - first - second], axis=-1) / 100
    best = np.stack([cross_entropy(np.tensordot(a, logits, 1), labels) for a in grid]).min(0)
    target = kdcl.linear_target(jnp.float32(logits), labels, KDCL.linear_steps)
    actual = cross_entropy(np.float64(target), labels)
    assert (actual <= best + tolerance).all()
    assert (actual >= best - 0.01 * scale).all()  # not outside of the simplex, where losses are less
    uniform = cross_entropy(logits.mean(0), labels)
    assert (uniform - best).max() > 0.1 * scale


def test_linear_of_extreme_logits_is_finite():
    logits, labels = random_logits(3, 10, 300.0)
    target = kdcl.linear_target(jnp.float32(logits), labels, 100)
    assert np.isfinite(target).all()
    # No worse than at its beginning, the mean. In float32 logits of 1000 have an error of 1e-4.
    assert (
        cross_entropy_of_large(target, labels) <= cross_entropy_of_large(logits.mean(0), labels) + 1e-3
    ).all()


def cross_entropy_of_large(logits, labels):
    shifted = np.float64(logits) - np.float64(logits).max(-1, keepdims=True)
    return np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels]


def test_general_target_of_probabilities():
    weights = np.array([0.5, 1.5, -1])
    target = kdcl.general_target(jnp.float32(LOGITS), jnp.float32(weights), "probabilities")
    mixed = np.tensordot(weights, softmax(LOGITS), 1)
    assert ((mixed < 0).sum(-1) == 1).all()  # which becomes 1e-8
    expected = np.log(np.maximum(mixed, 1e-8))
    np.testing.assert_allclose(target, expected, rtol=1e-5)
    method = make_method(variant="general", mix="probabilities")
    _, terms, _ = evaluate({"logits": LOGITS, "weights": weights}, method)
    np.testing.assert_allclose(
        terms["cross_entropy/target"], cross_entropy(expected, LABELS).mean(), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("products", "ridge", "clip", "expected"),
    [  # By hand: C^-1 1 is (C_11 - C_01, C_00 - C_01) / det C.
        ([[2, 1], [1, 3]], 0.0, False, [2 / 3, 1 / 3]),
        ([[2, 1], [1, 3]], 1.0, False, [3 / 5, 2 / 5]),
        ([[1, 2], [2, 5]], 0.0, False, [3 / 2, -1 / 2]),
        ([[1, 2], [2, 5]], 0.0, True, [1, 0]),
        ([[0, 0], [0, 0]], 1e-3, False, [1 / 2, 1 / 2]),  # networks without an error
        ([[1, 1], [1, 1]], 1e-3, False, [1 / 2, 1 / 2]),  # the same network twice
    ],
)
def test_general_weights(products, ridge, clip, expected):
    weights = kdcl.general_weights(jnp.float32(products), ridge, clip)
    np.testing.assert_allclose(weights, expected, atol=1e-5)


def covariance(logits, labels):
    """C by its definition, example after example."""
    errors = softmax(logits) - np.eye(logits.shape[-1])[labels]
    return np.mean([errors[:, n] @ errors[:, n].T for n in range(len(labels))], axis=0)


def weights_of(products, ridge):
    inverse = np.linalg.inv(products + ridge * np.eye(len(products)))
    return inverse.sum(1) / inverse.sum()


def test_validation_sums_leave_padding_out():
    logits, labels = random_logits(3, 5, 1.0, count=6)
    method = make_method(3, classes=5, variant="general", ridge=0.01)
    sums = [
        method.validation_sums({"logits": jnp.float32(logits[:, part])}, labels[part], jnp.float32(weights))
        for part, weights in ((slice(0, 4), [1, 1, 1, 1]), (slice(2, 6), [0, 0, 1, 0]))
    ]
    sums = jax.tree.map(jnp.add, *sums)  # the first five examples
    assert float(sums["count"]) == 5
    products = covariance(logits[:, :5], labels[:5])
    np.testing.assert_allclose(sums["products"] / 5, products, rtol=1e-5)
    state = method.validation_state(sums)
    np.testing.assert_allclose(state["validation"]["weights"], weights_of(products, 0.01), rtol=1e-4)
    clipped = method.clone(clip_weights=True).validation_state(
        {"products": jnp.float32([[1, 2], [2, 5]]), "count": 1}
    )
    np.testing.assert_allclose(clipped["validation"]["weights"], [1, 0], atol=1e-6)


def test_weights_are_those_of_the_validation_split(tmp_path, monkeypatch):
    """Two epochs: each begins with the weights of the networks as the one before has left them."""
    begun, initial_state = [], Experiment.initial_state
    monkeypatch.setattr(
        Experiment, "initial_state", lambda self: begun.append((self, initial_state(self))) or begun[0][1]
    )
    config = digits.get_config("method=kdcl,network=tiny,epochs=2")
    config.method.update({"variant": "general", "ridge": 0.01})
    config.data.validation_examples = 77  # in batches of 32, the last one not full
    config.evaluation.update({"batch_size": 32, "every_epochs": 2})
    config.batch_size = 256
    assert loop.train(config, tmp_path)["status"] == "completed"
    [(experiment, state)] = begun
    np.testing.assert_array_equal(state.model_state["validation"]["weights"], [0.5, 0.5])
    split, settings = experiment.dataset.validation, experiment.config.data
    images = augment.normalize(split.images, settings.mean, settings.std)
    assert len(images) == 77
    apply = jax.jit(functools.partial(experiment.method.apply, train=False))
    for epoch in (1, 2):
        logits = apply({"params": state.params, **state.model_state}, images)["logits"]
        expected = weights_of(covariance(np.float64(logits), split.labels), 0.01)
        step = epoch * experiment.steps_per_epoch
        state = checkpoint.restore(tmp_path / "checkpoints", step, experiment.abstract_state())
        weights = state.model_state["validation"]["weights"]
        np.testing.assert_allclose(weights, expected, atol=1e-5)
        assert abs(weights[0] - 0.5) > 0.02
        logged = state.record["terms"]["target_weight/sub_0"] / state.record["steps"]
        np.testing.assert_allclose(logged, weights[0], rtol=1e-5)


KINDS = {
    "separate, vmapped": {"num": 2, "vectorize": True},
    "mixed": {"num": 3, "network": "tiny+tiny_wide+tiny"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_moves_its_own_network_alone(kind):
    method = make_method(**KINDS[kind])
    num = method.subnetworks.num
    rng = np.random.default_rng(1)
    images, labels = jnp.float32(rng.normal(size=(num, 4, 8, 8, 3))), jnp.asarray(rng.integers(0, 3, 4))
    variables = draw_variables(method, images[0])
    params = variables.pop("params")

    def terms(params):
        outputs, _ = method.apply(
            {"params": params, **variables}, images, train=True, mutable=["batch_stats"]
        )
        return logged(method.objectives(outputs, labels, jnp.float32(0))[1])

    gradients = term_gradients(terms, params)
    names = {f"{what}/sub_{k}" for what in ("cross_entropy", "distillation") for k in range(num)}
    assert gradients.keys() == names | {"cross_entropy/target"}
    for term, gradient in gradients.items():
        learner = term.split("_")[-1]  # the target's cross-entropy has none
        own = (f"stages_{learner}", f"head_{learner}")
        check_reach(gradient, num, own, term)


class Plain(Network):
    """A norm of the images and a head on their mean, for NumPy."""

    num_stages = 1

    def stem(self, x, train):
        return x

    def stage(self, index, x, train):
        return batch_norm(loop, name="norm")(x)


def plain_logits(params, images):
    """The logits [K, B, C] of K of these in training, from views [K, B, H, W, 3]; NumPy."""
    mean, var = images.mean((1, 2, 3), keepdims=True), images.var((1, 2, 3), keepdims=True)
    scale, bias = (params["norm"][name][:, None, None, None] for name in ("scale", "bias"))
    features = ((images - mean) / np.sqrt(var + 1e-5) * scale + bias).mean((2, 3))
    return features @ params["head"]["kernel"] + params["head"]["bias"][:, None]


def test_two_steps_of_the_recipe():
    """SGD with momentum 0.9, without Nesterov, lr 0.05, decay 5e-4, in NumPy; gradients by differences."""
    config = common.get_config("method=kdcl,network=tiny", "cifar100")
    with jax.enable_x64(True):
        method = KDCL(Stacked(Plain(4), 2), 4)
        rng = np.random.default_rng(2)
        images, labels = rng.normal(size=(2, 6, 3, 3, 3)), rng.integers(0, 4, 6)
        variables = draw_variables(method, images[0])
        params = variables.pop("params")
        state, step = first_state(method, config, params, variables, (3, 3, 3), steps_per_epoch=1)
        step = jax.jit(step)
        for _ in range(2):
            state = step(state, {"image": jnp.asarray(images), "label": jnp.asarray(labels)})

    expected = jax.tree.map(np.array, params["subnetworks"]["branches"])
    trace = jax.tree.map(np.zeros_like, expected)
    for _ in range(2):
        logits = plain_logits(expected, images)
        true = logits[:, np.arange(6), labels][..., None]
        target = (logits - true).min(0)

        def loss(params, target=target):
            logits = plain_logits(params, images)
            return (cross_entropy(logits, labels) + kl_divergence(logits, target, 2.0)).mean(-1).sum()

        gradient = slopes(loss, expected)
        trace = jax.tree.map(lambda t, g, p: 0.9 * t + g + 5e-4 * p, trace, gradient, expected)
        expected = jax.tree.map(lambda p, t: p - 0.05 * t, expected, trace)
    jax.tree.map(
        lambda actual, wanted: np.testing.assert_allclose(actual, wanted, atol=1e-9),
        state.params["subnetworks"]["branches"],
        expected,
    )


def test_recipe():
    config = cifar100.get_config("method=kdcl,network=resnet32+resnet56")
    assert (config.epochs, config.batch_size, config.data.pad_mode) == (240, 64, "zero")
    settings = config.optimizer
    assert (settings.learning_rate, settings.weight_decay, settings.nesterov) == (0.05, 5e-4, False)
    assert tuple(settings.decay_epochs) == (150, 180, 210)
    assert (config.method.variant, config.method.temperature) == ("minlogit", 2.0)
    assert config.subnetworks.shared_stages == 0
    assert KDCL.recipe("imagenet") == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "best"}, r"variant must be one of naive, .*mean, got 'best'"),
        ({"mix": "features"}, r"mix must be one of logits, probabilities, got 'features'"),
        ({"linear_steps": 0}, r"linear_steps must be at least 1, got 0"),
        ({"ridge": 0.0}, r"ridge must be at least 1e-06, got 0.0"),
        ({"shared_stages": 2}, r"shares no trunk: each .*\.shared_stages=0, got 2"),
        ({"num": 1}, r"at least 2 sub-network\(s\), got 1"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**settings).check()


def test_general_without_a_validation_split():
    config = digits.get_config("method=kdcl,network=tiny")
    config_lib.check(config)
    config.method.variant = "general"
    with pytest.raises(ConfigError, match=r"config.data.validation_fraction, both now 0"):
        config_lib.check(config)
    config.data.validation_examples = 100
    config_lib.check(config)
