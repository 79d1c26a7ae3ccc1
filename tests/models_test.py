"""Networks: sizes counted by hand, initial values, shapes, padding, and cuts into trunk and branch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables

from ffl_jax.devices import backend
from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS
from ffl_jax.methods.modules import FusionModule
from ffl_jax.methods.subnetworks import build
from ffl_jax.models import NETWORKS, base

# (network, classes) -> trained numbers of the whole network, its trunk (all stages but the last), one branch
# with its head, and two branches on one trunk. By hand from the layers' shapes.
SIZES = [
    ("resnet20", 10, 272_474, 66_128, 206_346, 478_820),
    ("resnet20", 100, 278_324, 66_128, 212_196, 490_520),
    ("resnet32", 10, 466_906, 112_592, 354_314, 821_220),
    ("resnet32", 100, 472_756, 112_592, 360_164, 832_920),
    ("resnet56", 10, 855_770, 205_520, 650_250, 1_506_020),
    ("resnet56", 100, 861_620, 205_520, 656_100, 1_517_720),
    ("resnet110", 10, 1_730_714, 414_608, 1_316_106, 3_046_820),
    ("resnet110", 100, 1_736_564, 414_608, 1_321_956, 3_058_520),
    ("resnet18", 1000, 11_689_512, 2_782_784, 8_906_728, 20_596_240),
    ("resnet34", 1000, 21_797_672, 8_170_304, 13_627_368, 35_425_040),
]
# With the fusion module: (network, classes) -> on one trunk, of two separate networks.
FFL_SIZES = [
    ("resnet20", 100, 506_748, 572_876),
    ("resnet32", 100, 849_148, 961_740),
    ("resnet56", 100, 1_533_948, 1_739_468),
    ("resnet110", 100, 3_074_748, 3_489_356),
    ("resnet18", 1000, 21_645_816, 24_428_600),
    ("resnet34", 1000, 36_474_616, 44_644_920),
]


def shapes(module, inputs):
    return jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), inputs)["params"]


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def images(network):
    return jnp.zeros((1, 224, 224, 3) if network in ("resnet18", "resnet34") else (1, 32, 32, 3))


def init(module, inputs, seed=0):
    return jax.jit(functools.partial(module.init, train=False))(jax.random.key(seed), inputs)


@pytest.mark.parametrize(("name", "classes", "whole", "trunk", "branch", "shared"), SIZES)
def test_parameter_counts(name, classes, whole, trunk, branch, shared):
    network, inputs = NETWORKS.lookup(name)(classes), images(name)
    params = shapes(network, inputs)
    assert size(params) == whole
    last = f"stage{network.num_stages}"
    in_branch = {key: value for key, value in params.items() if key == "head" or key.startswith(last)}
    assert size(in_branch) == branch
    assert size(params) - size(in_branch) == trunk
    subnetworks = shapes(build(name, 2, classes, network.num_stages - 1, vectorize=True), inputs)
    assert size(subnetworks["trunk"]) == trunk
    assert size(subnetworks["branches"]) == 2 * branch
    assert size(subnetworks) == shared


@pytest.mark.parametrize(
    ("num", "features", "side", "classes", "expected"),
    [
        (2, 64, 8, 10, 10_378),
        (2, 64, 8, 100, 16_228),
        (3, 64, 8, 100, 21_028),
        (4, 64, 8, 100, 25_828),
        (2, 512, 7, 1000, 1_049_576),
    ],
)
def test_fusion_parameter_counts(num, features, side, classes, expected):
    params = shapes(FusionModule(classes), [jnp.zeros((1, side, side, features))] * num)
    assert size(params) == expected
    if (num, classes) == (2, 100):
        parts = {"depthwise_conv": 1152, "depthwise_norm": 256, "pointwise_conv": 8192, "pointwise_norm": 128}
        assert {name: size(part) for name, part in params.items()} == parts | {"head": 6500}


@pytest.mark.parametrize(("name", "classes", "shared", "separate"), FFL_SIZES)
def test_ffl_parameter_counts(name, classes, shared, separate):
    stages = NETWORKS.lookup(name)(classes).num_stages
    for shared_stages, expected in ((stages - 1, shared), (0, separate)):
        method = METHODS["ffl"](build(name, 2, classes, shared_stages, vectorize=True), classes)
        assert size(shapes(method, images(name))) == expected


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("resnet8", 32, [(32, 16), (16, 32), (8, 64)]),
        ("resnet20", 32, [(32, 16), (16, 32), (8, 64)]),
        ("resnet32", 28, [(28, 16), (14, 32), (7, 64)]),
        ("resnet18", 224, [(56, 64), (28, 128), (14, 256), (7, 512)]),
        ("resnet34", 224, [(56, 64), (28, 128), (14, 256), (7, 512)]),
    ],
)
def test_shapes_of_the_outputs(name, side, expected):
    network, inputs = NETWORKS.lookup(name)(10), jnp.zeros((2, side, side, 3))
    outputs, _ = jax.eval_shape(
        functools.partial(network.init_with_output, train=False), jax.random.key(0), inputs
    )
    assert [x.shape for x in outputs.feature_maps] == [(2, side, side, width) for side, width in expected]
    assert outputs.feature_map.shape == outputs.feature_maps[-1].shape
    assert outputs.features.shape == (2, expected[-1][1])
    assert outputs.logits.shape == (2, 10)
    assert outputs.trunk_map is None


@pytest.fixture(scope="module")
def resnet8():
    network = NETWORKS.lookup("resnet8")(100)
    return network, init(network, jnp.zeros((1, 16, 16, 3)))


def test_convolutions_start_normal_by_fan_out(resnet8):
    _, variables = resnet8
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    kernels = {"/".join(k.key for k in path): x for path, x in leaves if x.ndim == 4}
    assert len(kernels) == 7 + 2  # the depth, less the head, and two shortcuts
    scaled = []
    for path, kernel in kernels.items():
        height, width, _, features = kernel.shape
        expected = np.sqrt(2 / (height * width * features))
        # The standard deviation of n normal numbers is within 4 / sqrt(2 n) of its own.
        assert abs(np.std(kernel) / expected - 1) < 4 / np.sqrt(2 * kernel.size), path
        scaled.append(np.ravel(kernel) / expected)
    scaled = np.concatenate(scaled)
    assert abs(scaled.std() - 1) < 4 / np.sqrt(2 * scaled.size)
    # Not truncated at two standard deviations: 4.55 % lie outside.
    assert abs(np.mean(np.abs(scaled) > 2) - 0.0455) < 0.004


def test_fusion_convolutions_start_normal_by_all_their_channels():
    params = init(FusionModule(100), [jnp.zeros((1, 4, 4, 64))] * 2)["params"]
    # By hand: sqrt(2 / (9 * 128)), not sqrt(2 / 9) of the one channel in a group, and sqrt(2 / 64).
    for name, expected in (("depthwise_conv", 0.041667), ("pointwise_conv", 0.176777)):
        kernel = np.asarray(params[name]["kernel"])
        assert abs(kernel.std() / expected - 1) < 4 / np.sqrt(2 * kernel.size)
        assert np.abs(kernel).max() > 2.5 * expected
    check_head(params["head"], 0.125)


def check_head(head, bound):
    for values in (np.asarray(head["kernel"]), np.asarray(head["bias"])):
        assert np.abs(values).max() <= bound + 1e-6
        assert np.abs(values).max() > 0.9 * bound
        assert abs(values.mean()) < 4 * bound / np.sqrt(3 * values.size)
        assert abs(values.std() / (bound / np.sqrt(3)) - 1) < 4 / np.sqrt(2 * values.size)


def test_head_starts_uniform(resnet8):
    check_head(resnet8[1]["params"]["head"], 0.125)  # 1 / sqrt(64)
    layer = base.dense(1000, 512)
    check_head(init_dense(layer, 512), 0.044194)  # 1 / sqrt(512)


def init_dense(layer, fan_in):
    return jax.jit(layer.init)(jax.random.key(1), jnp.zeros((1, fan_in)))["params"]


def test_norms_start_as_the_identity(resnet8):
    _, variables = resnet8
    norms = [(path, value) for path, value in walk(variables["params"]) if "norm" in path[-2]]
    assert len(norms) == 2 * 9
    for path, value in norms + list(walk(variables["batch_stats"])):
        expected = 1 if path[-1] in ("scale", "var") else 0
        np.testing.assert_array_equal(value, np.full(value.shape, expected), str(path))


def walk(tree):
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(key.key for key in path), value


@pytest.mark.parametrize(
    ("name", "side", "cuts"), [("resnet8", 8, (1, 2)), ("resnet18", 32, (3,))], ids=["cifar", "imagenet"]
)
def test_trunk_and_branch_are_cuts_of_the_whole_network(name, side, cuts):
    network = NETWORKS.lookup(name)(10)
    if name == "resnet18":
        network = network.clone(blocks=(1, 1, 1, 1))
    inputs = jax.random.normal(jax.random.key(1), (4, side, side, 3))
    variables = draw_variables(network, inputs)

    @jax.jit
    def run(variables, inputs):
        whole, updates = network.apply(variables, inputs, True, mutable=["batch_stats"])
        parts = []
        for cut in cuts:
            trunk, branch = network.clone(stop=cut), network.clone(start=cut)
            middle, trunk_updates = trunk.apply(variables, inputs, True, mutable=["batch_stats"])
            outputs, branch_updates = branch.apply(variables, middle, True, mutable=["batch_stats"])
            parts.append((middle, outputs, trunk_updates["batch_stats"], branch_updates["batch_stats"]))
        return whole, updates["batch_stats"], parts

    whole, updates, parts = run(variables, inputs)
    for cut, (middle, outputs, trunk_updates, branch_updates) in zip(cuts, parts, strict=True):
        in_branch = {key for key in updates if key.startswith("stage") and int(key[5]) > cut}
        joined = {key: (branch_updates if key in in_branch else trunk_updates)[key] for key in updates}
        expected = (whole.feature_maps[cut - 1], whole.feature_maps[cut:], whole.logits, updates)
        actual = (middle, outputs.feature_maps, outputs.logits, joined)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_features_are_the_last_map_averaged(resnet8):
    network, variables = resnet8
    inputs = jax.random.normal(jax.random.key(2), (2, 16, 16, 3))
    outputs = jax.jit(functools.partial(network.apply, train=False))(variables, inputs)
    features = np.asarray(outputs.feature_map, np.float64).mean((1, 2))
    np.testing.assert_allclose(outputs.features, features, rtol=1e-5)
    head = variables["params"]["head"]
    np.testing.assert_allclose(outputs.logits, features @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5)
    assert outputs.feature_map.min() == 0  # after the last ReLU


@pytest.mark.parametrize(
    ("kernel", "stride", "height", "width"),
    [(3, 2, 8, 6), (3, 2, 7, 5), (7, 2, 8, 10), (1, 2, 8, 7), (3, 1, 5, 4)],
)
def test_convolution_is_padded_alike_on_every_side(kernel, stride, height, width):
    inputs = np.random.default_rng(0).normal(size=(2, height, width, 3))
    layer = base.conv(4, kernel, stride)
    variables = layer.init(jax.random.key(0), jnp.float32(inputs))
    weights = np.asarray(variables["params"]["kernel"], np.float64)
    pad = (kernel - 1) // 2
    padded = np.pad(inputs, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((n + 2 * pad - kernel) // stride + 1 for n in (height, width))
    expected = np.zeros((2, rows, columns, 4))
    for i in range(rows):
        for j in range(columns):
            window = padded[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            expected[:, i, j] = np.einsum("bhwc,hwcd->bd", window, weights)
    np.testing.assert_allclose(layer.apply(variables, jnp.float32(inputs)), expected, rtol=1e-5, atol=1e-5)


def test_imagenet_stem_is_padded_as_in_pytorch():
    network = NETWORKS.lookup("resnet18")(10, stop=1).clone(blocks=(0, 0, 0, 0))
    inputs = np.random.default_rng(3).normal(size=(1, 16, 16, 3))
    variables = network.init(jax.random.key(0), jnp.float32(inputs), train=False)
    actual = network.apply(variables, jnp.float32(inputs), train=False)
    weights = np.asarray(variables["params"]["stem_conv"]["kernel"], np.float64)
    padded = np.pad(inputs[0], ((3, 3), (3, 3), (0, 0)))
    convolved = np.zeros((8, 8, 64))
    for i, j in np.ndindex(8, 8):
        convolved[i, j] = np.einsum("hwc,hwcd->d", padded[2 * i : 2 * i + 7, 2 * j : 2 * j + 7], weights)
    activated = np.maximum(convolved / np.sqrt(1 + 1e-5), 0)  # fresh statistics
    padded = np.pad(activated, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = [padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] for i, j in np.ndindex(4, 4)]
    expected = np.reshape([window.max((0, 1)) for window in windows], (4, 4, 64))
    np.testing.assert_allclose(actual[0], expected, rtol=1e-4, atol=1e-5)


def test_norm_by_hand():
    inputs = np.random.default_rng(1).normal(3.0, 2.0, (4, 3, 3, 2))
    layer = base.batch_norm(train=True)
    outputs, variables = layer.init_with_output(jax.random.key(0), jnp.float32(inputs))
    mean, variance = inputs.mean((0, 1, 2)), inputs.var((0, 1, 2))
    np.testing.assert_allclose(outputs, (inputs - mean) / np.sqrt(variance + 1e-5), rtol=1e-4, atol=1e-5)
    _, updates = layer.apply(
        {**variables, "batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)}},
        jnp.float32(inputs),
        mutable=["batch_stats"],
    )
    # PyTorch's momentum 0.1; the variance is the biased one.
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.9 + 0.1 * variance, rtol=1e-5)


@pytest.mark.parametrize(
    ("offset", "dtype", "accelerator"),
    [(0, "float32", False), (1000, "float32", False), (1000, "float32", True), (4, "bfloat16", True)],
)
def test_norm_and_its_gradients(offset, dtype, accelerator):
    """Against the formula in NumPy float64; sums of squares alone would lose the variance at 1000."""
    rng = np.random.default_rng(2)
    x = np.float32(jnp.asarray(rng.normal(offset, 1.0, (4, 3, 5, 2)), dtype))
    gradient, scale, bias = rng.normal(size=x.shape), np.array([0.5, 2.0]), np.array([-1.0, 3.0])
    layer = base.batch_norm(train=True)
    statistics = {"mean": jnp.zeros(2), "var": jnp.ones(2)}

    def apply(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}
        return layer.apply(variables, x, mutable=["batch_stats"])

    with backend.as_accelerator(accelerator):
        given = [jnp.asarray(a, dtype) for a in (x, scale, bias)]
        outputs, pullback, updates = jax.vjp(apply, *given, has_aux=True)
        actual = outputs, *pullback(jnp.asarray(gradient, dtype))
    assert {a.dtype for a in actual} == {jnp.dtype(dtype)}
    atol = 1e-3 if dtype == "float32" else 2e-2 * np.abs(gradient).max()
    mean, deviation = np.float64(x).mean((0, 1, 2)), np.sqrt(np.float64(x).var((0, 1, 2)) + 1e-5)
    normal = (x - mean) / deviation
    by_scale, by_bias = (gradient * normal).sum((0, 1, 2)), gradient.sum((0, 1, 2))
    count = gradient[..., 0].size
    by_x = (gradient - by_bias / count - normal * by_scale / count) * scale / deviation
    for one, wanted in zip(actual, (normal * scale + bias, by_x, by_scale, by_bias), strict=True):
        np.testing.assert_allclose(np.float32(one), wanted, rtol=atol, atol=atol)
    stored = updates["batch_stats"]
    np.testing.assert_allclose(stored["mean"], 0.1 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stored["var"], 0.9 + 0.1 * (deviation**2 - 1e-5), rtol=1e-4)


def test_unknown_network_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown network 'resnet23'.*resnet20"):
        NETWORKS.lookup("resnet23")
    with pytest.raises(ConfigError, match=r"unknown network 'vit'.*known:.*resnet110.*resnet18"):
        NETWORKS.lookup("vit")
