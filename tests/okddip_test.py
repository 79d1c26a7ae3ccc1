"""OKDDip: its attention, losses and gradients against NumPy in float64, and a step of its recipe."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import draw_variables
from reference import check_reach, first_state, slopes, softmax, term_gradients

from configs import cifar100, common, imagenet
from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.methods.base import logged
from ffl_jax.methods.okddip import OKDDip, PeerAttention
from ffl_jax.methods.subnetworks import build as build_subnetworks
from ffl_jax.training import steps
from ffl_jax.training.cost import prediction_costs

# Two peers and the leader; their attention for each of two examples.
LOGITS = np.array([[[1.0, 2, 3], [0, 0, 0]], [[2, 0, -1], [1, 1, 0]], [[0, 1, 0], [-1, 0, 2]]])
ATTENTION = np.array([[[0.75, 0.25], [0.5, 0.5]], [[0.1, 0.9], [0.2, 0.8]]])
LABELS = np.array([0, 2])
# By hand: the first peer's, the second's, and the leader's.
TARGETS = np.array(
    [[[1.25, 1.5, 2], [0.9, 0.9, 0]], [[1.5, 1, 1], [0.8, 0.8, 0]], [[1.5, 1, 1], [0.5, 0.5, 0]]]
)
NAMES = ("sub_0", "sub_1", "leader")


def make_method(num=3, network="tiny", classes=3, shared_stages=2, vectorize=False, **settings):
    return OKDDip(build_subnetworks(network, num, classes, shared_stages, vectorize), classes, **settings)


def kl_divergence(logits, targets, temperature):
    """The mean over the batch, one for each network."""
    return reference.kl_divergence(logits, targets, temperature).mean(-1)


def cross_entropy(logits):
    return reference.cross_entropy(logits, LABELS).mean(-1)


def mixtures(logits, attention):
    """The peers' targets, and the leader's."""
    peers = range(attention.shape[1])
    targets = [
        [sum(attention[n, a, b] * logits[b, n] for b in peers) for n in range(len(attention))] for a in peers
    ]
    return np.array([*targets, sum(logits[a] for a in peers) / len(peers)])


def objectives(logits, attention, epoch=80.0, **settings):
    outputs = {"logits": logits, "ensemble_logits": logits[:-1].mean(axis=0), "attention": attention}
    method = make_method(len(logits), **settings)
    scalars, terms = method.objectives(outputs, jnp.asarray(LABELS), jnp.float32(epoch))
    return scalars, logged(terms)


def test_mixtures_by_hand():
    np.testing.assert_allclose(mixtures(LOGITS, ATTENTION), TARGETS, rtol=1e-12)


@pytest.mark.parametrize("target_grad", OKDDip.choices["target_grad"])
@pytest.mark.parametrize(
    ("epoch", "settings", "temperature", "weight"),
    [  # exp(-5 (1 - e / 80)^2) is 0.006738 at 0 and 0.286505 at 40.
        (0.9, {}, 3.0, 0.006738),
        (40.9, {"distillation_weight": 2.0}, 3.0, 0.573010),
        (80.0, {}, 3.0, 1.0),
        (0.0, {"rampup_epochs": 0.0, "temperature": 2.0}, 2.0, 1.0),
    ],
)
def test_loss(target_grad, epoch, settings, temperature, weight):
    """The same, whatever the gradient's way."""
    scalars, terms = objectives(
        *map(jnp.float32, (LOGITS, ATTENTION)), epoch, target_grad=target_grad, **settings
    )
    ce, kd = cross_entropy(LOGITS), kl_divergence(LOGITS, TARGETS, temperature)
    expected = {f"cross_entropy/{name}": ce[k] for k, name in enumerate(NAMES)}
    expected |= {f"distillation/{name}": kd[k] for k, name in enumerate(NAMES)}
    # By hand: means over the examples of what the peers keep.
    expected |= {"self_attention/sub_0": 0.425, "self_attention/sub_1": 0.65, "distillation_weight": weight}
    chex.assert_trees_all_close(terms, expected, atol=2e-6)
    assert set(scalars) == set(OKDDip.trains) == {"loss"}
    np.testing.assert_allclose(scalars["loss"], ce.sum() + weight * kd.sum(), atol=1e-5)


@pytest.mark.parametrize("target_grad", OKDDip.choices["target_grad"])
def test_gradient_of_the_loss(target_grad):
    """By central differences of the loss in NumPy, with those copies held that a target is cut from."""

    def loss(logits, mixed_logits, attention):
        kd = kl_divergence(logits, mixtures(mixed_logits, attention), 3.0)
        return (cross_entropy(logits) + 0.3 * kd).sum()

    expected_logits = slopes(lambda z: loss(z, z if target_grad == "full" else LOGITS, ATTENTION), LOGITS)
    expected_attention = np.zeros_like(ATTENTION)
    if target_grad != "none":
        expected_attention = slopes(lambda alpha: loss(LOGITS, LOGITS, alpha), ATTENTION)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(logits, attention):
        settings = {"target_grad": target_grad, "distillation_weight": 0.3}
        return objectives(logits, attention, **settings)[0]["loss"]

    with jax.enable_x64(True):
        by_logits, by_attention = gradient(jnp.asarray(LOGITS), jnp.asarray(ATTENTION))
    np.testing.assert_allclose(by_logits, expected_logits, atol=1e-8)
    np.testing.assert_allclose(by_attention, expected_attention, atol=1e-8)
    if target_grad == "none":
        np.testing.assert_array_equal(by_attention, 0)


@pytest.mark.parametrize(("features", "width"), [(4, 1), (12, 1), (16, 2), (64, 8)])
def test_attention(features, width):
    """The softmax over b of (x_a W_A)(x_b W_E), unscaled: NumPy, float64, pair after pair."""
    x = np.random.default_rng(0).normal(size=(3, 5, features))
    with jax.enable_x64(True):
        variables = draw_variables_of_attention(x)
        actual = PeerAttention().apply(variables, jnp.asarray(x))
    params = jax.tree.map(np.array, variables["params"])
    assert jax.tree.map(np.shape, params) == {
        "query": {"kernel": (features, width)},
        "key": {"kernel": (features, width)},
    }
    for n in range(5):
        for a in range(3):
            query = x[a, n] @ params["query"]["kernel"]
            scores = [query @ (x[b, n] @ params["key"]["kernel"]) for b in range(3)]
            np.testing.assert_allclose(actual[n, a], softmax(np.array(scores)), rtol=1e-10)


def draw_variables_of_attention(x):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(PeerAttention().init, jax.random.key(0), jnp.asarray(x))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape)), shapes)


def test_attention_starts_as_in_pytorch():
    """Both projections from U(-1/8, 1/8) for 64 features: standard deviation 1 / (8 sqrt(3)), by hand."""
    params = PeerAttention().init(jax.random.key(0), jnp.zeros((2, 1, 64)))["params"]
    assert not np.array_equal(params["query"]["kernel"], params["key"]["kernel"])
    for name in ("query", "key"):
        kernel = np.array(params[name]["kernel"])
        assert 0.115 < np.abs(kernel).max() <= 0.125
        np.testing.assert_allclose(kernel.std(), 0.0722, rtol=0.02)


def make_batch():
    rng = np.random.default_rng(1)
    return {"image": jnp.float32(rng.normal(size=(6, 8, 8, 3))), "label": jnp.asarray(rng.integers(0, 3, 6))}


def run(module, params, model_state, images):
    return module.apply({"params": params, **model_state}, images, True, mutable=["batch_stats"])[0]


def test_what_it_computes():
    """The peers are all but the last, in the attention as in the mean; float64."""
    with jax.enable_x64(True):
        method, images = make_method(4, shared_stages=1), make_batch()["image"]
        state = draw_variables(method, images)
        params = state.pop("params")

        @jax.jit
        def both(params):
            own = {"batch_stats": state["batch_stats"]["subnetworks"]}
            networks = run(method.subnetworks, params["subnetworks"], own, images)
            return run(method, params, state, images), [(one.logits, one.features) for one in networks]

        outputs, networks = both(params)
        features = jnp.stack([features for _, features in networks[:3]])
        attention = PeerAttention().apply({"params": params["attention"]}, features)
    logits = np.array([logits for logits, _ in networks])
    np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-12)
    np.testing.assert_allclose(outputs["ensemble_logits"], logits[:3].mean(0), rtol=1e-12)
    np.testing.assert_allclose(outputs["attention"], attention, rtol=1e-10)
    assert outputs["attention"].shape == (6, 3, 3)


KINDS = {
    "trunk, vmapped": {"num": 3, "vectorize": True},
    "separate": {"num": 3, "shared_stages": 0},
}


def reached_parts(term, target_grad, subs):
    """The parts that the gradient of a term moves."""
    what, learner = term.split("/")
    k, peers = subs.index(learner), range(len(subs) - 1)
    reached = {"trunk", f"head_{k}", f"stages_{k}"}
    if what == "distillation" and target_grad == "full":
        # A target mixes all peers' logits, the leader's are in none.
        reached |= {f"{part}_{peer}" for part in ("head", "stages") for peer in peers}
    if what == "distillation" and learner != "leader" and target_grad != "none":
        # Attention looks at features, which heads do not make.
        reached |= {"attention"} | {f"stages_{peer}" for peer in peers}
    return reached


@pytest.mark.parametrize(
    ("kind", "target_grad"),
    [("trunk, vmapped", mode) for mode in OKDDip.choices["target_grad"]] + [("separate", "full")],
)
def test_which_gradient_reaches_what(kind, target_grad):
    method, batch = make_method(target_grad=target_grad, **KINDS[kind]), make_batch()
    model_state = draw_variables(method, batch["image"])
    params = model_state.pop("params")
    subs = method.subnetwork_names()
    names = [f"{what}/{name}" for what in ("cross_entropy", "distillation") for name in subs]

    def terms(params):
        outputs = run(method, params, model_state, batch["image"])
        terms = logged(method.objectives(outputs, batch["label"], jnp.float32(0))[1])
        return {name: terms[name] for name in names}

    for term, gradient in term_gradients(terms, params).items():
        check_reach(gradient, len(subs), reached_parts(term, target_grad, subs), term)


def test_a_step_of_the_recipe():
    """Nesterov's first step in NumPy, p - 0.1 * 1.9 (g + 5e-4 p), of sub-networks and projections alike."""
    config = common.get_config("method=okddip,network=tiny", "cifar100")
    with jax.enable_x64(True):
        method, batch = methods.build(config, 3), make_batch()
        model_state = draw_variables(method, batch["image"])
        params = model_state.pop("params")
        state, step = first_state(method, config, params, model_state)
        own = {"batch_stats": model_state["batch_stats"]["subnetworks"]}

        @jax.jit
        def both(state):
            def loss(params):
                """Written again, from the networks' outputs on."""
                networks = run(method.subnetworks, params["subnetworks"], own, batch["image"])
                query, key = (
                    [one.features @ params["attention"][name]["kernel"] for one in networks[:-1]]
                    for name in ("query", "key")
                )
                peers = [one.logits for one in networks[:-1]]
                targets = []
                for a in range(3):
                    scores = jnp.stack([(query[a] * key[b]).sum(-1) for b in range(3)], axis=-1)
                    alpha = jnp.exp(scores) / jnp.exp(scores).sum(-1, keepdims=True)
                    targets.append(sum(alpha[:, b, None] * peers[b] for b in range(3)))
                total = 0.0
                for one, target in zip(networks, [*targets, sum(peers) / 3], strict=True):
                    ce = -jax.nn.log_softmax(one.logits)[jnp.arange(6), batch["label"]]
                    q = jax.nn.softmax(target / 3)
                    kd = 9 * (q * (jnp.log(q) - jax.nn.log_softmax(one.logits / 3))).sum(-1)
                    total += (ce + np.exp(-5.0) * kd).mean()
                return total

            return step(state, batch), jax.grad(loss)(state.params)

        after, gradient = both(state)
    expected = jax.tree.map(
        lambda p, g: np.array(p) - 0.1 * 1.9 * (np.array(g) + 5e-4 * np.array(p)), params, gradient
    )
    chex.assert_trees_all_close(jax.tree.map(np.array, after.params), expected, atol=1e-12)


def test_predictions():
    method = make_method()
    predictions = method.predictions(
        {"logits": jnp.float32(LOGITS), "ensemble_logits": jnp.float32(LOGITS[:2].mean(0))}
    )
    assert list(predictions) == ["sub_0", "sub_1", "leader", "ensemble"]
    assert method.headline == "leader"
    assert method.network_names() == NAMES
    expected = dict(zip(NAMES, LOGITS, strict=True))
    expected["ensemble"] = np.array([[1.5, 1, 1], [0.5, 0.5, 0]])  # by hand, without the leader
    chex.assert_trees_all_close(predictions, expected, rtol=1e-6)


def test_recipe():
    config = cifar100.get_config("method=okddip")
    settings = config.optimizer
    assert (config.epochs, config.batch_size, config.data.pad_mode) == (300, 128, "zero")
    assert (settings.learning_rate, settings.weight_decay, settings.nesterov) == (0.1, 5e-4, True)
    assert (settings.schedule, tuple(settings.decay_epochs)) == ("step", (150, 225))
    assert config.method.to_dict() == {
        "name": "okddip",
        "temperature": 3.0,
        "rampup_epochs": 80.0,
        "distillation_weight": 1.0,
        "target_grad": "full",
        "smoothing": 0.0,
    }
    assert (config.subnetworks.num, config.subnetworks.shared_stages) == (4, 2)
    large = imagenet.get_config("method=okddip")
    assert (large.subnetworks.num, large.optimizer.weight_decay) == (4, 1e-4)


def test_sizes():
    """ResNet-32: 472756 parameters, 360164 of them in its last stage and head; projections of 64 * 8 each."""
    method = methods.build(cifar100.get_config("method=okddip"), 100)
    params, _ = jax.eval_shape(lambda: steps.init_variables(method, jax.random.key(0), (32, 32, 3)))
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert sizes == {"subnetworks": 472756 + 3 * 360164, "attention": 1024}
    separate = method.clone(subnetworks=build_subnetworks("resnet32", 4, 100))
    params, _ = jax.eval_shape(lambda: steps.init_variables(separate, jax.random.key(0), (32, 32, 3)))
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert sizes == {"subnetworks": 4 * 472756, "attention": 1024}


def test_what_its_predictions_cost():
    """The leader is one network; the ensemble needs neither the projections nor the leader."""
    method = make_method(4, shared_stages=0)
    params, state = jax.eval_shape(lambda: steps.init_variables(method, jax.random.key(0), (8, 8, 3)))
    costs = prediction_costs(method, {"params": params, **state}, (8, 8, 3))
    # Tiny: 3x3 convolutions 3 -> 4 -> 8 -> 16, norms, and a head of 3 classes.
    assert costs["leader"]["parameters"] == 9 * (12 + 32 + 128) + 2 * (4 + 8 + 16) + 16 * 3 + 3
    assert costs["ensemble"]["parameters"] == 3 * costs["leader"]["parameters"]
    np.testing.assert_allclose(costs["ensemble"]["flops"], 3 * costs["leader"]["flops"], rtol=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_grad": "half"}, r"target_grad must be one of full, attention, none, got 'half'"),
        (
            {"network": "tiny+tiny_wide+tiny", "shared_stages": 0},
            r"OKDDip does not mix .*projections are shared",
        ),
        ({"num": 2}, r"OKDDip takes at least 3 sub-network\(s\), got 2"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**settings).check()
