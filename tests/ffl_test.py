"""FFL: its losses by hand, the way of every gradient, and that it learns."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables
from reference import check_reach, term_gradients
from sklearn import datasets

from configs import digits
from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS, build
from ffl_jax.methods.base import logged
from ffl_jax.methods.subnetworks import build as build_subnetworks
from ffl_jax.training import metrics, optimizers, steps

FFL = METHODS["ffl"]

LOGITS = np.array([[[1.0, 2, 3], [0, 0, 0]], [[2, 0, -1], [1, 1, 0]], [[0, 1, 0], [-1, 0, 2]]])
FUSED = np.array([[3.0, 1, 0], [1, -1, 0]])
LABELS = np.array([0, 2])
# exp(-5 (1 - 1 / R)^2) = 1/2 at epoch 1 for R = 1 / (1 - sqrt(log(2) / 5)).
HALF_WAY = 1 / (1 - np.sqrt(np.log(2) / 5))
# NumPy, float64.
CE = {"sub_0": 1.753109, "sub_1": 1.015920, "fused": 0.788726}
KD = {"sub_0": 1.232568, "sub_1": 0.197489, "fused": 0.450416}


def make_method(num=2, network="resnet8", classes=3, shared_stages=2, vectorize=False, **settings):
    return FFL(build_subnetworks(network, num, classes, shared_stages, vectorize), classes, **settings)


def objectives(logits, fused, epoch=1.0, **settings):
    method = make_method(len(logits), rampup_epochs=HALF_WAY, **settings)
    outputs = {"logits": jnp.float32(logits), "fused_logits": jnp.float32(fused)}
    scalars, terms = method.objectives(outputs, jnp.asarray(LABELS), jnp.float32(epoch))
    return scalars, logged(terms)


def test_loss_of_two():
    scalars, terms = objectives(LOGITS[:2], FUSED)
    expected = {f"cross_entropy/{name}": value for name, value in CE.items()}
    expected |= {f"distillation/{name}": value for name, value in KD.items()} | {"distillation_weight": 0.5}
    chex.assert_trees_all_close(terms, expected, atol=1e-6)
    assert set(scalars) == set(FFL.trains) == {"loss"}
    np.testing.assert_allclose(scalars["loss"], 4.497992, atol=2e-6)


def test_loss_of_three():
    scalars, terms = objectives(LOGITS, FUSED)
    np.testing.assert_allclose(terms["distillation/sub_2"], 1.320247, atol=1e-6)
    np.testing.assert_allclose(terms["distillation/fused"], 0.569407, atol=1e-6)
    np.testing.assert_allclose(terms["distillation/sub_0"], KD["sub_0"], atol=1e-6)
    np.testing.assert_allclose(scalars["loss"], 6.078257, atol=3e-6)


def test_gradients_of_the_loss():
    by_logits, by_fused = jax.jit(
        jax.grad(lambda logits, fused: objectives(logits, fused)[0]["loss"], argnums=(0, 1))
    )(jnp.float32(LOGITS[:2]), jnp.float32(FUSED))
    # The teacher's side of every KL is a constant. NumPy, float64.
    expected = [
        [[-0.680968, 0.158676, 0.522292], [0.080336, 0.243989, -0.324325]],
        [[-0.078103, 0.057098, 0.021005], [0.150916, 0.314569, -0.465485]],
    ]
    np.testing.assert_allclose(by_logits, expected, atol=1e-6)
    expected = [[0.042055, 0.026029, -0.068084], [0.405468, -0.045790, -0.359678]]
    np.testing.assert_allclose(by_fused, expected, atol=1e-6)


def test_teachers_get_no_gradient_from_their_learners():
    def distillation(logits, fused):
        terms = objectives(logits, fused)[1]
        return jnp.stack(
            [terms["distillation/sub_0"], terms["distillation/sub_1"], terms["distillation/fused"]]
        )

    by_logits, by_fused = jax.jit(jax.jacrev(distillation, argnums=(0, 1)))(LOGITS[:2], FUSED)
    reached = np.array(
        [[np.any(by_logits[term, k]) for k in range(2)] + [np.any(by_fused[term])] for term in range(3)]
    )
    np.testing.assert_array_equal(reached, np.eye(3, dtype=bool))  # every learner, and nobody else


@pytest.mark.parametrize("kd_mode", FFL.choices["kd_mode"])
def test_kd_mode_keeps_its_terms(kd_mode):
    scalars, terms = objectives(LOGITS[:2], FUSED, kd_mode=kd_mode)
    kept = {
        "mkd": ("sub_0", "sub_1", "fused"),
        "ens2fused": ("fused",),
        "fused2sub": ("sub_0", "sub_1"),
        "none": (),
    }[kd_mode]
    kd = {name: value if name in kept else 0.0 for name, value in KD.items()}
    for name, value in kd.items():
        np.testing.assert_allclose(terms[f"distillation/{name}"], value, atol=1e-6)
        np.testing.assert_allclose(terms[f"cross_entropy/{name}"], CE[name], atol=1e-6)
    np.testing.assert_allclose(scalars["loss"], sum(CE.values()) + 0.5 * sum(kd.values()), atol=3e-6)


def test_without_distillation_gradients_are_those_of_cross_entropy():
    def gradient(loss):
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.float32(LOGITS[:2]), jnp.float32(FUSED))

    def cross_entropy(logits, fused):
        terms = objectives(logits, fused)[1]
        return sum(value for name, value in terms.items() if name.startswith("cross_entropy/"))

    expected = gradient(cross_entropy)
    actual = gradient(lambda logits, fused: objectives(logits, fused, kd_mode="none")[0]["loss"])
    chex.assert_trees_all_equal(actual, expected)
    # And these are (softmax - label) / 2.
    softmax = np.exp(FUSED) / np.exp(FUSED).sum(-1, keepdims=True)
    np.testing.assert_allclose(expected[1], (softmax - np.eye(3)[LABELS]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("epoch", "rampup_epochs", "expected"),
    [
        (0.0, 80, 0.006738),
        (0.99, 80, 0.006738),
        (20.5, 80, 0.060055),
        (79.99, 80, 0.999219),
        (80.0, 80, 1.0),
        (300.0, 80, 1.0),
        (0.0, 0, 1.0),
    ],
)
def test_weight_is_constant_within_an_epoch(epoch, rampup_epochs, expected):
    method = make_method(rampup_epochs=rampup_epochs)
    outputs = {"logits": jnp.float32(LOGITS[:2]), "fused_logits": jnp.float32(FUSED)}
    scalars, terms = method.objectives(outputs, jnp.asarray(LABELS), jnp.float32(epoch))
    np.testing.assert_allclose(terms["distillation_weight"], expected, atol=6e-7)
    loss = sum(CE.values()) + expected * sum(KD.values())
    np.testing.assert_allclose(scalars["loss"], loss, atol=3e-6)


def test_temperature_and_smoothing_reach_the_loss():
    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    _, terms = objectives(LOGITS[:2], FUSED, temperature=2.0, smoothing=1e-2)
    q = softmax(FUSED / 2) + 1e-2
    expected = 4 * (q * (np.log(q) - np.log(softmax(LOGITS[0] / 2)))).sum(-1).mean()
    np.testing.assert_allclose(terms["distillation/sub_0"], expected, rtol=1e-5)
    q = softmax(LOGITS[:2].mean(0) / 2) + 1e-2
    expected = 4 * (q * (np.log(q) - np.log(softmax(FUSED / 2)))).sum(-1).mean()
    np.testing.assert_allclose(terms["distillation/fused"], expected, rtol=1e-5)


def test_predictions():
    method = make_method(3)
    predictions = method.predictions({"logits": jnp.float32(LOGITS), "fused_logits": jnp.float32(FUSED)})
    expected = {"sub_0": LOGITS[0], "sub_1": LOGITS[1], "sub_2": LOGITS[2], "fused": FUSED}
    expected["ensemble"] = (LOGITS[0] + LOGITS[1] + LOGITS[2]) / 3  # of logits, not of probabilities
    assert list(predictions) == ["sub_0", "sub_1", "sub_2", "ensemble", "fused"]
    chex.assert_trees_all_close(predictions, expected, rtol=1e-6)
    assert method.headline in predictions


def test_unknown_kd_mode():
    with pytest.raises(ConfigError, match=r"kd_mode must be one of mkd, .*'both'"):
        make_method(kd_mode="both").check()


def test_unknown_hyper_parameter():
    config = digits.get_config()
    with config.unlocked():
        config.method.temprature = 2.0
    with pytest.raises(ConfigError, match=r"temprature.*temperature"):
        build(config, 10)


def draw(method, images):
    variables = draw_variables(method, images)
    return variables["params"], variables["batch_stats"]


def loss_and_terms(method, params, statistics, images, labels):
    outputs, _ = method.apply(
        {"params": params, "batch_stats": statistics}, images, train=True, mutable=["batch_stats"]
    )
    scalars, terms = method.objectives(outputs, labels, jnp.float32(0))
    return scalars, logged(terms)


def make_batch(classes, side=8, count=6):
    rng = np.random.default_rng(1)
    return jnp.float32(rng.normal(size=(count, side, side, 3))), jnp.asarray(rng.integers(0, classes, count))


KINDS = {
    "trunk of two, vmapped": {"num": 2, "shared_stages": 2, "vectorize": True},
    "trunk of three": {"num": 3, "shared_stages": 2},
    "separate": {"num": 2, "shared_stages": 0},
    "mixed": {"num": 2, "shared_stages": 0, "network": "resnet8+resnet14"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_which_gradient_reaches_what(kind):
    """Losses of a sub-network move its own path; those of the fused classifier all but the heads."""
    num = KINDS[kind]["num"]
    method = make_method(**KINDS[kind])
    images, labels = make_batch(3)
    params, statistics = draw(method, images)

    learners = [*method.subnetwork_names(), "fused"]
    names = [f"{kind}/{learner}" for kind in ("cross_entropy", "distillation") for learner in learners]

    def terms(params):
        _, terms = loss_and_terms(method, params, statistics, images, labels)
        return {name: terms[name] for name in names}

    for term, gradient in term_gradients(terms, params).items():
        learner = term.split("/")[1]
        k = learner.removeprefix("sub_")
        own = ("trunk", f"head_{k}", f"stages_{k}")
        if learner == "fused":
            own = ("trunk", "fusion", *(f"stages_{k}" for k in range(num)))
        check_reach(gradient, num, own, term)


def test_order_of_the_subnetworks_does_not_matter():
    """Branches permuted, and the fusion module's channels with them, give the same loss and gradients."""
    order = np.array([2, 0, 1])
    method = make_method(3)
    images, labels = make_batch(3)
    params, statistics = draw(method, images)
    channels = (64 * order[:, None] + np.arange(64)).ravel()

    def permute(tree):
        fusion = dict(tree["fusion"])
        for name, axis in (("depthwise_conv", 3), ("depthwise_norm", 0), ("pointwise_conv", 2)):
            if name in fusion:  # among statistics, norms only
                fusion[name] = jax.tree.map(
                    functools.partial(jnp.take, indices=channels, axis=axis), fusion[name]
                )
        branches = jax.tree.map(lambda leaf: leaf[order], tree["subnetworks"]["branches"])
        return {"fusion": fusion, "subnetworks": {**tree["subnetworks"], "branches": branches}}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def evaluate(params, statistics):
        scalars, terms = loss_and_terms(method, params, statistics, images, labels)
        return scalars["loss"], terms

    (loss, terms), gradients = evaluate(params, statistics)
    (permuted_loss, permuted), permuted_gradients = evaluate(permute(params), permute(statistics))
    np.testing.assert_allclose(permuted_loss, loss, rtol=1e-5)
    for new, old in enumerate(order):
        for kind in ("cross_entropy", "distillation"):
            np.testing.assert_allclose(permuted[f"{kind}/sub_{new}"], terms[f"{kind}/sub_{old}"], rtol=1e-4)
    chex.assert_trees_all_close(permuted_gradients, permute(gradients), rtol=1e-3, atol=1e-4)
    assert abs(terms["cross_entropy/sub_0"] / terms["cross_entropy/sub_2"] - 1) > 1e-2


def test_cross_entropy_of_a_new_network_is_that_of_guessing():
    """log(100) = 4.605 for each classifier; a fused one far above is initialised wrongly."""
    method = make_method(2, "resnet20", 100)
    images, labels = make_batch(100, side=16, count=32)
    params, statistics = jax.jit(functools.partial(steps.init_variables, method, image_shape=(16, 16, 3)))(
        jax.random.key(0)
    )
    evaluate = jax.jit(functools.partial(loss_and_terms, method))
    scalars, terms = evaluate(params, statistics["batch_stats"], images, labels)
    for name in ("sub_0", "sub_1", "fused"):
        assert abs(terms[f"cross_entropy/{name}"] - 4.605) < 0.5, name
    kd = sum(value for name, value in terms.items() if name.startswith("distillation/"))
    expected = (
        sum(value for name, value in terms.items() if name.startswith("cross_entropy/")) + 0.006738 * kd
    )
    np.testing.assert_allclose(scalars["loss"], expected, rtol=1e-5)


def test_overfits_a_few_images():
    """64 digits, no augmentation, a constant learning rate: every classifier learns all of them."""
    data = datasets.load_digits()
    images = np.repeat((data.images[:64, ..., None] / 16 - 0.3) / 0.4, 3, axis=-1)
    batch = {"image": jnp.float32(images), "label": jnp.int32(data.target[:64])}
    method = make_method(2, classes=10, rampup_epochs=10)
    config = digits.get_config()
    config.optimizer.schedule = "constant"

    params, _ = jax.eval_shape(
        functools.partial(steps.init_variables, method, image_shape=(8, 8, 3)), jax.random.key(0)
    )
    transformations = optimizers.make_optimizers(
        method.trains, params, config.optimizer, config.optimizer_rules, 1, 100
    )
    state = jax.jit(functools.partial(steps.create_state, method, transformations, image_shape=(8, 8, 3)))(
        jax.random.key(0)
    )
    train_step = jax.jit(
        functools.partial(steps.train_step, method=method, optimizers=transformations, steps_per_epoch=1)
    )
    evaluate = jax.jit(functools.partial(steps.eval_step, method=method))

    def accuracies(state):
        variables = {"params": state.params, **state.model_state}
        sums = jax.device_get(evaluate(variables, batch | {"weight": jnp.ones(64)}))
        return {name: metrics.classification_scores(one)["top1"] for name, one in sums["predictions"].items()}

    before = accuracies(state)
    assert all(before[name] < 0.5 for name in ("sub_0", "sub_1", "fused"))
    for _ in range(20):
        for _ in range(5):
            state = train_step(state, batch)
        after = accuracies(state)
        if all(after[name] == 1 for name in ("sub_0", "sub_1", "fused")):
            break
    assert after == dict.fromkeys(("sub_0", "sub_1", "ensemble", "fused"), 1.0)
    assert state.record["finite_steps"] == state.step == state.record["steps"]
