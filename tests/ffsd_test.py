"""FFSD: its losses in NumPy, the way of every gradient, and its step against one network after another."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Tiny, draw_variables
from reference import term_gradients

from configs import common
from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.losses import unit
from ffl_jax.methods.base import logged
from ffl_jax.methods.ffsd import Decoder, TransFusionHead, attention, distance, shift
from ffl_jax.methods.modules import FusionModule
from ffl_jax.methods.subnetworks import Stacked, build
from ffl_jax.training import config as config_lib
from ffl_jax.training import optimizers, steps

FFSD = methods.METHODS["ffsd"]

# Two maps of 3x3 pixels and 2 channels each.
X = np.array([1.0, 0, 2, 1, 0, 1, 1, 1, 3, 0, 0, 2, 1, 2, 2, 2, 0, 0]).reshape(1, 3, 3, 2)
Y = np.array([2.0, 0, 0, 1, 1, 1, 3, 1, 0, 0, 1, 0, 2, 2, 1, 3, 0, 2]).reshape(1, 3, 3, 2)


class Small(Tiny):
    """Two stages, of 4 and 8 channels."""

    num_stages = 2


def make_method(num=3, classes=3, vectorize=False, **settings):
    return FFSD(Stacked(Small(classes), num, 0, vectorize), classes, **settings)


# Attention, distance, shift.


def test_attention_by_hand():
    for x, expected, norm in (
        (X, [0.5, 2.5, 0.5, 1, 4.5, 2, 2.5, 4, 0], 7.365460),
        (Y, [2, 0.5, 1, 5, 0, 0.5, 4, 5, 2], 8.689074),
    ):
        expected = np.reshape(expected, (1, 3, 3))
        np.testing.assert_allclose(attention(jnp.float32(x)), expected)
        np.testing.assert_allclose(unit(attention(jnp.float32(x))), expected / norm, rtol=1e-6)


def test_distance():
    # 300**2 is infinite in float16, and of each example the norm is another.
    for one, other in ((jnp.float32(X), jnp.float32(Y)), (jnp.float16(300 * X), jnp.float16(300 * Y))):
        x, y = jnp.concatenate([one, other]), jnp.concatenate([other, 7 * other])
        assert attention(x).dtype == distance(x, y).dtype == jnp.float32
        # NumPy, float64.
        np.testing.assert_allclose(distance(attention(x), attention(y)), [0.087672, 0], atol=1e-6)
        np.testing.assert_allclose(distance(x, y), [0.045781, 0], atol=1e-6)


def test_distance_of_an_empty_map():
    @jax.jit
    def run(x, y):
        by_map = jax.value_and_grad(lambda x: distance(x, y).sum())(x)
        return by_map, jax.grad(lambda x: distance(attention(x), attention(y)).sum())(x)

    (value, gradient), by_attention = run(jnp.zeros(Y.shape), jnp.float32(Y))
    np.testing.assert_allclose(value, 1 / 18, rtol=1e-6)  # the mean square of 18 entries of norm 1
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(by_attention, np.zeros(Y.shape))


def test_shift():
    target, shifted = jax.jit(shift)(jnp.float32(Y))
    # NumPy, float64: the threshold, 0.5 / 8.689074, is met twice.
    expected = [8.458899, 4.344537, 8.573987, 8.113638, 0, 4.344537, 8.228725, 8.113638, 8.458899]
    np.testing.assert_allclose(target, np.reshape(expected, (1, 3, 3)), atol=2e-6)
    expected = [
        *(37.75, 35.75, 18.625, 19.625, 37.75, 37.75, 35.75, 33.75, 0, 0),
        *(19.625, 18.625, 35.75, 35.75, 33.75, 35.75, 35.75, 37.75),
    ]
    np.testing.assert_allclose(shifted, np.reshape(expected, Y.shape), atol=2e-5)
    target, shifted = jax.jit(shift)(jnp.ones(Y.shape))  # all at the threshold: by hand
    np.testing.assert_allclose(target, np.full((1, 3, 3), 1.5), rtol=1e-6)
    np.testing.assert_allclose(shifted, np.full(Y.shape, 2.75), rtol=1e-6)


@pytest.mark.parametrize(("count", "smallest"), [(64, 21), (49, 16), (4, 1), (2, 1), (1, 1)])
def test_a_third_of_the_pixels_stays(count, smallest):
    values = np.random.default_rng(0).permutation(count) + 1.0
    target, _ = jax.jit(shift)(jnp.sqrt(jnp.float32(values)).reshape(1, 1, count, 1))
    norm = np.sqrt((values**2).sum())
    expected = np.where(values < smallest, values / norm, norm - values / norm)
    expected[values == smallest] = norm / 2
    np.testing.assert_allclose(target[0, 0], expected, rtol=1e-5)


# NumPy, float64.
@pytest.mark.parametrize(
    ("shift_ref", "expected"), [("code", 47.835595), ("unit", 0.260187), ("max", 0.121119)]
)
def test_reference_of_the_shift(shift_ref, expected):
    @jax.jit
    def run(x, y):
        return jnp.square(unit(attention(x)) - shift(y, shift_ref)[0]).mean()

    np.testing.assert_allclose(run(jnp.float32(X), jnp.float32(Y)), expected, rtol=4e-6)


# The terms, written out for NumPy and for JAX.


def a(x):
    return (x**2).mean(-1)


def n(x):
    x = x.reshape(len(x), -1)
    return x / ((x**2).sum(1) ** 0.5)[:, None]


def al(x, y):
    return ((n(x) - n(y)) ** 2).mean()


def draw_outputs(num=4, batch=2, classes=3):
    """What a method of `num` sub-networks of three stages might return, in float64."""
    rng = np.random.default_rng(0)

    def maps(count, stages=3):
        shapes = [(batch, 6, 6, 2), (batch, 6, 6, 3), (batch, 3, 3, 4)]
        return [tuple(rng.normal(size=shape) for shape in shapes[:stages]) for _ in range(count)]

    logits = rng.normal(size=(num, batch, classes))
    return {
        "logits": logits,
        "ensemble_logits": logits[:-1].mean(0),
        "fused_logits": rng.normal(size=(batch, classes)),
        "feature_maps": maps(num),
        "fused_map": rng.normal(size=(batch, 3, 3, 4)),
        "shifted": [rng.uniform(0, 3, (batch, 3, 3)) for _ in range(num - 2)],
        "imitated": maps(num - 1, stages=2),
        "decoded": maps(num - 1, stages=2),
        "widened_map": rng.normal(size=(batch, 3, 3, 4 * (num - 1))),
    }


def reference_terms(outputs, labels, temperature):
    """All terms in NumPy, for one network after another."""

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    def kl(learner, teacher):
        p, q = log_softmax(learner / temperature), log_softmax(teacher / temperature)
        return temperature**2 * (np.exp(q) * (q - p)).sum(1).mean()

    (*students, leader), fused = outputs["logits"], outputs["fused_logits"]
    names = [*(f"sub_{k}" for k in range(len(students))), "leader"]
    terms = {}
    for name, z in zip([*names, "fused"], [*students, leader, fused], strict=True):
        terms[f"cross_entropy/{name}"] = -np.mean(log_softmax(z)[np.arange(len(labels)), labels])
    for k, name in enumerate(names[:-1]):
        others = [kl(students[k], students[j]) for j in range(len(students)) if j != k]
        terms[f"distillation/{name}"] = sum(others) / (len(students) - 1)
    terms["distillation/leader"] = kl(leader, fused)
    terms["distillation/fused"] = kl(fused, sum(students) / len(students))
    maps = outputs["feature_maps"]
    for k, name in enumerate(names[1:]):
        (first, second, last), copies, guides = maps[k + 1], outputs["decoded"][k], outputs["imitated"][k]
        terms[f"imitation/{name}"] = al(a(first), a(guides[0])) + al(a(second), a(guides[1]))
        terms[f"decoder_feature/{name}"] = al(copies[0], first) + al(copies[1], second)
        terms[f"decoder_attention/{name}"] = al(a(copies[0]), a(first)) + al(a(copies[1]), a(second))
        if name == "leader":
            joint = np.concatenate([stages[-1] for stages in maps[:-1]], -1)
            terms["fusion/leader"] = al(a(last), a(outputs["fused_map"]))
            terms["trans_fusion/leader"] = al(a(outputs["widened_map"]), a(joint))
        else:
            target = outputs["shifted"][k].reshape(len(last), -1)
            terms[f"diversity/{name}"] = ((n(a(last)) - target) ** 2).mean()
            terms[f"attention_cosine/{name}"] = (n(a(last)) * n(a(maps[k][-1]))).sum(1).mean()
    return terms


def reference_loss(terms, w, kd, weights):
    def total(kind):
        return sum(value for term, value in terms.items() if term.split("/")[0] == kind)

    by_fused = terms["distillation/leader"] + terms["distillation/fused"]
    return (
        total("cross_entropy")
        + kd * weights["logit_weight"] * (total("distillation") - by_fused)
        + kd * weights["ensemble_weight"] * by_fused
        + w * weights["diversity_weight"] * total("diversity")
        + w * weights["student_imitation_weight"] * (total("imitation") - terms["imitation/leader"])
        + w * weights["fusion_weight"] * total("fusion")
        + w * weights["trans_fusion_weight"] * total("trans_fusion")
        + w * weights["leader_imitation_weight"] * terms["imitation/leader"]
        + w * weights["decoder_feature_weight"] * total("decoder_feature")
        + w * weights["decoder_attention_weight"] * total("decoder_attention")
    )


WEIGHTS = (
    *("logit_weight", "ensemble_weight", "diversity_weight", "student_imitation_weight", "fusion_weight"),
    *("trans_fusion_weight", "leader_imitation_weight", "decoder_feature_weight", "decoder_attention_weight"),
)
PUBLISHED = dict(zip(WEIGHTS, (1.0, 1.0, 1e-5, 1e-5, 10.0, 10.0, 10.0, 1000.0, 1000.0), strict=True))
OTHERS = dict(zip(WEIGHTS, (0.7, 1.3, 0.2, 11.0, 5.0, 7.0, 13.0, 17.0, 19.0), strict=True))


@pytest.mark.parametrize(
    "settings",
    [{}, {"trans_fusion": False}, OTHERS | {"warmup_kd": True, "temperature": 3.0}],
    ids=["published", "without trans-fusion", "other settings"],
)
def test_terms_and_loss(settings):
    outputs, labels = draw_outputs(), np.array([2, 0])
    terms = reference_terms(outputs, labels, settings.get("temperature", 2.0))
    if not settings.get("trans_fusion", True):
        del outputs["widened_map"], terms["trans_fusion/leader"]
    w = np.exp(-5 * (1 - 2 / 5) ** 2)  # the second epoch of five
    loss = reference_loss(terms, w, w if settings.get("warmup_kd") else 1.0, PUBLISHED | settings)
    with jax.enable_x64(True):
        scalars, logs = jax.jit(make_method(4, **settings).objectives)(outputs, jnp.asarray(labels), 1.9)
    actual = scalars | logged(logs)
    chex.assert_trees_all_close(actual, terms | {"loss": loss, "warmup": w}, rtol=1e-12)


def test_warmup_counts_epochs_from_one():
    outputs, labels = jax.tree.map(jnp.float32, draw_outputs()), jnp.array([2, 0])
    epochs = jnp.array([0.0, 0.99, 1, 2.5, 3, 4, 5, 299])
    expected = [0.040762, 0.040762, 0.165299, 0.449329, 0.818731, 1, 1, 1]  # NumPy, float64
    for warmup_epochs, values in ((5.0, expected), (0.0, [1] * 8)):
        method = make_method(4, warmup_epochs=warmup_epochs)
        over_epochs = jax.vmap(method.objectives, in_axes=(None, None, 0))
        warmup = jax.jit(lambda epochs, run=over_epochs: run(outputs, labels, epochs)[1]["warmup"])(epochs)
        np.testing.assert_allclose(warmup, values, atol=1e-6)


def test_distillation_of_logits():
    fused = np.array([[3.0, 1, 0], [1, -1, 0]])

    def terms(students, leader):
        outputs = draw_outputs(len(students) + 1)
        outputs["logits"] = jnp.stack([*students, leader])
        outputs |= {"ensemble_logits": sum(students) / len(students), "fused_logits": fused}
        method = make_method(len(students) + 1)
        return logged(method.objectives(jax.tree.map(jnp.float32, outputs), jnp.array([0, 2]), 0.0)[1])

    @jax.jit
    def run(z):
        gradient = jax.grad(lambda first: terms([first, z[1]], z[2])["distillation/sub_0"])(z[0])
        return terms(z[:2], z[0]), terms(z, z[0]), gradient

    z = [[[1, 2, 3], [0, 0, 0]], [[2, 0, -1], [1, 1, 0]], [[0, 1, 0], [-1, 0, 2]]]
    two, three, gradient = run(jnp.float32(z))
    # NumPy, float64.
    expected = {"sub_0": 1.085396, "sub_1": 1.074337, "fused": 0.444983, "leader": 1.193750}
    for name, value in expected.items():
        np.testing.assert_allclose(two[f"distillation/{name}"], value, atol=2e-6)
    np.testing.assert_allclose(two["cross_entropy/fused"], 0.788726, atol=1e-6)
    np.testing.assert_allclose(three["distillation/sub_0"], 0.847175, atol=1e-6)
    expected = [[-0.442208, 0.075972, 0.366236], [-0.050318, -0.050318, 0.100637]]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_diversity():
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(x, y):
        outputs = draw_outputs(3, batch=1)
        for k, late in enumerate((y, x, x)):
            outputs["feature_maps"][k] = (*outputs["feature_maps"][k][:-1], late)
        outputs |= {"shifted": [shift(y)[0]], "widened_map": jnp.concatenate([x, y], axis=-1)}
        _, terms = make_method().objectives(jax.tree.map(jnp.float32, outputs), jnp.array([0]), 0.0)
        return terms["diversity/sub_1"].value, terms["attention_cosine/sub_1"].value

    (diversity, cosine), gradient = run(jnp.float32(X), jnp.float32(Y))
    # NumPy, float64.
    expected = [
        *(-0.230406, 0, -0.014097, -0.007049, 0, -0.233879, -0.195183, -0.195183, 0.669761, 0),
        *(0, -0.063709, -0.124238, -0.248476, -0.092695, -0.092695, 0, 0),
    ]
    np.testing.assert_allclose(diversity, 47.835595, rtol=4e-6)
    np.testing.assert_allclose(gradient, np.reshape(expected, X.shape), atol=2e-6)
    # By hand from the attentions: 38.75 / (7.365460 * 8.689074).
    np.testing.assert_allclose(cosine, 0.605478, atol=2e-6)
    (diversity, cosine), _ = run(jnp.ones(X.shape), jnp.ones(X.shape))
    np.testing.assert_allclose((diversity, cosine), ((1.5 - 1 / 3) ** 2, 1), rtol=1e-6)


def test_dead_maps_give_finite_gradients():
    outputs = jax.tree.map(jnp.float32, draw_outputs())
    logits = {key: outputs.pop(key) for key in ("logits", "fused_logits", "ensemble_logits")}

    @jax.jit
    @jax.value_and_grad
    def run(maps):
        return make_method(4).objectives(maps | logits, jnp.array([2, 0]), 9.0)[0]["loss"]

    chex.assert_tree_all_finite(run(jax.tree.map(jnp.zeros_like, outputs)))


# The modules.


def decode(kernel, inputs, side, bias=0.0, train=False):
    """The one map [B, *side, D] of a decoder with fresh statistics and `bias` after the norm."""
    inputs, features = jnp.float32(inputs), kernel.shape[-1]
    variables = {
        "params": {
            "stage1_conv": {"kernel": jnp.float32(kernel)},
            "stage1_norm": {"scale": jnp.ones(features), "bias": jnp.full(features, bias)},
        },
        "batch_stats": {"stage1_norm": {"mean": jnp.zeros(features), "var": jnp.ones(features)}},
    }
    shapes = [(len(inputs), *side, features)]
    (maps,), _ = Decoder().apply(variables, inputs, shapes, train=train, mutable=["batch_stats"])
    return maps


def transposed_conv(kernel, inputs, side):
    """PyTorch's kernel [3, 3, in, out]; what it gives comes before norm and ReLU, which are undone."""
    return (decode(kernel[::-1, ::-1], inputs, side, bias=100.0) - 100) * np.sqrt(1 + 1e-5)


def test_transposed_convolution_is_pytorchs():
    inputs, kernel = np.reshape([1.0, 2, 3, 4], (1, 2, 2, 1)), np.arange(1.0, 10).reshape(3, 3, 1, 1)
    # By hand; with padding "SAME" the first row is 1, 2, 5, 4.
    expected = [[5, 14, 10, 12], [14, 36, 24, 30], [15, 34, 20, 24], [24, 55, 32, 36]]
    np.testing.assert_allclose(transposed_conv(kernel, inputs, (4, 4))[0, ..., 0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("small", "large"),
    [((3, 2), (6, 4)), ((3, 2), (5, 4)), ((3, 4), (3, 8)), ((4, 4), (4, 4)), ((1, 1), (2, 1))],
)
def test_transposed_convolution_by_its_definition(small, large):
    rng = np.random.default_rng(0)
    inputs, kernel = rng.normal(size=(2, *small, 3)), rng.normal(size=(3, 3, 3, 2))
    strides = [1 if side == other else 2 for side, other in zip(small, large, strict=True)]
    # Every pixel adds a multiple of the kernel; then a border of 1 falls off.
    full = np.zeros((2, 2 * large[0] + 3, 2 * large[1] + 3, 2))
    for i, j in np.ndindex(*small):
        top, left = i * strides[0], j * strides[1]
        full[:, top : top + 3, left : left + 3] += np.einsum("bc,hwcd->bhwd", inputs[:, i, j], kernel)
    expected = full[:, 1 : 1 + large[0], 1 : 1 + large[1]]
    np.testing.assert_allclose(transposed_conv(kernel, inputs, large), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("small", "large"),
    [((2, 2), (8, 8)), ((2, 2), (6, 4)), ((4, 4), (2, 4)), ((7, 7), (15, 14))],
)
def test_decoder_refuses_other_ratios(small, large):
    def decode():
        return Decoder().init(jax.random.key(0), jnp.zeros((1, *small, 4)), [(1, *large, 2)], train=False)

    message = r"stage 1 of the network gives {}x{} and the next {}x{}: take images".format(*large, *small)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(decode)


def test_decoder_in_both_modes():
    kernel, inputs = fill((3, 3, 2, 1), 7, 0), fill((1, 2, 2, 2), 11, 60)
    # NumPy, float64.
    expected = np.zeros((2, 4, 4))
    expected[0, 0] = [0.133199, 0.679997, 0.300398, 0]
    expected[0, 2:] = [[0, 0, 0, 0.085600], [1.094395, 1.863191, 0.522397, 0.740796]]
    expected[1, 0] = [0.192525, 0.759650, 0.365940, 0]
    expected[1, 2:] = [[0, 0, 0, 0.143156], [1.189454, 1.986831, 0.596192, 0.822710]]
    for train in (False, True):
        actual = decode(kernel, inputs, (4, 4), train=train)[0, ..., 0]
        np.testing.assert_allclose(actual, expected[int(train)], atol=2e-6)


def fill(shape, a, b):
    """Numbers in -1..1 that need no generator."""
    return ((np.arange(np.prod(shape)) * a + b) % 101 - 50.0).reshape(shape) / 50


def test_trans_fusion_head():
    head, inputs = TransFusionHead(2), jnp.float32(fill((2, 2, 2, 2), 3, 1))
    variables = draw_variables(head, inputs)
    norms = {
        name: {"scale": jnp.ones(size), "bias": jnp.zeros(size)}
        for name, size in (("depthwise_norm", 2), ("pointwise_norm", 4))
    }
    kernels = {"depthwise_conv": fill((3, 3, 1, 2), 7, 0), "pointwise_conv": fill((1, 1, 2, 4), 13, 0)}
    params = norms | {name: {"kernel": jnp.float32(kernel)} for name, kernel in kernels.items()}
    outputs, _ = jax.jit(functools.partial(head.apply, train=True, mutable=["batch_stats"]))(
        variables | {"params": params}, inputs
    )
    assert outputs.shape == (2, 2, 2, 4)
    # NumPy, float64.
    np.testing.assert_allclose(outputs[0, 0, 0], [0.781335, 1.005300, 0.446395, 0], atol=5e-6)


def test_initial_values():
    inputs, shapes = jnp.zeros((1, 8, 8, 64)), [(1, 32, 32, 16), (1, 16, 16, 32)]

    @jax.jit
    def init(key):
        head, decoder = TransFusionHead(2), Decoder()
        return {
            **head.init(key, inputs, train=False)["params"],
            **decoder.init(key, inputs, shapes, train=False)["params"],
        }

    params = init(jax.random.key(0))
    # PyTorch's U(-b, b) with b = 1 / sqrt(9 * channels that come out), and sqrt(2 / 576), sqrt(2 / 128).
    uniform = {"stage2_conv": 0.058926, "stage1_conv": 0.083333}
    normal = {"depthwise_conv": 0.058926, "pointwise_conv": 0.125}
    for name, scale in (uniform | normal).items():
        kernel = np.asarray(params[name]["kernel"])
        deviation = scale / np.sqrt(3) if name in uniform else scale
        # The standard deviation of n normal numbers is within 4 / sqrt(2 n) of its own.
        assert abs(kernel.std() / deviation - 1) < 4 / np.sqrt(2 * kernel.size), name
        assert (np.abs(kernel).max() <= scale + 1e-6) == (name in uniform), name


def sizes(module, *inputs):
    """{submodule: number of parameters}."""
    init = functools.partial(module.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), *inputs)["params"]
    return {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}


# Sides and channels of the stages, the last one last; sizes by hand from the layers' shapes.
@pytest.mark.parametrize(
    ("stages", "classes", "head", "fusion", "decoder"),
    [
        (((32, 16), (16, 32), (8, 64)), 10, 9_152, 10_378, 23_136),  # ResNet-20, -32, -56
        (((32, 32), (16, 64), (8, 128)), 100, 34_688, 48_740, 92_352),  # WRN-16-2, -40-2
        (((32, 168), (16, 312), (8, 456)), 100, 422_712, 472_516, 1_753_152),  # DenseNet-40-12
        (((32, 480), (16, 832), (8, 1024)), 100, 2_112_512, 2_224_228, 11_264_576),  # GoogLeNet
        (((56, 64), (28, 128), (14, 256), (7, 512)), 1000, 531_968, 1_049_576, 1_549_184),  # ResNet-18, -34
    ],
)
def test_sizes_of_the_modules(stages, classes, head, fusion, decoder):
    *earlier, last = (jnp.zeros((1, side, side, features)) for side, features in stages)
    assert sum(sizes(TransFusionHead(2), last).values()) == head
    assert sum(sizes(FusionModule(classes), [last, last]).values()) == fusion
    init = functools.partial(Decoder().init, shapes=[x.shape for x in earlier], train=False)
    params = jax.eval_shape(init, jax.random.key(0), last)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == decoder


def test_sizes_of_the_method():
    images = jnp.zeros((1, 32, 32, 3))
    method = FFSD(build("resnet32", 3, 100, vectorize=True), 100)
    found = sizes(method, images)
    expected = {"subnetworks": 3 * 472_756, "trans_fusion_head": 9_152, "fusion": 16_228}
    assert found == expected | dict.fromkeys(("decoders_sub_1", "decoders_leader"), 23_136)
    assert sum(found.values()) == 1_489_920
    found = sizes(method.clone(subnetworks=build("resnet32", 4, 100, vectorize=True)), images)
    expected = {"subnetworks": 4 * 472_756, "trans_fusion_head": 13_376, "fusion": 21_028}
    assert found == expected | dict.fromkeys(("decoders_sub_1", "decoders_sub_2", "decoders_leader"), 23_136)


# The whole method.

NAMES = ("sub_0", "sub_1", "leader")


def make_batch():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(4, 8, 8, 3))), jnp.asarray(rng.integers(0, 3, 4))


def parts_of(gradient, names):
    """{part: gradients}: of every network its first stage, its last and its head, and all modules."""
    parts = dict(gradient)
    for layer, leaves in parts.pop("subnetworks")["branches"].items():
        for k, name in enumerate(names):
            part = f"{layer.split('_')[0]} {name}"
            parts.setdefault(part, {})[layer] = jax.tree.map(lambda leaf, k=k: leaf[k], leaves)
    return parts


def reached_by(term):
    """The parts that a term has a gradient for."""
    kind, name = term.split("/")
    first, last, head = f"stage1 {name}", f"stage2 {name}", f"head {name}"
    if kind in ("cross_entropy", "distillation"):
        return {"fusion"} if name == "fused" else {first, last, head}
    return {
        "diversity": {first, last},
        "imitation": {first},
        "fusion": {first, last},
        "trans_fusion": {first, last, "trans_fusion_head"},
        "decoder_feature": {f"decoders_{name}"},
        "decoder_attention": {f"decoders_{name}"},
    }[kind]


def test_which_gradient_reaches_what():
    method, (images, labels) = make_method(4, vectorize=True), make_batch()
    variables = draw_variables(method, images)

    def terms(params):
        outputs, _ = method.apply(variables | {"params": params}, images, True, mutable=["batch_stats"])
        terms = logged(method.objectives(outputs, labels, jnp.float32(0))[1])
        return {name: x for name, x in terms.items() if not name.startswith(("warmup", "attention_cosine"))}

    gradients = term_gradients(terms, variables["params"])
    # CE and KL of 4 networks and the fused classifier, 2 of diversity, 3 of 3 decoders, 2 of the leader.
    assert len(gradients) == 2 * 5 + 2 + 3 * 3 + 2
    for term, gradient in gradients.items():
        for part, values in parts_of(gradient, method.subnetwork_names()).items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(values):
                where = f"{term} -> {part}{jax.tree_util.keystr(path)}"
                assert np.any(leaf) == (part in reached_by(term)), where


def sgd(decay, step, parameter, gradient, trace, _):
    """PyTorch's, with Nesterov's momentum."""
    gradient = gradient + decay * parameter
    trace = 0.9 * trace + gradient
    return parameter - 0.1 * (gradient + 0.9 * trace), trace, trace


def adam(step, parameter, gradient, mean, square):
    """PyTorch's, with weight decay as part of the gradient; `step` counts from 1."""
    gradient = gradient + 1e-4 * parameter
    mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
    change = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)) ** 0.5 + 1e-8)
    return parameter - 1e-3 * change, mean, square


OPTIMIZERS = {
    **dict.fromkeys((*NAMES, "trans_fusion_head"), functools.partial(sgd, 1e-4)),
    "fusion": functools.partial(sgd, 1e-5),
    **dict.fromkeys(("decoders_sub_1", "decoders_leader"), adam),
}


def step_one_after_another(network, state, images, labels, step):
    """The released code's step: all forward passes, then gradient and update of one network after another.

    Args:
      network: of the two students and the leader.
      state: {part: (parameters, statistics, two slots of its optimiser)}.
      step: counts from 1.
    """
    fusion, head, decoder = FusionModule(3), TransFusionHead(2), Decoder()
    now = {name: {"params": params, "batch_stats": stats} for name, (params, stats, _) in state.items()}
    slots, statistics = {name: slots for name, (_, _, slots) in state.items()}, {}

    def train(name, params, module, *inputs):
        return module.apply(now[name] | {"params": params}, *inputs, train=True, mutable=["batch_stats"])

    def first(name, module, *inputs):
        outputs, updates = train(name, now[name]["params"], module, *inputs)
        statistics[name] = updates["batch_stats"]
        return outputs

    # All that one network takes from another comes from here.
    one, two, lead = (first(name, network, images) for name in NAMES)
    maps = [one.feature_map, two.feature_map]
    fused, fused_map = first("fusion", fusion, maps)
    first("trans_fusion_head", head, lead.feature_map)
    shapes = [x.shape for x in one.feature_maps[:-1]]
    for name, outputs in (("decoders_sub_1", two), ("decoders_leader", lead)):
        first(name, decoder, outputs.feature_map, shapes)
    old = n(a(maps[0]))
    norm = ((a(maps[0]) ** 2).sum((1, 2)) ** 0.5)[:, None]
    threshold = jnp.sort(old)[:, old.shape[1] // 3 - 1, None]
    target = (norm / 2 - old) * jnp.sign(old - threshold) + norm / 2
    shifted = maps[0] + ((target - old) * norm / maps[0].shape[-1]).reshape(a(maps[0]).shape)[..., None]

    def ce(z):
        return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1).mean()

    def kd(z, teacher):
        p = jax.nn.softmax(teacher / 2)
        return 4 * (p * (jnp.log(p) - jax.nn.log_softmax(z / 2))).sum(1).mean()

    def imitation(outputs, name, source):
        guides = decoder.apply(now[name], source, shapes, train=False)
        return sum(al(a(x), a(guide)) for x, guide in zip(outputs.feature_maps[:-1], guides, strict=True))

    def loss_of_one(params):
        outputs, _ = train("sub_0", params, network, images)
        return ce(outputs.logits) + kd(outputs.logits, two.logits)

    def loss_of_two(params):
        outputs, _ = train("sub_1", params, network, images)
        diversity = ((n(a(outputs.feature_map)) - target) ** 2).mean()
        by_maps = diversity + imitation(outputs, "decoders_sub_1", shifted)
        return ce(outputs.logits) + kd(outputs.logits, one.logits) + 1e-5 * by_maps

    def loss_of_fusion(params):
        (z, _), _ = train("fusion", params, fusion, maps)
        return ce(z) + kd(z, (one.logits + two.logits) / 2)

    def loss_of_leader(params, head_params):
        outputs, _ = train("leader", params, network, images)
        widened, _ = train("trans_fusion_head", head_params, head, outputs.feature_map)
        by_maps = al(a(outputs.feature_map), a(fused_map)) + al(a(widened), a(jnp.concatenate(maps, -1)))
        by_maps += imitation(outputs, "decoders_leader", fused_map)
        return ce(outputs.logits) + kd(outputs.logits, fused) + 10 * by_maps

    def loss_of_decoder(name, outputs, params):
        copies, _ = train(name, params, decoder, outputs.feature_map, shapes)
        pairs = zip(copies, outputs.feature_maps[:-1], strict=True)
        return 1000 * sum(al(copy, x) + al(a(copy), a(x)) for copy, x in pairs)

    for loss, *names in (
        (loss_of_one, "sub_0"),
        (loss_of_two, "sub_1"),
        (loss_of_fusion, "fusion"),
        (loss_of_leader, "leader", "trans_fusion_head"),
        (functools.partial(loss_of_decoder, "decoders_sub_1", two), "decoders_sub_1"),
        (functools.partial(loss_of_decoder, "decoders_leader", lead), "decoders_leader"),
    ):
        gradients = jax.grad(loss, argnums=range(len(names)))(*(now[name]["params"] for name in names))
        for name, gradient in zip(names, gradients, strict=True):
            update = functools.partial(OPTIMIZERS[name], step)
            updated = jax.tree.map(update, now[name]["params"], gradient, *slots[name])
            params, *slots[name] = jax.tree.transpose(jax.tree.structure(gradient), None, updated)
            now[name] = now[name] | {"params": params}
    return {name: (now[name]["params"], statistics[name], slots[name]) for name in state}


def make_optimizer(params):
    config = common.get_config("method=ffsd,network=tiny")
    rules = config.optimizer_rules
    return optimizers.make_optimizers(FFSD.trains, params, config.optimizer, rules, 1, config.epochs)["loss"]


def test_one_gradient_equals_one_network_after_another():
    with jax.enable_x64(True):
        # Without warm-up, which is in float32 like the epochs that the step counts.
        method, (images, labels) = make_method(warmup_epochs=0.0), make_batch()
        variables = draw_variables(method, images)
        params, model_state = variables["params"], {"batch_stats": variables["batch_stats"]}
        optimizer = make_optimizer(params)
        record = steps.zero_record(method, params, model_state, images.shape[1:])
        opt_state = {"loss": optimizer.init(params)}
        state = steps.TrainState(jnp.int32(0), params, model_state, opt_state, jax.random.key(0), record)
        step = functools.partial(
            steps.train_step, method=method, optimizers={"loss": optimizer}, steps_per_epoch=1
        )
        train_step, reference_step = (
            jax.jit(step),
            jax.jit(functools.partial(step_one_after_another, Small(3))),
        )

        def parts(variables):
            modules = variables["params"].keys() - {"subnetworks"}
            found = {name: {kind: tree[name] for kind, tree in variables.items()} for name in modules}
            return found | {name: method.extract(variables, name)[1] for name in NAMES}

        reference = {}
        for name, part in parts(variables).items():
            zeros = jax.tree.map(jnp.zeros_like, part["params"])
            reference[name] = (part["params"], part["batch_stats"], [zeros, zeros])
        for number in (1, 2):
            state = train_step(state, {"image": images, "label": labels})
            reference = reference_step(reference, images, labels, number)
            for name, part in parts({"params": state.params, **state.model_state}).items():
                expected = {"params": reference[name][0], "batch_stats": reference[name][1]}
                chex.assert_trees_all_close(part, expected, rtol=1e-9, atol=1e-11)


def test_optimizers_of_the_recipe():
    names = ("subnetworks", "trans_fusion_head", "fusion", "decoders_sub_1", "decoders_leader")
    params = {name: {"kernel": jnp.ones(1)} for name in names}
    optimizer = make_optimizer(params)
    update, state, seen = jax.jit(optimizer.update), optimizer.init(params), []
    for gradient in (0.5, -0.25):
        gradients = jax.tree.map(lambda x, gradient=gradient: jnp.full_like(x, gradient), params)
        updates, state = update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        seen.append({name: float(params[name]["kernel"][0]) for name in names})
    # PyTorch's rules by hand. AdamW would give 0.99899990, 0.99873346.
    for actual, decoders in zip(seen, (0.99900000, 0.99873343), strict=True):
        for name in ("decoders_sub_1", "decoders_leader"):
            np.testing.assert_allclose(actual[name], decoders, atol=1e-7)
    for name, decay in (("subnetworks", 1e-4), ("trans_fusion_head", 1e-4), ("fusion", 1e-5)):
        first, trace, _ = sgd(decay, 1, 1.0, 0.5, 0.0, 0.0)
        second, _, _ = sgd(decay, 2, first, -0.25, trace, 0.0)
        np.testing.assert_allclose([actual[name] for actual in seen], [first, second], atol=1e-7)


def test_recipes():
    config = common.get_config("method=ffsd", "cifar100")
    assert (config.subnetworks.num, config.subnetworks.shared_stages) == (3, 0)
    assert (config.epochs, config.batch_size, config.data.pad_mode) == (300, 128, "reflect")
    assert config.method.to_dict() == PUBLISHED | {
        **{"name": "ffsd", "temperature": 2.0, "shift_ref": "code", "trans_fusion": True},
        **{"warmup_epochs": 5.0, "warmup_kd": False},
    }
    assert common.get_config("method=ffsd", "cifar10").data.pad_mode == "zero"
    config = common.get_config("method=ffsd,epochs=150", "cifar100")
    assert (config.method.warmup_epochs, tuple(config.optimizer.decay_epochs)) == (2.0, (75, 112))


def test_recipe_on_imagenet():
    config = common.get_config("method=ffsd", "imagenet", {"epochs": 90, "batch_size": 256})
    assert (config.epochs, config.batch_size, config.method.warmup_epochs) == (90, 256, 5.0)
    fusion, decoder = (config.optimizer.to_dict() | dict(rule) for _, rule in config.optimizer_rules)
    size = 5004  # steps in an epoch of 1,281,167 images

    def rate(settings, epoch):
        return optimizers.learning_rate_schedule(settings, size, 90)(round(epoch * size))

    for settings in (config.optimizer, fusion):
        # The released code is one step, 4e-6, ahead in its warm-up.
        for epoch, expected in ((0, 0.000004), (1, 0.020004), (2, 0.040004), (4, 0.080004), (5, 0.100004)):
            assert 3.9e-6 < expected - rate(settings, epoch) < 4.1e-6
        for epoch, expected in ((29.9, 0.1), (30, 0.01), (60, 0.001), (79.9, 0.001), (80, 0.0001)):
            np.testing.assert_allclose(rate(settings, epoch), expected, rtol=1e-5)
    for epoch, expected in ((0, 1e-3), (29.9, 1e-3), (30, 1e-4), (60, 1e-5), (80, 1e-6)):
        np.testing.assert_allclose(rate(decoder, epoch), expected, rtol=1e-5)


def test_predictions():
    students = np.array(
        [[[5.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 2, 0]], [[0, 0, 1], [3, 0, 0], [0, 0, 2], [0, 3, 0]]]
    )
    labels = np.array([0, 1, 2, 0])
    right = np.eye(3)[labels]
    outputs = {
        "logits": np.stack([*students, 9 * right]),
        "ensemble_logits": students.mean(0),
        "fused_logits": -right,
    }
    predictions = make_method().predictions(outputs)
    assert list(predictions) == ["sub_0", "sub_1", "leader", "ensemble", "fused"]
    assert FFSD.headline == "leader"
    top1 = {name: np.mean(logits.argmax(1) == labels) for name, logits in predictions.items()}
    # By hand. Of the two students one is right on three images, which is no ensemble.
    assert top1 == {"sub_0": 0.75, "sub_1": 0.25, "leader": 1, "ensemble": 0.5, "fused": 0}


def test_leader_does_without_the_trans_fusion_head_and_the_ensemble_without_the_leader():
    images, _ = make_batch()
    variables = draw_variables(make_method(), images)

    def predict(variables, **settings):
        method = make_method(**settings)
        return jax.jit(lambda: method.predictions(method.apply(variables, images, train=False)))()

    joint = predict(variables)
    alone = {kind: {**tree} for kind, tree in variables.items()}
    for tree in alone.values():
        del tree["trans_fusion_head"]
    np.testing.assert_array_equal(predict(alone, trans_fusion=False)["leader"], joint["leader"])
    mean = (np.asarray(joint["sub_0"], np.float64) + joint["sub_1"]) / 2
    np.testing.assert_allclose(joint["ensemble"], mean, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method.shift_ref": "norm"}, r"method\.shift_ref must be one of code, unit, max, got 'norm'"),
        ({"subnetworks.num": 2}, r"FFSD takes at least 3 sub-network\(s\), got 2"),
        ({"method.fusion_weight": -1.0}, r"method\.fusion_weight must be .*not negative, got -1"),
    ],
)
def test_refuses_impossible_settings(settings, message):
    config = common.get_config("method=ffsd,network=tiny")
    config.update_from_flattened_dict(settings)
    with pytest.raises(ConfigError, match=message):
        config_lib.check(config)


def test_magnitudes_of_a_new_resnet20():
    """As seen in the released modules on Gaussian images: attention's norm 20, diversity 300, others 2e-3."""
    method = FFSD(build("resnet20", 3, 10, vectorize=True), 10)
    images, labels = jax.random.normal(jax.random.key(1), (4, 32, 32, 3)), jnp.arange(4)

    @jax.jit
    def run():
        variables = method.init(jax.random.key(0), images[:1], train=False)
        outputs, _ = method.apply(variables, images, train=True, mutable=["batch_stats"])
        norms = jnp.linalg.norm(attention(outputs["feature_maps"][0][-1]), axis=(1, 2))
        return norms, logged(method.objectives(outputs, labels, jnp.float32(9))[1])

    norms, terms = run()
    assert 15 < norms.mean() < 25
    assert 200 < terms["diversity/sub_1"] < 450
    for name, value in terms.items():
        if name.split("/")[0] in ("imitation", "fusion", "trans_fusion", "decoder_attention"):
            assert 1e-3 < value < 5e-3, name
    for name in ("sub_1", "leader"):
        assert 1.5e-3 < terms[f"decoder_feature/{name}"] + terms[f"decoder_attention/{name}"] < 3e-3
