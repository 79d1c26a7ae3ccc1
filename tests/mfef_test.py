"""MFEF: its losses and modules against NumPy float64, the way of every gradient, and whole steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables
from reference import check_reach, first_state, term_gradients

from configs import common
from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS, build
from ffl_jax.methods.base import logged
from ffl_jax.methods.mfef import DualAttention, MultiScaleExtraction
from ffl_jax.methods.subnetworks import build as build_subnetworks

MFEF = METHODS["mfef"]

LOGITS = np.array([[[2, 1, 0], [0, 0.5, 1.5]], [[1, 3, -1], [1, 0, 2]]])
FUSED = np.array([[2, 0, 1], [0.5, -0.5, 1]])
LABELS = np.array([0, 2])
# NumPy, float64.
CE = {"sub_0": 0.435987, "sub_1": 1.275269, "fused": 0.505868}
KD = {"sub_0": 0.223862, "sub_1": 1.094093, "fused": 0.536138}


def make_method(network="tiny", num=2, classes=3, shared_stages=0, vectorize=False, **settings):
    return MFEF(build_subnetworks(network, num, classes, shared_stages, vectorize), classes, **settings)


def objectives(logits, fused, epoch=80.0, distances=None, **settings):
    outputs = {"logits": jnp.float32(logits), "fused_logits": jnp.float32(fused)}
    if distances is not None:
        outputs["feature_distance"] = jnp.float32(distances)
    method = make_method(num=len(logits), **settings)
    scalars, terms = method.objectives(outputs, jnp.asarray(LABELS), jnp.float32(epoch))
    return scalars, logged(terms)


@pytest.mark.parametrize(
    ("epoch", "weight", "loss"),  # NumPy, float64
    [(20.0, 0.060055, 2.328471), (20.9, 0.060055, 2.328471), (80.0, 1.0, 4.071217), (300.0, 1.0, 4.071217)],
)
def test_losses(epoch, weight, loss):
    scalars, terms = objectives(LOGITS, FUSED, epoch)
    expected = {f"cross_entropy/{name}": value for name, value in CE.items()}
    expected |= {f"distillation/{name}": value for name, value in KD.items()}
    chex.assert_trees_all_close(terms, expected | {"distillation_weight": weight}, atol=1e-6)
    assert list(scalars) == list(MFEF.trains)
    np.testing.assert_allclose(scalars["loss"], loss, atol=3e-6)


@pytest.mark.parametrize(
    ("epoch", "weight"),  # NumPy, float64
    [(0, 0.006738), (1, 0.007629), (40, 0.286505), (60, 0.731616), (79, 0.999219)],
)
def test_ramp(epoch, weight):
    _, terms = objectives(LOGITS, FUSED, epoch)
    np.testing.assert_allclose(terms["distillation_weight"], weight, atol=1e-6)


def test_ensemble_that_does_not_teach():
    scalars, terms = objectives(LOGITS, FUSED, ensemble_to_fused=False)
    assert terms["distillation/fused"] == 0
    np.testing.assert_allclose(scalars["loss"], 4.071217 - 0.536138, atol=3e-6)


def test_loss_on_feature_maps_is_within_the_ramp():
    scalars, terms = objectives(LOGITS, FUSED, 20.0, [[0.1, 0.3], [0.5, 0.5]], feat_loss_weight=2.0)
    np.testing.assert_allclose([terms[f"feature/sub_{k}"] for k in range(2)], [0.2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(scalars["loss"], 2.328471 + 0.060055 * 2 * 0.7, atol=3e-6)


def test_distillation_vanishes_where_all_agree():
    _, terms = objectives([FUSED, FUSED], FUSED)
    for name in KD:
        np.testing.assert_allclose(terms[f"distillation/{name}"], 0, atol=1e-6)


def test_teachers_are_constants():
    def distillation(logits, fused):
        _, terms = objectives(logits, fused)
        return jnp.stack([terms[f"distillation/{name}"] for name in KD])

    by_logits, by_fused = jax.jit(jax.jacrev(distillation, argnums=(0, 1)))(
        jnp.float32(LOGITS), jnp.float32(FUSED)
    )
    reached = [[np.any(by_logits[i, k]) for k in range(2)] + [np.any(by_fused[i])] for i in range(3)]
    np.testing.assert_array_equal(reached, np.eye(3, dtype=bool))  # every learner, and nobody else


def test_predictions():
    method = make_method()
    predictions = method.predictions({"logits": jnp.float32(LOGITS), "fused_logits": jnp.float32(FUSED)})
    expected = {"sub_0": LOGITS[0], "sub_1": LOGITS[1], "fused": FUSED}
    expected["ensemble"] = np.array([[1.5, 2, -0.5], [0.5, 0.25, 1.75]])  # by hand
    chex.assert_trees_all_close(predictions, expected)
    assert method.headline in predictions


def make_batch(side=8, count=6, classes=3):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(count, side, side, 3))), jnp.asarray(rng.integers(0, classes, count))


def test_without_extraction_and_attention_it_is_ffl():
    """Of three: the same variables, outputs and losses as FFL without its smoothing."""
    subnetworks = build_subnetworks("tiny", 3, 3)
    methods = [
        MFEF(subnetworks, 3, extraction="none", attention=False),
        METHODS["ffl"](subnetworks, 3, smoothing=0.0),
    ]
    images, labels = make_batch()
    variables = draw_variables(methods[0], images)

    @jax.jit
    def run(variables):
        results = []
        for method in methods:
            outputs, state = method.apply(variables, images, True, mutable=["batch_stats"])
            results.append((outputs, state, method.objectives(outputs, labels, jnp.float32(7))))
        return results

    actual, expected = run(variables)
    chex.assert_trees_all_equal(actual, expected)


def fresh_extraction(channels, width, kernel, mix):
    """Variables of an extraction by 3x3 with the same `kernel` [3, 3, w, w] for three groups."""

    def norm(features):
        return {"scale": jnp.ones(features), "bias": jnp.zeros(features)}

    def statistics(features):
        return {"mean": jnp.zeros(features), "var": jnp.ones(features)}

    params = {"mix_conv": {"kernel": mix}, "mix_norm": norm(channels)}
    params |= {f"group{i}_conv": {"kernel": kernel} for i in (2, 3, 4)}
    params |= {f"group{i}_norm": norm(width) for i in (2, 3, 4)}
    averages = {f"group{i}_norm": statistics(width) for i in (2, 3, 4)} | {"mix_norm": statistics(channels)}
    return {"params": params, "batch_stats": averages}


@jax.jit
def extract_for_inference(variables, x):
    return MultiScaleExtraction("res2net", 4).apply(variables, x, False)


def test_split_of_constant_groups():
    """Kernels that only copy: sums 1, 2, 3 + 2, 4 + 3 + 2, but for the eps of the norms. NumPy, float64."""
    x = jnp.broadcast_to(jnp.repeat(jnp.arange(1.0, 5.0), 2), (1, 4, 4, 8))
    kernel = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))
    variables = fresh_extraction(8, 2, kernel, jnp.eye(8)[None, None])
    y = extract_for_inference(variables, x)
    concatenated = (np.float64(y) - np.float64(x)) * np.sqrt(1 + 1e-5)
    expected = np.repeat([1.000000, 1.999990, 4.999965, 8.999920], 2)
    np.testing.assert_allclose(concatenated, np.broadcast_to(expected, x.shape), atol=2e-6)


def test_extraction_without_mixing_is_the_identity():
    x = jnp.float32(np.random.default_rng(0).uniform(size=(1, 4, 4, 8)))
    variables = fresh_extraction(8, 2, jnp.ones((3, 3, 2, 2)), jnp.zeros((1, 1, 8, 8)))
    np.testing.assert_array_equal(extract_for_inference(variables, x), x)


def test_attention_by_hand():
    """C = 2; the hidden layer has one unit that counts, the other three are 0. NumPy, float64."""
    x = jnp.stack([jnp.array([[1.0, 2], [3, 4]]), jnp.array([[0.0, 1], [0, -1]])], axis=-1)[None]
    kernel = np.zeros((7, 7, 2, 1))
    kernel[3, 3, :, 0] = 1, -0.5  # of the mean and the maximum
    kernel[3, 4, 0, 0] = 0.25
    params = {
        "channel_hidden": {"kernel": jnp.zeros((2, 4)).at[:, 0].set(jnp.array([1.0, 2]))},
        "channel_score": {"kernel": jnp.zeros((4, 2)).at[0].set(jnp.array([0.5, -0.5]))},
        "spatial_conv": {"kernel": jnp.float32(kernel)},
    }
    apply = jax.jit(DualAttention(16).apply)
    y = apply({"params": params}, x)
    np.testing.assert_allclose(y[0, ..., 0].ravel(), [0.553844, 0.989403, 1.835000, 1.964940], atol=2e-6)
    np.testing.assert_allclose(y[0, ..., 1].ravel(), [0, 0.007057, 0, -0.007007], atol=1e-6)
    np.testing.assert_allclose(y.sum(), 5.343235, atol=3e-6)
    zeros = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(apply({"params": zeros}, x), 0.25 * x)


def test_gradient_of_the_attention_is_finite():
    """With `jnp.max`, at this level of optimisation it is NaN; dead maps, where all are equal, too."""
    x = jnp.float32(np.random.default_rng(0).normal(size=(8, 2, 2, 16)))
    variables = draw_variables_of_attention(x)

    @jax.jit
    def gradient(variables, x):
        return jax.grad(lambda *a: (DualAttention(16).apply(*a) ** 2).sum(), (0, 1))(
            variables, 1.37 * x + 0.1
        )

    for inputs in (x, jnp.full_like(x, -0.1 / 1.37)):
        chex.assert_tree_all_finite(gradient(variables, inputs))


def draw_variables_of_attention(x):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(DualAttention(16).init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("channels", "extraction", "attention"),  # (g-1)(9 w^2 + 2 w) + C^2 + 2 C and 2 C max(C/16, 4) + 98
    [(64, 11232, 610), (128, 44480, 2146), (256, 177024, 8290)],
)
def test_sizes_of_the_modules(channels, extraction, attention):
    x, key = jnp.zeros((1, 8, 8, channels)), jax.random.key(0)

    def params(module, *arguments):
        return jax.eval_shape(lambda: module.init(key, x, *arguments))["params"]

    assert count(params(MultiScaleExtraction("res2net", 4), False)) == extraction
    assert count(params(DualAttention(16))) == attention
    parallel = params(MultiScaleExtraction("parallel", 4), False)
    width = channels // 4
    kernels = [parallel[f"group{i}_conv"]["kernel"].shape for i in (1, 2, 3, 4)]
    assert kernels == [(size, size, width, width) for size in (3, 5, 7, 9)]


@pytest.mark.parametrize(
    ("network", "num", "classes", "fusion", "total"),  # 9 S + 2 S + S C_f + 2 C_f + C_f n + n
    [
        ("resnet8", 2, 100, 16228, 39912),
        ("resnet8", 2, 10, 10378, 34062),
        ("resnet8", 3, 100, 21028, 56554),
        ("resnet8", 3, 10, 15178, 50704),
        # 64 and 256 channels: S = 320, C_f = 256.
        ("resnet8+resnet110_bottleneck", 2, 100, 111652, 111652 + 11232 + 610 + 177024 + 8290),
    ],
)
def test_sizes_of_the_method(network, num, classes, fusion, total):
    initialise = functools.partial(make_method(network, num, classes).init, train=False)
    params = jax.eval_shape(initialise, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    sizes = {name: count(tree) for name, tree in params.items() if name != "subnetworks"}
    assert sizes["fusion"] == fusion
    assert sum(sizes.values()) == total


# A second implementation, NumPy float64.


def convolve(x, layer, padding=0, groups=1):
    kernel = np.asarray(layer["kernel"])
    size = kernel.shape[0]
    height, width = x.shape[1:3]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    y = np.zeros((len(x), height, width, kernel.shape[-1]))
    for i, j in np.ndindex(height, width):
        window = x[:, i : i + size, j : j + size]
        if groups > 1:
            y[:, i, j] = np.einsum("bhwc,hwc->bc", window, kernel[:, :, 0])
        else:
            y[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    return y


def normalise(x, layer):
    y = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    return y * np.asarray(layer["scale"]) + np.asarray(layer["bias"])


def extract(x, params, kind, shuffle, groups=4):
    width = x.shape[-1] // groups
    parts = [x[..., i * width : (i + 1) * width] for i in range(groups)]
    results = []
    for i, part in enumerate(parts):
        if kind == "res2net" and i == 0:
            results.append(part)
            continue
        if kind == "res2net" and i > 1:
            part = part + results[-1]
        padding = i + 1 if kind == "parallel" else 1
        part = convolve(part, params[f"group{i + 1}_conv"], padding)
        results.append(np.maximum(normalise(part, params[f"group{i + 1}_norm"]), 0))
    if shuffle:  # the first channel of every group, then the second, …
        y = np.concatenate([part[..., [c]] for c in range(width) for part in results], axis=-1)
    else:
        y = np.concatenate(results, axis=-1)
    return np.maximum(x + normalise(convolve(y, params["mix_conv"]), params["mix_norm"]), 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def attend(x, params):
    first, second = (np.asarray(params[f"channel_{name}"]["kernel"]) for name in ("hidden", "score"))
    scores = [np.maximum(pooled @ first, 0) @ second for pooled in (x.mean((1, 2)), x.max((1, 2)))]
    x = x * sigmoid(sum(scores))[:, None, None]
    pooled = np.stack([x.mean(-1), x.max(-1)], axis=-1)
    return x * sigmoid(convolve(pooled, params["spatial_conv"], 3))


def halve(x):
    return sum(x[:, i::2, j::2] for i, j in np.ndindex(2, 2)) / 4


def pool(x, size):
    while x.shape[1] > size:
        x = halve(x)
    return x


def energy(x, size):
    x = pool((x**2).sum(-1, keepdims=True), size).reshape(len(x), -1)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("extraction", "reconstruction", "early"), [("res2net", True, True), ("parallel", False, False)]
)
def test_everything_that_a_training_pass_computes(extraction, reconstruction, early):
    """Two networks of 16 and 24 channels, whose last maps are 2x2 and 4x4."""
    with jax.enable_x64(True):
        images, labels = make_batch()
        settings = {"extraction": extraction, "reconstruction": reconstruction, "early_fusion": early}
        method = make_method("tiny+tiny_wide", feat_loss_weight=0.5, **settings)
        variables = draw_variables(method, images)

        @jax.jit
        def run(variables):
            outputs, _ = method.apply(variables, images, True, mutable=["batch_stats"])
            own = {name: tree["subnetworks"] for name, tree in variables.items()}
            peers, _ = method.subnetworks.apply(own, images, True, mutable=["batch_stats"])
            return outputs, peers, method.objectives(outputs, labels, 0.0)

        outputs, peers, (_, terms) = jax.device_get(run(variables))
    params, processed = variables["params"], []
    for k, peer in enumerate(peers):
        np.testing.assert_array_equal(outputs["logits"][k], peer.logits)  # no module touches them
        x = peer.feature_map
        if early:
            layers = params[f"early_fusions_{k}"]
            for i, earlier in enumerate(peer.feature_maps[:-1]):
                y = convolve(pool(earlier, x.shape[1]), layers[f"conv{i + 1}"])
                x = x + normalise(y, layers[f"norm{i + 1}"])
            assert len(layers) == 4
        x = extract(x, params[f"extractions_{k}"], extraction, reconstruction)
        processed.append(pool(attend(x, params[f"attentions_{k}"]), 2))
    layers = params["fusion"]
    x = np.concatenate(processed, axis=-1)
    x = convolve(x, layers["depthwise_conv"], 1, groups=40)
    x = convolve(np.maximum(normalise(x, layers["depthwise_norm"]), 0), layers["pointwise_conv"])
    fused_map = np.maximum(normalise(x, layers["pointwise_norm"]), 0)
    fused = fused_map.mean((1, 2)) @ np.asarray(layers["head"]["kernel"]) + np.asarray(layers["head"]["bias"])
    np.testing.assert_allclose(outputs["fused_logits"], fused, rtol=1e-9)
    for k, peer in enumerate(peers):
        distance = ((energy(peer.feature_map, 2) - energy(fused_map, 2)) ** 2).sum(-1)
        np.testing.assert_allclose(terms[f"feature/sub_{k}"].value, distance.mean(), rtol=1e-9)
        assert distance.mean() > 1e-3


@pytest.mark.parametrize(("shared_stages", "widths"), [(0, [4, 8]), (1, [4, 8]), (2, [8])])
def test_early_fusion_takes_the_maps_that_are_at_hand(shared_stages, widths):
    """Of a trunk of two stages only the second's map is; "tiny" has stages of 4, 8 and 16 channels."""
    method = make_method(shared_stages=shared_stages, early_fusion=True)
    initialise = functools.partial(method.init, train=False)
    params = jax.eval_shape(initialise, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    for k in range(2):
        layers = params[f"early_fusions_{k}"]
        kernels = [layers[name]["kernel"].shape for name in sorted(layers) if name.startswith("conv")]
        assert kernels == [(1, 1, width, 16) for width in widths]


KINDS = {
    "trunk, vmapped": {
        "shared_stages": 2,
        "vectorize": True,
        "extraction": "parallel",
        "groups": 2,
        "attention": False,
    },
    "mixed": {"network": "tiny+tiny_wide", "early_fusion": True, "reconstruction": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_which_gradient_reaches_what(kind):
    """The fused classifier's losses move everything but the heads, a sub-network's its own path."""
    method = make_method(**KINDS[kind], feat_loss_weight=1.0)
    images, labels = make_batch()
    variables = draw_variables(method, images)
    names = [f"{term}/{name}" for term in ("cross_entropy", "distillation") for name in CE]
    names += ["feature/sub_0", "feature/sub_1"]

    def terms(params):
        outputs, _ = method.apply(variables | {"params": params}, images, True, mutable=["batch_stats"])
        terms = logged(method.objectives(outputs, labels, jnp.float32(0))[1])
        return {name: terms[name] for name in names}

    for name, gradient in term_gradients(terms, variables["params"]).items():
        term, learner = name.split("/")
        k = learner.removeprefix("sub_")
        own = ("trunk", f"stages_{k}") + (() if term == "feature" else (f"head_{k}",))
        if learner == "fused":
            own = ("trunk", "stages_0", "stages_1", *(variables["params"].keys() - {"subnetworks"}))
        check_reach(gradient, 2, own, name)


def test_symmetries():
    """Swapped sub-networks, with their modules and their channels of the fusion, change nothing."""
    with jax.enable_x64(True):
        method = make_method()
        images, labels = make_batch()
        variables = draw_variables(method, images)
        channels = np.r_[16:32, :16]

        def swap(tree):
            fusion = dict(tree["fusion"])
            for name, axis in (("depthwise_conv", 3), ("depthwise_norm", 0), ("pointwise_conv", 2)):
                if name in fusion:  # among statistics, norms only
                    take = functools.partial(jnp.take, indices=channels, axis=axis)
                    fusion[name] = jax.tree.map(take, fusion[name])
            branches = jax.tree.map(lambda leaf: leaf[::-1], tree["subnetworks"]["branches"])
            swapped = {
                f"{name}_{k}": tree[f"{name}_{1 - k}"]
                for name in ("extractions", "attentions")
                for k in range(2)
                if f"{name}_{k}" in tree
            }
            return {"fusion": fusion, "subnetworks": {"branches": branches}, **swapped}

        @jax.jit
        def run(variables):
            outputs, _ = method.apply(variables, images, True, mutable=["batch_stats"])
            scalars, terms = method.objectives(outputs, labels, jnp.float32(80))
            return outputs["fused_logits"], scalars, logged(terms)

        fused, scalars, terms = run(variables)
        swapped_fused, swapped_scalars, swapped = run({kind: swap(tree) for kind, tree in variables.items()})
        np.testing.assert_allclose(swapped_fused, fused, rtol=1e-9)
        np.testing.assert_allclose(swapped_scalars["loss"], scalars["loss"], rtol=1e-9)
        for term in ("cross_entropy", "distillation"):
            np.testing.assert_allclose(swapped[f"{term}/sub_0"], terms[f"{term}/sub_1"], rtol=1e-9)
            assert abs(terms[f"{term}/sub_0"] / terms[f"{term}/sub_1"] - 1) > 1e-3

        # A norm follows the fusion's 1x1 convolution, whose scale it takes out, but for its eps.
        scaled = jax.tree.map(lambda leaf: leaf, variables)
        kernel = scaled["params"]["fusion"]["pointwise_conv"]["kernel"]
        scaled["params"]["fusion"]["pointwise_conv"]["kernel"] = 3 * kernel
        np.testing.assert_allclose(run(scaled)[0], fused, atol=1e-4)
        np.testing.assert_array_less(1e-3, np.ptp(fused, axis=0))


def test_two_whole_steps():
    """SGD with Nesterov's momentum; the modules decay less than the networks."""
    config = common.get_config("method=mfef,network=tiny", "cifar100")
    config.subnetworks.network = "tiny+tiny_wide"
    config.method.extraction = "none"  # compiles in half the time
    with jax.enable_x64(True):
        method = build(config, 3)
        images, labels = make_batch()
        variables = draw_variables(method, images)
        params = variables["params"]
        model_state = {"batch_stats": variables["batch_stats"]}
        state, run = first_state(method, config, params, model_state)
        run = jax.jit(run)

        @jax.jit
        @jax.grad
        def gradient(params, statistics):
            outputs, _ = method.apply(
                {"params": params, "batch_stats": statistics}, images, True, mutable=["batch_stats"]
            )
            return method.objectives(outputs, labels, jnp.float32(0))[0]["loss"]

        expected = by_path(params)
        momentum = dict.fromkeys(expected, 0.0)
        for _ in range(2):
            slopes = by_path(gradient(state.params, state.model_state["batch_stats"]))
            state = run(state, {"image": images, "label": labels})
            for path, old in expected.items():
                slope = slopes[path] + (1e-4 if path.startswith("subnetworks/") else 1e-5) * old
                momentum[path] = 0.9 * momentum[path] + slope
                expected[path] = old - 0.1 * (slope + 0.9 * momentum[path])
            # The decay of 1e-5 moves a weight of 0.2 by 2e-7.
            chex.assert_trees_all_close(by_path(state.params), expected, atol=1e-10, rtol=0)
    modules = {"fusion", "attentions_0", "attentions_1"}
    assert {path.split("/")[0] for path in expected} == {"subnetworks"} | modules


def by_path(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join(key.key for key in keys): np.array(leaf) for keys, leaf in leaves}


def test_recipe():
    config = common.get_config("method=mfef,network=resnet32", "cifar100")
    assert (config.epochs, config.batch_size, config.method.rampup_epochs) == (300, 128, 80)
    assert config.optimizer.nesterov
    assert config.subnetworks.shared_stages == 0
    assert config.optimizer_rules == (("loss/(?!subnetworks/).*", {"weight_decay": 1e-5}),)
    assert common.get_config("method=mfef,network=resnet18,epochs=90").method.rampup_epochs == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extraction": "inception"}, "extraction must be one of res2net, parallel, none, got 'inception'"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"attention_reduction": 0}, "attention_reduction must be at least 1, got 0"),
        (
            {"extraction": "none", "reconstruction": True},
            "set config.method.extraction to res2net or parallel",
        ),
        ({"num": 1}, "at least 2 sub-network"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**settings).check()


def test_groups_that_do_not_divide_the_channels():
    method = make_method("tiny+tiny_wide", groups=16)  # 16 and 24 channels
    with pytest.raises(ConfigError, match="groups=16 does not divide the 24 channels"):
        jax.eval_shape(
            functools.partial(method.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 3))
        )
