"""Bottleneck, wide, dense and inception networks: published sizes, maps, values, cuts, initial biases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables

from ffl_jax.methods.subnetworks import build
from ffl_jax.models import NETWORKS, base

# (network, classes) -> trained numbers.
SIZES = [
    # By hand: stem 464; a stage of n blocks, p planes, inner width w, c channels before it:
    # (c + 4p)w + 9w^2 + 4w + 8p + 4cp + 8p, and (n - 1)(8pw + 9w^2 + 4w + 8p); head 257 a class.
    ("resnet110_bottleneck", 10, 1_147_738),
    ("resnet110_bottleneck", 100, 1_170_868),
    ("wrn20_8", 10, 6_848_090),
    ("wrn20_8", 100, 6_871_220),
    # As torchvision states it.
    ("resnet50", 1000, 25_557_032),
    # The shapes in the state dicts of FFSD's released code, without statistics and trans-fusion modules; for
    # 10 classes less 90 times (channels + 1).
    ("wrn16_2", 10, 692_810),
    ("wrn16_2", 100, 704_420),
    ("wrn40_2", 10, 2_246_474),
    ("wrn40_2", 100, 2_258_084),
    ("wrn28_10", 100, 36_546_980),
    ("densenet40_12", 10, 1_059_298),
    ("densenet40_12", 100, 1_100_428),
    ("googlenet", 10, 6_166_250),
    ("googlenet", 100, 6_258_500),
    # 0.8 M in the paper's table 2; the exact count is the one that re-implementations agree on.
    ("densenet_bc100_12", 10, 769_162),
    # The released codes, built and counted: ONE's ResNet-110, OKDDip's DenseNet-40-12, RepDistiller's WRNs.
    ("resnet164_bottleneck", 100, 1_727_284),
    ("densenet_bc40_12", 100, 188_092),
    ("wrn16_1_unbiased", 100, 180_916),
    ("wrn16_2_unbiased", 100, 703_284),
    ("wrn40_2_unbiased", 100, 2_255_156),
]
# The maps [side, channels] of 32 x 32 images; of 224 x 224 ones for ResNet-50.
MAPS = {
    "resnet110_bottleneck": [(32, 64), (16, 128), (8, 256)],
    "resnet164_bottleneck": [(32, 64), (16, 128), (8, 256)],
    "wrn20_8": [(32, 64), (16, 128), (8, 256)],
    "resnet50": [(56, 256), (28, 512), (14, 1024), (7, 2048)],
    "wrn16_2": [(32, 32), (16, 64), (8, 128)],
    "wrn40_2": [(32, 32), (16, 64), (8, 128)],
    "wrn28_10": [(32, 160), (16, 320), (8, 640)],
    "wrn16_1_unbiased": [(32, 16), (16, 32), (8, 64)],
    "wrn16_2_unbiased": [(32, 32), (16, 64), (8, 128)],
    "wrn40_2_unbiased": [(32, 32), (16, 64), (8, 128)],
    "densenet40_12": [(32, 168), (16, 312), (8, 456)],
    "densenet_bc40_12": [(32, 96), (16, 120), (8, 132)],
    "densenet_bc100_12": [(32, 216), (16, 300), (8, 342)],
    "googlenet": [(32, 480), (16, 832), (8, 1024)],
}
# Small forms of each family, for values.
SMALL = {
    "resnet110_bottleneck": dict(blocks=2),
    "wrn16_2": dict(blocks=2),
    "wrn16_2_unbiased": dict(blocks=2),
    "densenet40_12": dict(layers=2, growth=3),
    "densenet_bc100_12": dict(layers=2, growth=3),
    "googlenet": dict(
        widths=(
            (((2,), (3, 4), (2, 3, 5), (3,)), ((3,), (2, 4), (2, 2, 3), (2,))),
            (((2,), (3, 2), (1, 3, 2), (3,)),),
            (((4,), (2, 3), (3, 3, 2), (1,)),),
        )
    ),
}


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("name", "classes", "expected"), SIZES)
def test_sizes_and_maps(name, classes, expected):
    network, side = NETWORKS.lookup(name)(classes), 224 if name == "resnet50" else 32
    outputs, variables = jax.eval_shape(
        functools.partial(network.init_with_output, train=False),
        jax.random.key(0),
        jnp.zeros((2, side, side, 3)),
    )
    assert size(variables["params"]) == expected
    assert [x.shape for x in outputs.feature_maps] == [(2, side, side, width) for side, width in MAPS[name]]
    assert outputs.features.shape == (2, MAPS[name][-1][1])
    assert outputs.logits.shape == (2, classes)


class Reference:
    """The networks' layers in NumPy, on a tree of parameters and with the statistics of the batch."""

    def __init__(self, params):
        self.params = jax.tree.map(np.asarray, params)
        self.statistics = {}  # path of a norm -> (mean, variance) of the batch

    def conv(self, x, path, stride=1):
        layer = functools.reduce(dict.__getitem__, path.split("/"), self.params)
        kernel = layer["kernel"]
        size = len(kernel)
        x = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
        rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
        sums = 0
        for i, j in np.ndindex(size, size):
            window = x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
            sums = sums + window[:, :rows, :columns] @ kernel[i, j]
        return sums + layer.get("bias", 0)

    def norm(self, x, path, relu=True):
        layer = functools.reduce(dict.__getitem__, path.split("/"), self.params)
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        self.statistics[path] = mean, variance
        x = (x - mean) / np.sqrt(variance + 1e-5) * layer["scale"] + layer["bias"]
        return np.maximum(x, 0) if relu else x

    def max_pool(self, x, stride):
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        rows, columns = ((n - 3) // stride + 1 for n in x.shape[1:3])
        windows = [
            x[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns]
            for i, j in np.ndindex(3, 3)
        ]
        return np.max(windows, axis=0)


def bottleneck_resnet(net, x):
    x = net.norm(net.conv(x, "stem_conv"), "stem_norm")
    for stage in (1, 2, 3):
        for block in (1, 2):
            at = f"stage{stage}_block{block}"
            stride = 2 if stage > 1 and block == 1 else 1
            y = net.norm(net.conv(x, f"{at}/conv1"), f"{at}/norm1")
            y = net.norm(net.conv(y, f"{at}/conv2", stride), f"{at}/norm2")
            y = net.norm(net.conv(y, f"{at}/conv3"), f"{at}/norm3", relu=False)
            if block == 1:
                x = net.norm(net.conv(x, f"{at}/shortcut_conv", stride), f"{at}/shortcut_norm", relu=False)
            x = np.maximum(x + y, 0)
        yield x


def wide_resnet(net, x):
    x = net.conv(x, "stem_conv")
    for stage in (1, 2, 3):
        for block in (1, 2):
            at = f"stage{stage}_block{block}"
            stride = 2 if stage > 1 and block == 1 else 1
            y = net.conv(net.norm(x, f"{at}/norm1"), f"{at}/conv1")
            y = net.conv(net.norm(y, f"{at}/norm2"), f"{at}/conv2", stride)
            x = y + (net.conv(x, f"{at}/shortcut_conv", stride) if block == 1 else x)
        yield net.norm(x, "stage3_norm") if stage == 3 else x


def unbiased_wide_resnet(net, x):
    x = net.conv(x, "stem_conv")
    for stage in (1, 2, 3):
        for block in (1, 2):
            at = f"stage{stage}_block{block}"
            stride = 2 if stage > 1 and block == 1 else 1
            activated = net.norm(x, f"{at}/norm1")
            y = net.conv(net.norm(net.conv(activated, f"{at}/conv1", stride), f"{at}/norm2"), f"{at}/conv2")
            x = y + (net.conv(activated, f"{at}/shortcut_conv", stride) if block == 1 else x)
        yield net.norm(x, "stage3_norm") if stage == 3 else x


def densenet(net, x, bottleneck):
    x = net.conv(x, "stem_conv")
    for stage in (1, 2, 3):
        if stage > 1:
            x = net.conv(net.norm(x, f"stage{stage}_transition_norm"), f"stage{stage}_transition_conv")
            rows, columns = (n // 2 for n in x.shape[1:3])
            x = x[:, : 2 * rows, : 2 * columns].reshape(len(x), rows, 2, columns, 2, -1).mean((2, 4))
        for layer in (1, 2):
            at = f"stage{stage}_layer{layer}"
            y = net.conv(net.norm(x, f"{at}/norm1"), f"{at}/conv1")
            if bottleneck:
                y = net.conv(net.norm(y, f"{at}/norm2"), f"{at}/conv2")
            x = np.concatenate([x, y], -1)
        yield net.norm(x, "stage3_norm") if stage == 3 else x


def googlenet(net, x):
    x = net.norm(net.conv(x, "stem_conv"), "stem_norm")
    for stage, blocks in ((1, 2), (2, 1), (3, 1)):
        if stage > 1:
            x = net.max_pool(x, 2)
        for block in range(1, blocks + 1):
            joined = []
            for branch, layers in ((1, 1), (2, 2), (3, 3), (4, 1)):
                y = net.max_pool(x, 1) if branch == 4 else x
                for layer in range(1, layers + 1):
                    at = f"stage{stage}_block{block}/branch{branch}_"
                    y = net.norm(net.conv(y, f"{at}conv{layer}"), f"{at}norm{layer}")
                joined.append(y)
            x = np.concatenate(joined, -1)
        yield x


REFERENCES = {
    "resnet110_bottleneck": bottleneck_resnet,
    "wrn16_2": wide_resnet,
    "wrn16_2_unbiased": unbiased_wide_resnet,
    "densenet40_12": functools.partial(densenet, bottleneck=False),
    "densenet_bc100_12": functools.partial(densenet, bottleneck=True),
    "googlenet": googlenet,
}


@pytest.mark.parametrize("name", SMALL)
def test_values_and_cuts(name):
    """Float64, with batch statistics, of the whole network and of trunk and branch cut at every stage."""
    with jax.enable_x64(True):
        network = NETWORKS.lookup(name)(5).clone(**SMALL[name])
        # Even and odd sides: a stride of 2 shows on which side the padding is.
        inputs = np.random.default_rng(1).normal(size=(3, 10, 6, 3))
        variables = draw_variables(network, jnp.asarray(inputs))

        @jax.jit
        def run(variables, inputs):
            whole = network.apply(variables, inputs, True, mutable=["batch_stats"])
            parts = []
            for cut in (1, 2):
                trunk, branch = network.clone(stop=cut), network.clone(start=cut)
                middle, trunk_updates = trunk.apply(variables, inputs, True, mutable=["batch_stats"])
                outputs, branch_updates = branch.apply(variables, middle, True, mutable=["batch_stats"])
                parts.append((middle, outputs, trunk_updates["batch_stats"], branch_updates["batch_stats"]))
            return whole, parts

        (whole, updates), parts = run(variables, inputs)

    net = Reference(variables["params"])
    maps = list(REFERENCES[name](net, inputs))
    for actual, expected in zip(whole.feature_maps, maps, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
    features, head = maps[-1].mean((1, 2)), net.params["head"]
    np.testing.assert_allclose(whole.features, features, rtol=1e-9)
    np.testing.assert_allclose(whole.logits, features @ head["kernel"] + head["bias"], rtol=1e-9, atol=1e-9)

    old, new = (dict(walk(tree)) for tree in (variables["batch_stats"], updates["batch_stats"]))
    assert {path.rpartition("/")[0] for path in new} == set(net.statistics)
    for path, (mean, variance) in net.statistics.items():
        # The share of the old statistics: 1 - PyTorch's momentum, 0.1 but for the wide network's last norm.
        keep = 0.1 if name == "wrn16_2" and path == "stage3_norm" else 0.9
        for leaf, value in (("mean", mean), ("var", variance)):
            expected = keep * old[f"{path}/{leaf}"] + (1 - keep) * value
            np.testing.assert_allclose(new[f"{path}/{leaf}"], expected, rtol=1e-9, atol=1e-9)

    for cut, (middle, outputs, trunk_updates, branch_updates) in zip((1, 2), parts, strict=True):
        np.testing.assert_allclose(middle, maps[cut - 1], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(outputs.logits, whole.logits, rtol=1e-12)
        assert len(outputs.feature_maps) == 3 - cut
        trunk_updates, branch_updates = dict(walk(trunk_updates)), dict(walk(branch_updates))
        for path, value in new.items():
            in_branch = path.startswith("stage") and int(path[5]) > cut
            actual = (branch_updates if in_branch else trunk_updates)[path]
            np.testing.assert_allclose(actual, value, rtol=1e-12)


def walk(tree):
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(key.key for key in path), np.asarray(value)


@pytest.mark.parametrize("name", SMALL)
def test_names_do_not_depend_on_the_cut(name):
    """Stacked at every stage, its trunk and branches hold the names and shapes of the whole network."""
    network, images = NETWORKS.lookup(name)(5).clone(**SMALL[name]), jnp.zeros((1, 8, 8, 3))

    def shapes(module):
        return jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), images)

    whole = shapes(network)
    for cut in (0, 1, 2):
        stacked = build(name, 2, 5, cut).clone(network=network)
        variables = shapes(stacked)
        for kind in ("params", "batch_stats"):
            trunk = variables[kind].get("trunk", {})
            branch = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), variables[kind]["branches"]
            )
            assert not trunk.keys() & branch.keys()
            assert {**trunk, **branch} == whole[kind]


# By the released codes, RepDistiller's and OKDDip's: the standard deviation of each convolution from its
# outputs or its inputs, by hand, and heads without a bias at first.
@pytest.mark.parametrize(
    ("name", "deviations"),
    [
        # sqrt(2 / (9 * 128)), sqrt(2 / 128)
        ("wrn16_2_unbiased", {"stage3_block1/conv1": 0.041667, "stage3_block1/shortcut_conv": 0.125}),
        # sqrt(2 / 27), sqrt(2 / 96), sqrt(2 / (9 * 48))
        (
            "densenet_bc40_12",
            {"stem_conv": 0.272166, "stage2_transition_conv": 0.144338, "stage3_layer2/conv2": 0.068041},
        ),
        # sqrt(2 / (9 * 12)), sqrt(2 / 168)
        ("densenet40_12", {"stage1_layer1/conv1": 0.136083, "stage2_transition_conv": 0.109109}),
    ],
)
def test_what_convolutions_and_heads_start_from(name, deviations):
    network = NETWORKS.lookup(name)(100)
    init = jax.jit(functools.partial(network.init, train=False))
    params = dict(walk(init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]))
    for path, expected in deviations.items():
        kernel = params[f"{path}/kernel"]
        assert abs(kernel.std() / expected - 1) < 4 / np.sqrt(2 * kernel.size), path
    assert np.any(params["head/bias"]) == (name == "densenet40_12")
    bound = len(params["head/kernel"]) ** -0.5
    assert 0.9 * bound < np.abs(params["head/kernel"]).max() <= bound + 1e-6
    if name == "wrn16_2_unbiased":
        assert not any("conv" in path and path.endswith("bias") for path in params)


def test_biases_start_uniform_by_the_inputs_of_a_convolution():
    network = NETWORKS.lookup("wrn16_2")(10)
    variables = jax.jit(functools.partial(network.init, train=False))(
        jax.random.key(0), jnp.zeros((1, 4, 4, 3))
    )
    # PyTorch's default: 1 / sqrt(kernel^2 channels), by hand. 9 * 32, 9 * 128, 32.
    block2, block3 = variables["params"]["stage2_block1"], variables["params"]["stage3_block2"]
    for layer, bound in (
        (block2["conv1"], 0.058926),
        (block3["conv2"], 0.029463),
        (block2["shortcut_conv"], 0.176777),
    ):
        bias = np.asarray(layer["bias"])
        assert 0.85 * bound < np.abs(bias).max() <= bound + 1e-6
        assert abs(bias.std() / (bound / np.sqrt(3)) - 1) < 4 / np.sqrt(2 * bias.size)
        assert abs(bias.mean()) < 4 * bound / np.sqrt(3 * bias.size)
    # Weights by the outputs, as without a bias: sqrt(2 / (9 * 128)).
    kernel = np.asarray(block3["conv2"]["kernel"])
    assert abs(kernel.std() / 0.041667 - 1) < 4 / np.sqrt(2 * kernel.size)
    assert (
        "bias"
        not in jax.eval_shape(base.conv(4, 3).init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    )
