"""AFD: its losses and discriminators against NumPy float64, the way of every gradient, and whole steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables
from reference import check_reach, cross_entropy, first_state, kl_divergence, softmax, term_gradients

from configs import common
from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS, build
from ffl_jax.methods.afd import Discriminator, Transfer
from ffl_jax.methods.base import logged
from ffl_jax.methods.subnetworks import build as build_subnetworks

AFD = METHODS["afd"]

LOGITS = np.array([[[2, 1, 0], [0, 0.5, 1.5]], [[1, 3, -1], [1, 0, 2]], [[0, 0, 2], [-1, 1, 0]]], float)
LABELS = np.array([0, 2])


def make_method(network="tiny", num=2, classes=3, shared_stages=0, vectorize=False, **settings):
    return AFD(build_subnetworks(network, num, classes, shared_stages, vectorize), classes, **settings)


def objectives(logits, scores=(0.5, 0.5, 0.5), **settings):
    """Of the real, fake and adversarial scores, which broadcast to [K, B, P]; in float64 where it is on."""
    num, batch, _ = logits.shape
    names = ("real_scores", "fake_scores", "adversarial_scores")
    outputs = {
        name: jnp.broadcast_to(jnp.asarray(value), (num, batch, 1))
        for name, value in zip(names, scores, strict=True)
    }
    outputs |= {"logits": jnp.asarray(logits), "similarity": jnp.full((num, batch), 0.25)}
    method = make_method(num=num, **settings)
    scalars, terms = method.objectives(outputs, jnp.asarray(LABELS), jnp.float32(7))
    return scalars, logged(terms)


def logit_losses_in_numpy(logits):
    """(cross-entropy, KL at temperature 3 from the network before) of each network, in float64."""
    ce = cross_entropy(logits, LABELS).mean(-1)
    return ce, kl_divergence(logits, np.roll(logits, 1, axis=0), 3.0).mean(-1)


def test_losses_of_two():
    scores = np.zeros((3, 2, 2, 1))
    scores[:2, 0, :, 0] = [[0.8, 0.6], [0.3, 0.1]]
    scores[2, 0, :, 0] = scores[1, 0, :, 0]
    scores[:, 1] = 0.5
    with jax.enable_x64(True):
        scalars, terms = objectives(LOGITS[:2], scores)
    # The order of the steps.
    assert list(scalars) == list(AFD.trains) == ["logit", "feature", "discriminator"]
    scalars, terms = jax.device_get((scalars, terms))
    ce, kd = logit_losses_in_numpy(LOGITS[:2])
    np.testing.assert_allclose([ce, kd], [(0.435987, 1.275269), (0.633755, 0.615115)], atol=5e-7)  # rounded
    expected = {
        "cross_entropy": ce,
        "distillation": kd,
        # By hand.
        "adversarial": (0.65, 0.25),
        "discrimination": (0.15, 0.5),
        "real_score": (0.7, 0.5),
        "fake_score": (0.2, 0.5),
        "similarity": (0.25, 0.25),
    }
    expected = {
        f"{term}/sub_{k}": value for term, values in expected.items() for k, value in enumerate(values)
    }
    chex.assert_trees_all_close(terms, expected, rtol=1e-12, atol=0)
    expected = {"logit": ce.sum() + kd.sum(), "feature": 0.9, "discriminator": 0.65}
    chex.assert_trees_all_close(scalars, expected, rtol=1e-12, atol=0)


def test_three_learn_in_a_cycle():
    def logit_losses(logits):
        with jax.enable_x64(True):
            _, terms = jax.device_get(objectives(logits))
        return [terms[f"cross_entropy/sub_{k}"] + terms[f"distillation/sub_{k}"] for k in range(3)]

    expected = sum(logit_losses_in_numpy(LOGITS))
    np.testing.assert_allclose(expected, [1.408084, 1.890384, 3.677643], atol=5e-7)  # rounded
    np.testing.assert_allclose(logit_losses(LOGITS), expected, rtol=1e-12)
    rolled = np.roll(LOGITS, 1, axis=0)
    np.testing.assert_allclose(logit_losses(rolled), np.roll(expected, 1), rtol=1e-12)


def test_gradients_of_the_logit_losses():
    def losses(logits):
        _, terms = objectives(logits)
        return jnp.stack([terms[f"cross_entropy/sub_{k}"] + terms[f"distillation/sub_{k}"] for k in range(3)])

    gradients = jax.jit(jax.jacrev(losses))(jnp.float32(LOGITS))
    for learner, of in np.ndindex(3, 3):
        assert np.any(gradients[learner, of]) == (learner == of)
    # With two networks the first learns from the second.
    first, second = LOGITS[:2]
    expected = softmax(first) - np.eye(3)[LABELS] + 3 * (softmax(first / 3) - softmax(second / 3))
    expected /= 2
    rounded = [[0.071900, -0.239765, 0.167865], [-0.020224, 0.232920, -0.212696]]
    np.testing.assert_allclose(expected, rounded, atol=5e-7)
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda logits: objectives(logits)[0]["logit"]))(jnp.asarray(LOGITS[:2]))
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-12, atol=1e-15)


def test_temperature():
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in LOGITS[[1, 0]])
    expected = 4 * (p * np.log(p / q)).sum(-1).mean()
    _, terms = objectives(LOGITS[:2], temperature=2.0)
    np.testing.assert_allclose(terms["distillation/sub_0"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("score", "output", "feature", "fake"),  # NumPy, float64
    [(0.7, 0.668188, -0.147134, 0.296292), (-1.2, 0.231475, -0.273433, 0.082356), (0.0, 0.5, -0.25, 0.25)],
)
def test_gradients_of_the_adversarial_losses(score, output, feature, fake):
    """By the discriminator's last bias, which is the score before the sigmoid where its kernel is 0."""
    discriminator = Discriminator("image", 0.01)
    variables = draw_variables(discriminator, jnp.ones((1, 4, 4, 2)))
    kernel = jnp.zeros_like(variables["params"]["conv2"]["kernel"])

    def losses(bias):
        params = variables["params"] | {"conv2": {"kernel": kernel, "bias": bias[None]}}
        value = discriminator.apply(variables | {"params": params}, jnp.ones((1, 4, 4, 2)), False)
        scalars, terms = objectives(LOGITS[:2], (0.5, value, value))
        return jnp.array([scalars["feature"], scalars["discriminator"]]) / 2, terms["fake_score/sub_0"]

    gradients, actual = jax.jit(jax.jacrev(losses, has_aux=True))(jnp.float32(score))
    np.testing.assert_allclose(actual, output, atol=1e-6)
    np.testing.assert_allclose(gradients, [feature, fake], atol=1e-6)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("kind", "shape", "parameters", "scores"),
    [
        ("image", (8, 8, 64), 19009, 1),  # 9 C C/2 + C + h^2 C/2 + 1 with h = ceil(H / 2)
        ("image", (8, 8, 128), 74881, 1),
        ("image", (7, 7, 512), 1184257, 1),
        ("image", (1, 1, 64), 9 * 64 * 32 + 64 + 32 + 1, 1),
        ("image", (4, 6, 64), 9 * 64 * 32 + 64 + 2 * 3 * 32 + 1, 1),
        ("patch", (8, 8, 64), 8417, 9),  # 4 C C/2 + C/2 + C + 4 C/2 + 1
        ("patch", (4, 4, 512), 526081, 1),
    ],
)
def test_sizes_of_the_discriminator(kind, shape, parameters, scores):
    initialise = functools.partial(Discriminator(kind, 0.01).init_with_output, train=False)
    outputs, variables = jax.eval_shape(initialise, jax.random.key(0), jnp.zeros((2, *shape)))
    assert count(variables["params"]) == parameters
    assert outputs.shape == (2, scores)


def test_sizes_of_the_method():
    def sizes(network, num):
        initialise = functools.partial(make_method(network, num, 100).init, train=False)
        params = jax.eval_shape(initialise, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
        return {name: count(tree) for name, tree in params.items() if name != "subnetworks"}

    assert sizes("resnet20", 3) == {f"discriminators_{k}": 19009 for k in range(3)}
    # 64 and 256 channels: only the narrow one has a transfer layer, of 64 * 256 + 2 * 256.
    both = {"discriminators_0": 297217, "discriminators_1": 297217}
    assert sizes("resnet20+resnet110_bottleneck", 2) == both | {"transfers_0": 16896}
    transfer = jax.eval_shape(
        lambda key, x: Transfer().init(key, x, 128, False), jax.random.key(0), jnp.zeros((1, 8, 8, 64))
    )
    assert count(transfer["params"]) == 8448


@jax.jit
def score_for_inference(variables, x):
    return Discriminator("image", 0.01).apply(variables, x, False)


def test_discriminator_of_a_constant_map():
    """Shows padding, the norm's eps and the layout. NumPy, float64; the score before the sigmoid 0.840274."""
    variables = fresh_discriminator(np.full((3, 3, 64, 32), 1 / 576), bias=0.0)
    score = score_for_inference(variables, jnp.ones((1, 8, 8, 64)))
    np.testing.assert_allclose(score, [[0.698523]], atol=1e-6)


def test_discriminator_of_a_ramp():
    """ "SAME" padding would give a score of 1.458880 in place of 2.377332 before the sigmoid."""
    rows, columns = np.ogrid[:3, :3]
    kernel = np.broadcast_to((3 * rows + columns - 4)[..., None, None] / 64, (3, 3, 64, 32))
    image = np.broadcast_to(np.arange(64).reshape(1, 8, 8, 1) / 64, (1, 8, 8, 64))
    score = score_for_inference(fresh_discriminator(kernel, 0.1), jnp.float32(image))
    np.testing.assert_allclose(score, [[0.915082]], atol=1e-6)  # NumPy, float64


def fresh_discriminator(kernel, bias):
    """Variables of a discriminator of 8x8 maps with this first convolution and a mean as the second."""
    params = {
        "conv1": {"kernel": jnp.float32(kernel)},
        "norm": {"scale": jnp.ones(32), "bias": jnp.zeros(32)},
        "conv2": {"kernel": jnp.full((4, 4, 32, 1), 1 / 512), "bias": jnp.full(1, bias)},
    }
    return {"params": params, "batch_stats": {"norm": {"mean": jnp.zeros(32), "var": jnp.ones(32)}}}


# A second implementation, NumPy float64.


def convolve(x, layer, stride=1, padding=0):
    kernel = np.asarray(layer["kernel"])
    size = kernel.shape[:2]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((x.shape[axis + 1] - size[axis]) // stride + 1 for axis in (0, 1))
    y = np.zeros((len(x), height, width, kernel.shape[-1]))
    for i, j in np.ndindex(height, width):
        window = x[:, stride * i : stride * i + size[0], stride * j : stride * j + size[1]]
        y[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    return y + np.asarray(layer.get("bias", 0))


def normalise(x, layer, statistics):
    """With the batch's statistics; returns the new running ones too."""
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    y = (x - mean) / np.sqrt(var + 1e-5) * np.asarray(layer["scale"]) + np.asarray(layer["bias"])
    old = jax.tree.map(np.asarray, statistics)
    return y, {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}


def discriminate(x, params, statistics, kind, slope=0.01):
    """Scores [B, P] and the new statistics of a discriminator in training."""
    x = convolve(x, params["conv1"], *((1, 0) if kind == "patch" else (2, 1)))
    x, statistics = normalise(x, params["norm"], statistics)
    x = convolve(np.where(x > 0, x, slope * x), params["conv2"], 2 if kind == "patch" else 1)
    return 1 / (1 + np.exp(-x.reshape(len(x), -1))), statistics


def make_batch(side=8, count=6, classes=3):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(count, side, side, 3))), jnp.asarray(rng.integers(0, classes, count))


@pytest.mark.parametrize(("kind", "side"), [("image", 8), ("patch", 16)])
def test_everything_that_a_training_pass_computes(kind, side):
    """Three networks; the second is wider and ends at a larger map: 24 channels against 16."""
    with jax.enable_x64(True):
        images, labels = make_batch(side)
        method = make_method("tiny+tiny_wide+tiny", 3, discriminator=kind, slope=0.2)
        variables = draw_variables(method, images)

        @jax.jit
        def run(variables):
            outputs, state = method.apply(variables, images, True, mutable=["batch_stats"])
            own = {name: tree["subnetworks"] for name, tree in variables.items()}
            peers, _ = method.subnetworks.apply(own, images, True, mutable=["batch_stats"])
            return outputs, state, peers, method.objectives(outputs, labels, 0.0)

        outputs, state, peers, (scalars, terms) = jax.device_get(run(variables))
    terms = logged(terms)
    params, statistics = variables["params"], variables["batch_stats"]
    maps = [peer.feature_map for peer in peers]
    maps[1] = (sum(maps[1][:, i::2, j::2] for i, j in np.ndindex(2, 2))) / 4
    assert maps[0].shape == (6, side // 4, side // 4, 16)
    assert maps[1].shape == (6, side // 4, side // 4, 24)
    for k in (0, 2):
        x = convolve(maps[k], params[f"transfers_{k}"]["conv"])
        x, new = normalise(x, params[f"transfers_{k}"]["norm"], statistics[f"transfers_{k}"]["norm"])
        maps[k] = np.maximum(x, 0)
        chex.assert_trees_all_close(state["batch_stats"][f"transfers_{k}"]["norm"], new, rtol=1e-10)

    expected = {"feature": 0.0, "discriminator": 0.0}
    for k in range(3):
        name = f"discriminators_{k}"
        real, new = discriminate(maps[k - 1], params[name], statistics[name]["norm"], kind, 0.2)
        # The running statistics meet the real batch, then the fake one, and not that of the networks' loss.
        fake, new = discriminate(maps[k], params[name], new, kind, 0.2)
        chex.assert_trees_all_close(state["batch_stats"][name]["norm"], new, rtol=1e-10)
        np.testing.assert_allclose(outputs["real_scores"][k], real, rtol=1e-10)
        np.testing.assert_allclose(outputs["fake_scores"][k], fake, rtol=1e-10)
        np.testing.assert_allclose(outputs["adversarial_scores"][k], fake, rtol=1e-10)
        assert abs(real - fake).min() > 1e-4
        flat, before = (x.reshape(6, -1) for x in (maps[k], maps[k - 1]))
        cosine = (flat * before).sum(-1) / np.linalg.norm(flat, axis=-1) / np.linalg.norm(before, axis=-1)
        np.testing.assert_allclose(terms[f"similarity/sub_{k}"], cosine.mean(), rtol=1e-10)
        np.testing.assert_allclose(terms[f"real_score/sub_{k}"], real.mean(), rtol=1e-10)
        expected["feature"] += ((1 - fake) ** 2).mean()
        expected["discriminator"] += ((1 - real) ** 2).mean() + (fake**2).mean()
    for name, value in expected.items():
        np.testing.assert_allclose(scalars[name], value, rtol=1e-10)


def test_losses_take_the_mean_over_patches():
    """14x14 maps: a score for every one of 6x6 patches."""
    method = make_method(discriminator="patch")
    images = jnp.zeros((2, 56, 56, 3))
    variables = jax.eval_shape(functools.partial(method.init, train=False), jax.random.key(0), images)
    outputs = jax.eval_shape(functools.partial(method.apply, train=False), variables, images)
    assert outputs["real_scores"].shape == (2, 2, 36)
    scores = np.broadcast_to(np.linspace(0, 1, 36), (2, 2, 36))
    outputs = {name: jnp.asarray(scores) for name in outputs if name.endswith("scores")}
    outputs |= {"logits": jnp.asarray(LOGITS[:2]), "similarity": jnp.zeros((2, 2))}
    scalars, _ = method.objectives(outputs, jnp.asarray(LABELS), jnp.float32(0))
    # Two networks; mean x^2 = mean (1 - x)^2.
    mean = (np.linspace(0, 1, 36) ** 2).mean()
    np.testing.assert_allclose(scalars["feature"], 2 * mean, rtol=1e-5)
    np.testing.assert_allclose(scalars["discriminator"], 4 * mean, rtol=1e-5)


KINDS = {
    "trunk of three, vmapped": {"num": 3, "shared_stages": 1, "vectorize": True},
    "mixed": {"network": "tiny+tiny_wide", "num": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_which_gradient_reaches_what(kind):
    num = KINDS[kind]["num"]
    method = make_method(**KINDS[kind])
    images, labels = make_batch()
    variables = draw_variables(method, images)
    names = [
        f"{term}/sub_{k}"
        for term in ("cross_entropy", "distillation", "adversarial", "discrimination")
        for k in range(num)
    ]

    def terms(params):
        outputs, _ = method.apply(variables | {"params": params}, images, True, mutable=["batch_stats"])
        terms = logged(method.objectives(outputs, labels, jnp.float32(0))[1])
        return {name: terms[name] for name in names}

    for name, gradient in term_gradients(terms, variables["params"]).items():
        term, learner = name.split("/")
        k = learner.removeprefix("sub_")
        own = {
            "adversarial": (f"stages_{k}", f"transfers_{k}", "trunk"),
            "discrimination": (f"discriminators_{k}",),
        }.get(term, (f"stages_{k}", f"head_{k}", "trunk"))
        check_reach(gradient, num, own, name)


def adam_step(weight, gradient, moments, step, rate, decay):
    """(weight, moments) after an Adam step, the decay added to the gradient as in PyTorch. NumPy, float64."""
    gradient = gradient + decay * weight
    first = 0.9 * moments[0] + 0.1 * gradient
    second = 0.999 * moments[1] + 0.001 * gradient**2
    scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
    return weight - rate * first / (1 - 0.9**step) / scale, (first, second)


def test_two_whole_steps():
    """SGD, then Adam for the bodies, then Adam for the discriminators, by the published recipe's settings."""
    # A figure of its own, NumPy in float64: a weight of 1 after gradients 0.05 and -0.02.
    weight, moments = adam_step(1.0, 0.05, (0.0, 0.0), 1, 2e-5, 0.1)
    np.testing.assert_allclose(adam_step(weight, -0.02, moments, 2, 2e-5, 0.1)[0], 0.9999611705, atol=1e-10)

    config = common.get_config("method=afd,network=tiny", "cifar100")
    config.subnetworks.network = "tiny+tiny_wide"
    with jax.enable_x64(True):
        method = build(config, 3)
        images, labels = make_batch()
        batch = {"image": images, "label": labels}
        variables = draw_variables(method, images)
        params = variables["params"]
        model_state = {"batch_stats": variables["batch_stats"]}
        state, run = first_state(method, config, params, model_state)
        run = jax.jit(run)

        @jax.jit
        @jax.grad
        def gradient(params, statistics, weights):
            outputs, _ = method.apply(
                {"params": params, "batch_stats": statistics}, images, True, mutable=["batch_stats"]
            )
            losses = method.objectives(outputs, labels, jnp.float32(0))[0]
            return sum(weights[name] * loss for name, loss in losses.items())

        expected = {path_of(path): np.array(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
        momentum = {path: 0.0 for path in expected}
        moments = {path: (0.0, 0.0) for path in expected}
        for step in (1, 2):
            slopes = {}
            for name in method.trains:
                weights = {other: float(other == name) for other in method.trains}
                tree = gradient(state.params, state.model_state["batch_stats"], weights)
                slopes[name] = {
                    path_of(path): np.array(leaf) for path, leaf in jax.tree.leaves_with_path(tree)
                }
            state = run(state, batch)
            for path, old in expected.items():
                new = old
                if path.startswith("subnetworks/"):
                    momentum[path] = 0.9 * momentum[path] + slopes["logit"][path] + 1e-4 * old
                    new = new - 0.1 * momentum[path]
                if "/head/" not in path:
                    objective = "discriminator" if path.startswith("discriminators_") else "feature"
                    # At the parameters before the step, as the gradients are.
                    moved, moments[path] = adam_step(
                        old, slopes[objective][path], moments[path], step, 2e-5, 0.1
                    )
                    new = new + (moved - old)
                expected[path] = new
            actual = {path_of(path): np.array(leaf) for path, leaf in jax.tree.leaves_with_path(state.params)}
            # An Adam step moves a weight by about 2e-5.
            chex.assert_trees_all_close(actual, expected, atol=1e-10, rtol=0)
    kinds = {path.split("/")[0] for path in expected}
    assert kinds == {"subnetworks", "transfers_0", "discriminators_0", "discriminators_1"}


def path_of(keys):
    return "/".join(key.key for key in keys)


def test_equal_networks_have_nothing_to_learn_from_one_another():
    """No divergence, maps that are the same; and no discriminator can then do better than 0.5 for each."""
    method = make_method()
    images, labels = make_batch()
    variables = draw_variables(method, images)

    def equal(tree):
        branches = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 2), tree["subnetworks"]["branches"])
        return tree | {"subnetworks": {"branches": branches}, "discriminators_1": tree["discriminators_0"]}

    @jax.jit
    def run(variables):
        outputs, _ = method.apply(variables, images, True, mutable=["batch_stats"])
        return logged(method.objectives(outputs, labels, jnp.float32(0))[1])

    terms = run({kind: equal(tree) for kind, tree in variables.items()})
    for k in range(2):
        np.testing.assert_allclose(terms[f"distillation/sub_{k}"], 0.0, atol=1e-6)
        np.testing.assert_allclose(terms[f"similarity/sub_{k}"], 1.0, rtol=1e-6)
        assert terms[f"discrimination/sub_{k}"] >= 0.5
    assert terms["adversarial/sub_0"] == terms["adversarial/sub_1"] != 0
    terms = run(variables)
    assert all(terms[f"similarity/sub_{k}"] < 0.99 for k in range(2))
    assert all(terms[f"distillation/sub_{k}"] > 1e-4 for k in range(2))


def test_dead_networks_give_finite_numbers():
    """Maps of zeros: no cosine is 0 / 0."""
    method = make_method()
    images, labels = make_batch()
    variables = jax.tree.map(jnp.zeros_like, draw_variables(method, images))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        outputs, _ = method.apply(variables | {"params": params}, images, True, mutable=["batch_stats"])
        scalars, terms = method.objectives(outputs, labels, jnp.float32(0))
        return sum(scalars.values()), logged(terms)

    (_, terms), gradient = run(variables["params"])
    chex.assert_tree_all_finite((terms, gradient))
    assert terms["similarity/sub_0"] == 0
    assert terms["fake_score/sub_0"] == 0.5


def test_recipe():
    config = common.get_config("method=afd,network=resnet32", "cifar100")
    assert (config.epochs, config.batch_size, config.optimizer.nesterov) == (300, 128, False)
    assert config.optimizer.decay_epochs == (150, 225)
    assert config.optimizer.weight_decay == 1e-4
    assert config.subnetworks.shared_stages == 0
    adam = {"name": "adam", "learning_rate": 2e-5, "weight_decay": 0.1, "decay_epochs": (75, 150)}
    assert config.optimizer_rules == (("(feature|discriminator)/.*", adam),)
    # 200 epochs as in the reimplementation's shorter run: the same fractions.
    config = common.get_config("method=afd,network=resnet32,epochs=200", "cifar100")
    assert config.optimizer.decay_epochs == (100, 150)
    assert config.optimizer_rules[0][1]["decay_epochs"] == (50, 100)
    config = common.get_config("method=afd,network=resnet18+resnet34", "imagenet")
    assert (config.epochs, config.optimizer_rules[0][1]["decay_epochs"]) == (90, (22, 45))


def test_impossible_settings():
    with pytest.raises(ConfigError, match=r"discriminator must be one of image, patch, got 'pixel'"):
        make_method(discriminator="pixel").check()
    with pytest.raises(ConfigError, match="at least 2 sub-network"):
        make_method(num=1).check()
    method = make_method(discriminator="patch")
    with pytest.raises(ConfigError, match=r"3x3 or more, got 2x2: set config.method.discriminator=image"):
        jax.eval_shape(
            functools.partial(method.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 3))
        )
