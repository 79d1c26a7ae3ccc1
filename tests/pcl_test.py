"""PCL: its losses and gradients against NumPy in float64, and the life of its temporal means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import draw_variables
from flax import linen as nn
from reference import check_reach, first_state, slopes, softmax, term_gradients

from configs import cifar100, common
from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS
from ffl_jax.methods.base import logged
from ffl_jax.methods.subnetworks import Stacked
from ffl_jax.methods.subnetworks import build as build_subnetworks
from ffl_jax.models import Network
from ffl_jax.models.base import batch_norm
from ffl_jax.training import cost, steps

PCL = METHODS["pcl"]

RNG = np.random.default_rng(0)
LOGITS, EMA = RNG.normal(0, 2, (2, 3, 5, 4))  # three peers, five examples, four classes
FUSED, EMA_FUSED = RNG.normal(0, 2, (2, 5, 4))
LABELS = np.array([0, 3, 1, 1, 2])
OUTPUTS = {"logits": LOGITS, "fused_logits": FUSED, "ema_logits": EMA, "ema_fused_logits": EMA_FUSED}


def make_method(num=3, network="tiny", classes=4, shared_stages=2, vectorize=False, **settings):
    return PCL(build_subnetworks(network, num, classes, shared_stages, vectorize), classes, **settings)


def cross_entropy(logits, labels):
    return reference.cross_entropy(logits, labels).mean(-1)


def kl_divergence(logits, target, temperature):
    return reference.kl_divergence(logits, target, temperature).mean(-1)


def evaluate(epoch=100.0, **settings):
    """Objectives, terms, and the gradient of the loss by every output."""
    method = make_method(**settings)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(outputs):
        scalars, terms = method.objectives(outputs, LABELS, jnp.float32(epoch))
        return scalars["loss"], (scalars, logged(terms))

    by_outputs, (scalars, terms) = gradient(jax.tree.map(jnp.float32, OUTPUTS))
    return scalars, terms, by_outputs


@pytest.mark.parametrize(
    ("epoch", "weight"), [(0.0, 0.0067379), (40.9, 0.2865048), (80.0, 1.0), (299.9, 1.0)]
)  # exp(-5 (1 - e / 80)^2) at whole epochs e, by hand
def test_loss_and_terms(epoch, weight):
    scalars, terms, _ = evaluate(epoch)
    expected = {"distillation_weight": weight, "cross_entropy/fused": cross_entropy(FUSED, LABELS)}
    for k in range(3):
        others = [EMA[other] for other in range(3) if other != k]
        expected |= {
            f"cross_entropy/sub_{k}": cross_entropy(LOGITS[k], LABELS),
            f"ensemble_distillation/sub_{k}": kl_divergence(LOGITS[k], FUSED, 3.0),
            f"mean_teacher_distillation/sub_{k}": sum(kl_divergence(LOGITS[k], m, 3.0) for m in others) / 2,
        }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    loss = sum(
        value * (1 if name.startswith("cross") else weight)
        for name, value in expected.items()
        if name != "distillation_weight"
    )
    assert scalars.keys() == {"loss"}
    np.testing.assert_allclose(scalars["loss"], loss, rtol=1e-5)


def test_no_gradient_flows_into_a_teacher():
    """By hand: d KL(z; q) / d z = T (softmax(z / T) - softmax(q / T)), and teachers are constants."""
    _, _, gradient = evaluate(temperature=2.0)
    target = np.eye(4)[LABELS]
    np.testing.assert_allclose(gradient["fused_logits"], (softmax(FUSED) - target) / 5, atol=1e-6)
    for k in range(3):
        student = softmax(LOGITS[k] / 2)
        teachers = np.mean([softmax(EMA[other] / 2) for other in range(3) if other != k], axis=0)
        slope = softmax(LOGITS[k]) - target + 2 * (student - softmax(FUSED / 2)) + 2 * (student - teachers)
        np.testing.assert_allclose(gradient["logits"][k], slope / 5, atol=2e-6)
    assert not np.any(gradient["ema_logits"])
    assert not np.any(gradient["ema_fused_logits"])


def test_predictions():
    method = make_method()
    predictions = method.predictions(OUTPUTS)
    expected = {f"sub_{k}": LOGITS[k] for k in range(3)} | {f"ema_{k}": EMA[k] for k in range(3)}
    expected |= {"ensemble": LOGITS.sum(0) / 3, "fused": FUSED, "ema_fused": EMA_FUSED}
    assert predictions.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(predictions[name], value, rtol=1e-12, err_msg=name)
    assert method.network_names() == ("sub_0", "sub_1", "sub_2", "ema_0", "ema_1", "ema_2")
    assert method.headline == "ema_0"


@pytest.mark.parametrize("vectorize", [False, True])
def test_which_gradient_reaches_what(vectorize):
    """A peer's losses move its own path; the ensemble head's own moves all but the peers' heads."""
    method = make_method(vectorize=vectorize)
    rng = np.random.default_rng(1)
    images, labels = jnp.float32(rng.normal(size=(3, 4, 8, 8, 3))), jnp.asarray(rng.integers(0, 4, 4))
    variables = draw_variables(method, images[0])
    rng = np.random.default_rng(2)  # a copy that is not equal
    variables["ema"] = jax.tree.map(lambda x: x * rng.uniform(0.8, 1.2, x.shape), variables["ema"])
    kinds = ("cross_entropy", "ensemble_distillation", "mean_teacher_distillation")
    names = [f"{kind}/sub_{k}" for kind in kinds for k in range(3)] + ["cross_entropy/fused"]

    def terms(both):
        params, ema = both
        state = {"batch_stats": variables["batch_stats"], "ema": {**variables["ema"], "params": ema}}
        outputs, _ = method.apply({"params": params, **state}, images, train=True, mutable=list(state))
        terms = logged(method.objectives(outputs, labels, jnp.float32(100))[1])
        return {name: terms[name] for name in names}

    gradients = term_gradients(terms, (variables["params"], variables["ema"]["params"]))
    for term, (gradient, by_ema) in gradients.items():
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_ema)), term
        own = ("trunk", f"head_{term[-1]}", f"stages_{term[-1]}")
        if term == "cross_entropy/fused":
            own = ("trunk", "ensemble_head", *(f"stages_{k}" for k in range(3)))
        check_reach(gradient, 3, own, term)


@pytest.mark.parametrize(
    ("step", "decay"), [(0, 0.0), (1, 0.5), (9, 0.9), (999, 0.999), (50_000, 0.999)]
)  # min(1 - 1 / (t + 1), 0.999)
def test_means_after_a_step(step, decay):
    old, new = {"a": jnp.float32([1, -2])}, {"a": jnp.float32([5, 2])}
    state = {"batch_stats": new, "ema": {"params": old, "batch_stats": old}}
    average = decay * np.array([1, -2]) + (1 - decay) * np.array([5, 2])
    after = make_method().after_step(new, state, jnp.int32(step))
    np.testing.assert_allclose(after["ema"]["params"]["a"], average, rtol=1e-5)
    np.testing.assert_array_equal(after["ema"]["batch_stats"]["a"], old["a"])
    np.testing.assert_array_equal(after["batch_stats"]["a"], new["a"])
    after = make_method(average_statistics=True).after_step(new, state, jnp.int32(step))
    np.testing.assert_allclose(after["ema"]["params"]["a"], average, rtol=1e-5)
    np.testing.assert_allclose(after["ema"]["batch_stats"]["a"], average, rtol=1e-5)
    after = make_method(ema_decay=0.25).after_step(new, state, jnp.int32(9))
    np.testing.assert_allclose(after["ema"]["params"]["a"], [4, 1], rtol=1e-6)


class Plain(Network):
    """Two norms with a tanh between, and a head on the mean, for NumPy."""

    num_stages = 2

    def stem(self, x, train):
        return x

    def stage(self, index, x, train):
        x = batch_norm(train, name=f"norm{index + 1}")(x)
        return nn.tanh(x) if index == 0 else x


def plain(params, images, joint=True):
    """Logits [K, B, C], fused logits [B, C] and batch statistics in training, of views [K, B, H, W, 3].

    The trunk's statistics are a list: of all views together, or of one after another.
    """

    def norm(x, params, axes):
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        scale, bias = (params[name].reshape(mean.shape) for name in ("scale", "bias"))
        statistics = {"mean": mean.reshape(params["scale"].shape), "var": var.reshape(params["scale"].shape)}
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias, statistics

    branches, head = params["subnetworks"]["branches"], params["ensemble_head"]["head"]
    parts = [images] if joint else images[:, None]
    normed, first = zip(
        *[norm(part, params["subnetworks"]["trunk"]["norm1"], (0, 1, 2, 3)) for part in parts], strict=True
    )
    x, second = norm(np.tanh(np.concatenate(normed)), branches["norm2"], (1, 2, 3))
    features = x.mean((2, 3))
    logits = features @ branches["head"]["kernel"] + branches["head"]["bias"][:, None]
    fused = np.concatenate(list(features), -1) @ head["kernel"] + head["bias"]
    return logits, fused, [{"norm1": one} for one in first], {"norm2": second}


def moved(statistics, trunk, branches):
    """The running statistics after a step, by 0.1 for each of the trunk's: flax has 0.9 of the old."""

    def move(old, new):
        return jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, old, new)

    old = statistics["subnetworks"]
    return {
        "subnetworks": {
            "trunk": functools.reduce(move, trunk, old["trunk"]),
            "branches": move(old["branches"], branches),
        }
    }


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), actual, expected)


@pytest.mark.parametrize("joint", [True, False])
def test_two_steps_of_the_recipe(joint):
    """SGD, Nesterov 0.9, lr 0.1, decay 5e-4, from a copy that differs, in NumPy; gradients by differences."""
    config = common.get_config("method=pcl,network=tiny", "cifar100")
    with jax.enable_x64(True):
        method = PCL(Stacked(Plain(4), 3, 1), 4, rampup_epochs=0.0, joint_statistics=joint)
        rng = np.random.default_rng(3)
        images, labels = rng.normal(size=(3, 6, 3, 3, 3)), rng.integers(0, 4, 6)
        variables = draw_variables(method, images[0])
        variables["ema"]["params"] = jax.tree.map(lambda x: 0.5 * x, variables["ema"]["params"])
        params = variables.pop("params")
        state, step = first_state(method, config, params, variables, (3, 3, 3), steps_per_epoch=1)
        step = jax.jit(step)
        for _ in range(2):
            state = step(state, {"image": jnp.asarray(images), "label": jnp.asarray(labels)})

    expected, ema = (jax.tree.map(np.array, tree) for tree in (params, variables["ema"]))
    statistics = jax.tree.map(np.array, variables["batch_stats"])
    trace = jax.tree.map(np.zeros_like, expected)
    for decay in (0.0, 0.5):
        _, ensemble, *new = plain(expected, images, joint)
        means, _, *ema_new = plain(ema["params"], images, joint)

        def loss(params, ensemble=ensemble, means=means):
            logits, fused, *_ = plain(params, images, joint)
            total = cross_entropy(fused, labels)
            for k in range(3):
                total += cross_entropy(logits[k], labels) + kl_divergence(logits[k], ensemble, 3.0)
                others = [means[other] for other in range(3) if other != k]
                total += sum(kl_divergence(logits[k], other, 3.0) for other in others) / 2
            return total

        gradient = jax.tree.map(lambda g, p: g + 5e-4 * p, slopes(loss, expected), expected)
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, gradient)
        expected = jax.tree.map(lambda p, g, t: p - 0.1 * (g + 0.9 * t), expected, gradient, trace)
        statistics = moved(statistics, *new)
        ema = {
            "params": jax.tree.map(
                lambda old, new, d=decay: d * old + (1 - d) * new, ema["params"], expected
            ),
            "batch_stats": moved(ema["batch_stats"], *ema_new),
        }
    assert_close(state.params, expected)
    assert_close(state.model_state, {"batch_stats": statistics, "ema": ema})


def test_copy_begins_equal_and_follows():
    """Equal at first; its own statistics differ from the networks' as soon as its parameters do."""
    methods = {
        average: PCL(Stacked(Plain(4), 2, 1), 4, average_statistics=average) for average in (False, True)
    }
    params, model_state = jax.jit(
        functools.partial(steps.init_variables, methods[False], image_shape=(3, 3, 3))
    )(jax.random.key(0))
    assert model_state.keys() == {"batch_stats", "ema"}
    jax.tree.map(
        np.testing.assert_array_equal,
        model_state["ema"],
        {"params": params, "batch_stats": model_state["batch_stats"]},
    )
    assert len({float(x) for x in params["subnetworks"]["branches"]["head"]["bias"].ravel()}) == 8
    moved = jax.tree.map(lambda x: x + 0.1, params)
    images = jnp.float32(np.random.default_rng(4).normal(size=(2, 4, 3, 3, 3)))
    for average, method in methods.items():
        outputs, new = method.apply(
            {"params": moved, **model_state}, images, train=True, mutable=list(model_state)
        )
        assert np.abs(outputs["logits"] - outputs["ema_logits"]).max() > 0.01
        own = new["ema"]["batch_stats"]["subnetworks"]["branches"]["norm2"]["mean"]
        before = model_state["batch_stats"]["subnetworks"]["branches"]["norm2"]["mean"]
        assert np.array_equal(own, before) == average  # after_step is to average them
        assert not np.array_equal(new["batch_stats"]["subnetworks"]["branches"]["norm2"]["mean"], own)


def test_parameters_of_predictions():
    """3x3 convolutions of 3-4-8-16 channels and norms, heads of 4 classes: by hand."""
    trunk = 9 * (3 * 4 + 4 * 8) + 2 * (4 + 8)
    branch, head, ensemble_head = 9 * 8 * 16 + 2 * 16, 16 * 4 + 4, 48 * 4 + 4
    method = make_method()
    params, state = jax.eval_shape(
        functools.partial(steps.init_variables, method, image_shape=(8, 8, 3)), jax.random.key(0)
    )
    actual = cost.prediction_costs(method, {"params": params, **state}, (8, 8, 3))
    for name in method.network_names():
        assert actual[name]["parameters"] == trunk + branch + head, name
    assert actual["ensemble"]["parameters"] == trunk + 3 * (branch + head)
    for name in ("fused", "ema_fused"):
        assert actual[name]["parameters"] == trunk + 3 * branch + ensemble_head, name
    assert actual["fused"]["flops"] == actual["ema_fused"]["flops"]


def test_recipe():
    config = cifar100.get_config("method=pcl,network=resnet32")
    assert (config.subnetworks.num, config.subnetworks.shared_stages) == (3, 2)
    assert (config.epochs, config.batch_size, config.data.pad_mode) == (300, 128, "zero")
    settings = config.optimizer
    assert (settings.learning_rate, settings.weight_decay, settings.nesterov) == (0.1, 5e-4, True)
    assert tuple(settings.decay_epochs) == (150, 225)
    assert (config.method.temperature, config.method.rampup_epochs, config.method.ema_decay) == (3, 80, 0.999)
    assert PCL.recipe("imagenet") == {"subnetworks.num": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shared_stages": 0}, r"needs a shared trunk: its peers are branches"),
        (
            {"network": "tiny+tiny_wide+tiny", "shared_stages": 0},
            r"does not mix different networks: its peers",
        ),
        ({"num": 1}, r"at least 2 sub-network\(s\), got 1"),
        ({"ema_decay": 1.5}, r"ema_decay must be in \[0, 1\], got 1.5"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**settings).check()
