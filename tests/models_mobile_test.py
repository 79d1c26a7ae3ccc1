"""VGG, MobileNet and ShuffleNet: sizes, shapes, cuts into trunk and branch, and their blocks in NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables

from ffl_jax.errors import ConfigError
from ffl_jax.models import NETWORKS, base, mobilenet, shufflenet


def shapes(module, side):
    """Shapes of what `module` computes for two images and of its variables."""
    run = functools.partial(module.init_with_output, train=False)
    return jax.eval_shape(run, jax.random.key(0), jnp.zeros((2, side, side, 3)))


# With 100 classes, the released code of the CRD benchmark; with 1000, the tables of PyTorch's torchvision.
# By hand from the latter: MobileNet less 1281 * 990, ShuffleNet less 1025 * 900, and VGG-16, which with norms
# has 138,365,992 there, less three linear layers of 123,642,856 and with one of 513 * 100.
@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("vgg8", 100, 3_965_028),
        ("vgg13", 100, 9_462_180),
        ("vgg16", 100, 14_774_436),
        # MCL-OKD's and OKDDip's released codes, built and counted.
        ("vgg16_pool5", 100, 14_774_436),
        ("vgg16_pool5_linear3", 100, 15_299_748),
        ("mobilenetv2", 1000, 3_504_872),
        ("mobilenetv2", 10, 2_236_682),
        ("mobilenetv2_x0_5", 100, 812_836),
        ("shufflenetv1", 100, 949_258),
        ("shufflenetv2", 1000, 2_278_604),
        ("shufflenetv2", 100, 1_356_104),
    ],
)
def test_parameter_counts(name, classes, expected):
    _, variables = shapes(NETWORKS.lookup(name)(classes), 32)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected


# By hand: a halving takes n to ceil(n / 2), VGG's to floor(n / 2). From 224 pixels MobileNetV2 and
# ShuffleNetV2 end at 7, as in the tables of their papers.
@pytest.mark.parametrize(
    ("name", "side", "sides"),
    [
        ("vgg8", 32, (32, 16, 8, 4, 4)),
        ("vgg13", 32, (32, 16, 8, 4, 4)),
        ("vgg16", 32, (32, 16, 8, 4, 4)),
        ("vgg16", 224, (224, 112, 56, 28, 14)),
        ("vgg16_pool5", 32, (32, 16, 8, 4, 1)),
        ("vgg16_pool5_linear3", 32, (32, 16, 8, 4, 1)),
        ("vgg16_pool5", 64, (64, 32, 16, 8, 2)),
        ("vgg8", 8, (8, 4, 2, 1, 1)),
        ("vgg8", 63, (63, 31, 15, 7, 7)),
        ("vgg8", 64, (64, 32, 16, 8, 4)),
        ("mobilenetv2", 28, (28, 28, 14, 7, 4)),
        ("mobilenetv2", 32, (32, 32, 16, 8, 4)),
        ("mobilenetv2", 63, (63, 63, 32, 16, 8)),
        ("mobilenetv2", 64, (32, 32, 16, 8, 4)),
        ("mobilenetv2", 126, (63, 63, 32, 16, 8)),
        ("mobilenetv2", 127, (64, 32, 16, 8, 4)),
        ("mobilenetv2", 224, (112, 56, 28, 14, 7)),
        ("mobilenetv2_x0_5", 32, (16, 16, 8, 4, 2)),
        ("mobilenetv2_x0_5", 224, (112, 112, 56, 28, 14)),
        ("shufflenetv1", 32, (16, 8, 4)),
        ("shufflenetv1", 224, (112, 56, 28)),
        ("shufflenetv2", 32, (16, 8, 4)),
        ("shufflenetv2", 63, (32, 16, 8)),
        ("shufflenetv2", 64, (16, 8, 4)),
        ("shufflenetv2", 126, (32, 16, 8)),
        ("shufflenetv2", 127, (16, 8, 4)),
        ("shufflenetv2", 224, (28, 14, 7)),
    ],
)
def test_shapes_of_the_outputs(name, side, sides):
    widths = {
        "vgg": (64, 128, 256, 512, 512),
        "mobilenetv2": (16, 24, 32, 96, 1280),
        "mobilenetv2_x0_5": (8, 12, 16, 48, 1280),
        "shufflenetv1": (240, 480, 960),
        "shufflenetv2": (116, 232, 1024),
    }["vgg" if name.startswith("vgg") else name]
    outputs, _ = shapes(NETWORKS.lookup(name)(10), side)
    expected = [(2, side, side, width) for side, width in zip(sides, widths, strict=True)]
    assert [x.shape for x in outputs.feature_maps] == expected
    assert outputs.features.shape == (2, widths[-1])
    assert outputs.logits.shape == (2, 10)


def test_early_stride_asks_the_shorter_side():
    sides = [(64, 64), (63, 64), (64, 63), (200, 32)]
    assert [base.early_stride(jnp.zeros((1, *side, 3))) for side in sides] == [2, 1, 1, 1]


# A branch does not see the image: MobileNet's halves the map of 64 from an image of 128, but not the map of
# 32 from an image of 64; VGG's pools the map of 8 from an image of 64.
@pytest.mark.parametrize(
    ("name", "side"),
    [
        *(("vgg8", 64), ("vgg16_pool5_linear3", 32), ("mobilenetv2", 64), ("mobilenetv2", 128)),
        *(("shufflenetv1", 64), ("shufflenetv2", 64)),
    ],
)
def test_every_cut_keeps_names_and_shapes(name, side):
    network = NETWORKS.lookup(name)(10)
    whole, variables = shapes(network, side)
    for cut in range(1, network.num_stages):
        middle, trunk = shapes(network.clone(stop=cut), side)
        init = functools.partial(network.clone(start=cut).init_with_output, train=False)
        outputs, branch = jax.eval_shape(init, jax.random.key(0), middle)
        assert not trunk["params"].keys() & branch["params"].keys()
        joined = {kind: trunk[kind] | branch[kind] for kind in ("params", "batch_stats")}
        chex.assert_trees_all_equal_shapes_and_dtypes(joined, variables)
        assert (middle, *outputs.feature_maps) == whole.feature_maps[cut - 1 :]


@pytest.mark.parametrize(
    ("name", "side", "cut"),
    [("vgg8", 16, 4), ("vgg16_pool5_linear3", 32, 4), ("mobilenetv2", 64, 1), ("shufflenetv2", 64, 2)],
)
def test_trunk_and_branch_are_cuts_of_the_whole_network(name, side, cut):
    network = NETWORKS.lookup(name)(10)
    inputs = jax.random.normal(jax.random.key(1), (4, side, side, 3))
    variables = draw_variables(network, inputs)

    @jax.jit
    def run(variables, inputs):
        def apply(network, inputs):
            outputs, updates = network.apply(variables, inputs, True, mutable=["batch_stats"])
            return outputs, updates["batch_stats"]

        middle, trunk_updates = apply(network.clone(stop=cut), inputs)
        outputs, branch_updates = apply(network.clone(start=cut), middle)
        return apply(network, inputs), middle, outputs, trunk_updates, branch_updates

    (whole, updates), middle, outputs, trunk_updates, branch_updates = run(variables, inputs)
    in_trunk = {key for key in updates if key.startswith("stem") or int(key[5]) <= cut}
    joined = {key: (trunk_updates if key in in_trunk else branch_updates)[key] for key in updates}
    expected = (whole.feature_maps[cut - 1], whole.feature_maps[cut:], whole.logits, updates)
    chex.assert_trees_all_close(
        (middle, outputs.feature_maps, outputs.logits, joined), expected, rtol=1e-6, atol=1e-6
    )
    assert np.ptp(whole.logits, axis=0).min() > 1e-3


def windows_of(x, size, stride):
    """[B, H, W, D] -> [B, H / stride, W / stride, D, size, size], zeros alike on every side of the map."""
    pad = (size - 1) // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))[:, ::stride, ::stride]


class InNumpy:
    """Layers in float64, given the variables of a module; `name` is that of the convolution and its norm."""

    def __init__(self, variables):
        variables = jax.tree.map(np.asarray, variables)
        self.params, self.statistics = variables["params"], variables["batch_stats"]

    def convolve(self, x, name, stride=1, groups=1):
        kernel, bias = self.params[name]["kernel"], self.params[name].get("bias", 0)
        windows = windows_of(x, len(kernel), stride)
        # Group g of the outputs sees group g of the inputs.
        parts = zip(np.split(windows, groups, axis=3), np.split(kernel, groups, axis=3), strict=True)
        return np.concatenate([np.einsum("bxyihw,hwio->bxyo", *part) for part in parts], axis=3) + bias

    def norm(self, x, name):
        params, statistics = self.params[name], self.statistics[name]
        spread = np.sqrt(statistics["var"] + 1e-5)
        return (x - statistics["mean"]) / spread * params["scale"] + params["bias"]

    def layer(self, x, name, stride=1, groups=1):
        return self.norm(self.convolve(x, f"{name}_conv", stride, groups), f"{name}_norm")

    def depthwise(self, x, name, stride=1):
        return self.layer(x, name, stride, groups=x.shape[-1])


def relu(x):
    return np.maximum(x, 0)


def shuffle(x, groups):
    """Deals the channels out: the first of every group, then the second of every group, and so on."""
    each = x.shape[-1] // groups
    return x[..., [group * each + i for i in range(each) for group in range(groups)]]


def inverted_residual(layers, x, stride, expand, residual, ceiling=6):
    y = np.clip(layers.layer(x, "expand"), 0, ceiling) if expand else x
    y = np.clip(layers.depthwise(y, "depthwise", stride), 0, ceiling)
    y = layers.layer(y, "project")
    return x + y if residual else y


def unit_v1(layers, x, stride, groups):
    y = shuffle(relu(layers.layer(x, "reduce", groups=groups)), groups)
    y = relu(layers.depthwise(y, "depthwise", stride))
    y = layers.layer(y, "expand", groups=3)
    if stride == 1:
        return relu(x + y)
    return relu(np.concatenate([y, windows_of(x, 3, stride).mean((-2, -1))], axis=-1))


def unit_v2(layers, x, stride):
    if stride == 1:
        left, right = np.split(x, 2, axis=-1)
    else:
        left, right = layers.depthwise(x, "shortcut_depthwise", 2), x
        left = relu(layers.layer(left, "shortcut_pointwise"))
    right = relu(layers.layer(right, "pointwise1"))
    right = relu(layers.layer(layers.depthwise(right, "depthwise", stride), "pointwise2"))
    return shuffle(np.concatenate([left, right], axis=-1), 2)


# (block, channels of its input, the block in NumPy, its settings)
BLOCKS = [
    (mobilenet.InvertedResidual(4), 4, inverted_residual, (1, True, True)),
    (mobilenet.InvertedResidual(5), 4, inverted_residual, (1, True, False)),
    (mobilenet.InvertedResidual(4, stride=2), 4, inverted_residual, (2, True, False)),
    (mobilenet.InvertedResidual(3, expansion=0), 4, inverted_residual, (1, False, False)),
    (shufflenet.UnitV1(24), 24, unit_v1, (1, 3)),
    (shufflenet.UnitV1(36, stride=2), 12, unit_v1, (2, 3)),
    (shufflenet.UnitV1(32, stride=2, groups=1), 8, unit_v1, (2, 1)),
    (shufflenet.UnitV2(8), 8, unit_v2, (1,)),
    (shufflenet.UnitV2(10, stride=2), 6, unit_v2, (2,)),
]


@pytest.mark.parametrize(("block", "channels", "in_numpy", "settings"), BLOCKS)
def test_blocks_against_numpy(block, channels, in_numpy, settings):
    # An even and an odd side: at stride 2 "SAME" would pad the even one on one side only.
    inputs = np.random.default_rng(1).normal(0, 10, (2, 6, 5, channels))
    with jax.enable_x64(True):
        variables = draw_variables(block, jnp.asarray(inputs))
        actual = jax.jit(functools.partial(block.apply, train=False))(variables, inputs)
    expected = in_numpy(InNumpy(variables), inputs, *settings)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_channel_shuffle_by_hand():
    x = jnp.arange(12).reshape(1, 1, 2, 6)
    # Three groups of two, [0 1] [2 3] [4 5]: first the first of each, then the second.
    expected = [[0, 2, 4, 1, 3, 5], [6, 8, 10, 7, 9, 11]]
    np.testing.assert_array_equal(shufflenet.channel_shuffle(x, 3)[0, 0], expected)
    # Two groups of three, [0 1 2] [3 4 5].
    np.testing.assert_array_equal(shufflenet.channel_shuffle(x, 2)[0, 0, 0], [0, 3, 1, 4, 2, 5])
    np.testing.assert_array_equal(shufflenet.channel_shuffle(x, 1), x)


@pytest.mark.parametrize(
    ("name", "side", "stride"),
    [
        ("mobilenetv2", 10, 1),
        ("mobilenetv2", 64, 2),
        ("mobilenetv2_x0_5", 10, 2),
        ("shufflenetv1", 10, 1),
        ("shufflenetv2", 10, 1),
        ("shufflenetv2", 64, 2),
        ("shufflenetv2", 128, 2),
    ],
)
def test_stems_against_numpy(name, side, stride):
    inputs = np.random.default_rng(2).normal(0, 5, (1, side, side, 3))
    network = NETWORKS.lookup(name)(10, stop=0)
    with jax.enable_x64(True):
        variables = draw_variables(network, jnp.asarray(inputs))
        actual = jax.jit(functools.partial(network.apply, train=False))(variables, inputs)
    expected = relu(InNumpy(variables).layer(inputs, "stem", stride))
    if name == "mobilenetv2":
        expected = np.minimum(expected, 6)
    if side == 128:
        expected = windows_of(expected, 3, 2).max(
            (-2, -1)
        )  # after ReLU the zeros at the border do not matter
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "index", "side", "pooled"),
    [
        *(("vgg13", 0, 6, False), ("vgg13", 2, 6, True), ("vgg13", 4, 7, False), ("vgg13", 4, 8, True)),
        *(("vgg16_pool5", 1, 6, True), ("vgg16_pool5", 4, 4, True)),
    ],
)
def test_stages_of_vgg_against_numpy(name, index, side, pooled):
    x = np.random.default_rng(3).normal(size=(1, side, side, 3))
    network = NETWORKS.lookup(name)(10, start=index, stop=index + 1).clone(convolutions=(2,) * 5)
    with jax.enable_x64(True):
        variables = draw_variables(network, jnp.asarray(x))
        actual = jax.jit(functools.partial(network.apply, train=False))(variables, x)
    layers = InNumpy(variables)
    x = halve(x) if pooled else x
    for layer in (1, 2):
        convolved = layers.convolve(x, f"stage{index + 1}_conv{layer}")
        x = relu(layers.norm(convolved, f"stage{index + 1}_norm{layer}"))
    x = halve(x) if (name, index) == ("vgg16_pool5", 4) else x
    np.testing.assert_allclose(actual, x, rtol=1e-9, atol=1e-9)


def halve(x):
    batch, rows, columns, features = x.shape
    return x.reshape(batch, rows // 2, 2, columns // 2, 2, features).max((2, 4))


def test_three_linear_layers_against_numpy():
    """From one branch's map, all zero where the last ReLU says so."""
    network = NETWORKS.lookup("vgg16_pool5_linear3")(10, start=4).clone(convolutions=(1,) * 5)
    inputs = np.random.default_rng(5).normal(size=(3, 4, 4, 8))
    with jax.enable_x64(True):
        variables = draw_variables(network, jnp.asarray(inputs))
        outputs = jax.jit(functools.partial(network.apply, train=False))(variables, inputs)
    params = jax.tree.map(np.asarray, variables["params"])
    features = np.asarray(outputs.feature_map)[:, 0, 0]
    np.testing.assert_allclose(outputs.features, features)
    for layer in ("hidden1_head", "hidden2_head"):
        features = relu(features @ params[layer]["kernel"] + params[layer]["bias"])
    expected = features @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-9)


@pytest.mark.parametrize(("name", "ceiling"), [("mobilenetv2", 6), ("mobilenetv2_x0_5", np.inf)])
def test_second_stage_of_mobilenet_against_numpy(name, ceiling):
    x = np.random.default_rng(4).normal(0, 10, (1, 6, 5, 4))
    network = NETWORKS.lookup(name)(10, start=1, stop=2)
    with jax.enable_x64(True):
        variables = draw_variables(network, jnp.asarray(x))
        actual = jax.jit(functools.partial(network.apply, train=False))(variables, x)
    for block, residual in (("stage2_block1", False), ("stage2_block2", True)):
        layers = InNumpy({kind: tree[block] for kind, tree in variables.items()})
        x = inverted_residual(layers, x, 1, True, residual, ceiling)
    np.testing.assert_allclose(actual, x, rtol=1e-9, atol=1e-9)


# The last stage alone, on a map as it comes there; its conv1x1 is part of it.
@pytest.mark.parametrize(
    ("name", "channels", "highest"),
    [("mobilenetv2", 96, 6), ("mobilenetv2_x0_5", 48, None), ("shufflenetv2", 232, None)],
)
def test_last_map_is_what_the_head_pools(name, channels, highest):
    network = NETWORKS.lookup(name)(10)
    network = network.clone(start=network.num_stages - 1)
    inputs = jax.random.normal(jax.random.key(1), (2, 4, 4, channels))
    variables = draw_variables(network, inputs)
    outputs = jax.jit(functools.partial(network.apply, train=False))(variables, inputs)
    assert outputs.feature_map.min() == 0  # after the last ReLU
    if highest:
        assert outputs.feature_map.max() == highest
    else:
        assert outputs.feature_map.max() > 7
    features = np.asarray(outputs.feature_map, np.float64).mean((1, 2))
    head = variables["params"]["head"]
    np.testing.assert_allclose(outputs.logits, features @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-4)


def test_biases_of_vgg_start_at_zero():
    network = NETWORKS.lookup("vgg8")(10, stop=1)
    init = jax.jit(functools.partial(network.init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    np.testing.assert_array_equal(params["stage1_conv1"]["bias"], np.zeros(64))


# By the released code of the CRD benchmark and, for VGG-16 with three linear layers, OKDDip's.
@pytest.mark.parametrize(
    "name", ["vgg8", "vgg16_pool5_linear3", "mobilenetv2", "mobilenetv2_x0_5", "shufflenetv1", "shufflenetv2"]
)
def test_what_kernels_start_from(name):
    network = NETWORKS.lookup(name)(100)
    network = network.clone(start=network.num_stages - 1)
    init = jax.jit(functools.partial(network.init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 4, 4, 48)))["params"]
    for path, kernel in jax.tree_util.tree_leaves_with_path(params):
        names, kernel = [key.key for key in path], np.asarray(kernel)
        in_head = any(part.endswith("head") for part in names)
        if names[-1] == "bias" and in_head and not name.startswith("shuffle"):
            np.testing.assert_array_equal(kernel, 0, str(names))
        if names[-1] != "kernel":
            continue
        inputs, outputs = np.prod(kernel.shape[:-1]), np.prod(kernel.shape[:-2]) * kernel.shape[-1]
        if name.startswith("shuffle"):  # uniform between +-1 / sqrt(inputs), head and convolutions
            expected = (3 * inputs) ** -0.5
            assert np.abs(kernel).max() <= inputs**-0.5 + 1e-6
        else:  # normal
            expected = 0.01 if in_head else (2 / outputs) ** 0.5
            assert np.abs(kernel).max() > 2 * expected
        assert abs(kernel.std() / expected - 1) < 5 / np.sqrt(2 * kernel.size), names


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("vgg8", 7, r"three times, but stage 4 got a map of 1 pixel.*at least 8"),
        ("vgg16_pool5", 31, r"five times, but stage 5 got a map of 1 pixel.*at least 32"),
    ],
)
def test_vgg_refuses_images_that_it_cannot_halve(name, side, message):
    with pytest.raises(ConfigError, match=message):
        shapes(NETWORKS.lookup(name)(10), side)
