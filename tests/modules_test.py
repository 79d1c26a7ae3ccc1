"""The fusion module against numbers and loops in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar100
from ffl_jax.methods import METHODS
from ffl_jax.methods.modules import FusionModule, ResolutionAdaptor, adaptive_average_pool
from ffl_jax.methods.subnetworks import build
from ffl_jax.training import optimizers


def fill(shape, a, b):
    """Numbers in -1..1 that need no generator."""
    return ((np.arange(np.prod(shape)) * a + b) % 101 - 50.0).reshape(shape) / 50


def example(num):
    """Maps, and variables of a module for them: 2 channels each, 3 classes, fresh norms."""
    maps = [jnp.float32(fill((2, 2, 2, 2), *ab)) for ab in [(3, 1), (5, 2), (9, 3)][:num]]
    module = FusionModule(3)
    variables = jax.jit(functools.partial(module.init, train=False))(jax.random.key(0), maps)
    variables["params"]["depthwise_conv"]["kernel"] = fill((3, 3, 1, 2 * num), 7, 0)
    variables["params"]["pointwise_conv"]["kernel"] = fill((1, 1, 2 * num, 2), 13, 0)
    variables["params"]["head"] = {"kernel": fill((2, 3), 17, 0), "bias": fill((3,), 19, 0)}
    return module, jax.tree.map(jnp.float32, variables), maps


def apply(module, variables, *inputs):
    """(training outputs, new statistics, inference outputs), the latter with the old statistics."""

    @jax.jit
    def run(variables, inputs):
        outputs, updates = module.apply(variables, *inputs, train=True, mutable=["batch_stats"])
        return outputs, updates.get("batch_stats"), module.apply(variables, *inputs, train=False)

    return run(variables, inputs)


def test_fusion_of_two():
    (outputs, _), statistics, (inference, _) = apply(*example(2))
    # NumPy, float64: convolutions as loops.
    expected = [[-1.444209, -0.644160, 0.155889], [-1.382106, -0.872190, -0.362274]]
    np.testing.assert_allclose(outputs, expected, atol=5e-6)
    norm = statistics["depthwise_norm"]
    np.testing.assert_allclose(norm["mean"], [0.040970, 0.047780, 0.005160, 0.017610], atol=1e-6)
    # The biased variance: PyTorch stores [0.946850, 0.929505, 0.925484, 0.931468].
    np.testing.assert_allclose(norm["var"], [0.940993, 0.925817, 0.922299, 0.927535], atol=1e-6)
    expected = [[-1.117036, -0.636018, -0.155000], [-1.000000, -0.620000, -0.240000]]
    np.testing.assert_allclose(inference, expected, atol=5e-6)


def test_fusion_of_three():
    (outputs, fused_map), _, _ = apply(*example(3))
    # NumPy, float64.
    expected = [[-1.626503, -0.858828, -0.091152], [-1.130737, -0.583424, -0.036111]]
    np.testing.assert_allclose(outputs, expected, atol=5e-6)
    expected = [[[0.524520, 0.551317], [0.843371, 0.377762]], [[1.178413, 1.085504], [0, 0]]]
    np.testing.assert_allclose(fused_map[0], expected, atol=5e-6)


def shapes(module, *inputs):
    """(shapes of the outputs, {parameter: shape}), without computing anything."""
    inputs = jax.tree.map(jnp.zeros, inputs, is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], int))
    outputs, variables = jax.eval_shape(
        functools.partial(module.init_with_output, train=False), jax.random.key(0), *inputs
    )
    leaves = jax.tree_util.tree_leaves_with_path(variables.get("params", {}))
    parameters = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    return jax.tree.map(jnp.shape, outputs), parameters


@pytest.mark.parametrize(
    ("size", "target", "halvings"),
    [
        ((8, 8), (8, 8), 0),
        ((8, 8), (4, 4), 1),
        ((16, 16), (4, 4), 2),
        ((32, 32), (4, 4), 3),
        ((12, 20), (6, 10), 1),
        ((7, 7), (4, 4), None),  # None: adaptive average pool
        ((6, 6), (4, 4), None),
        ((12, 12), (4, 4), None),  # a ratio, but no power of two
        ((8, 8), (4, 2), None),  # powers of two, but not the same
        ((8, 8), (8, 4), None),
        ((8, 6), (4, 4), None),
    ],
)
def test_adaptors(size, target, halvings):
    shape, parameters = shapes(ResolutionAdaptor(*target), (2, *size, 5))
    assert shape == (2, *target, 5)
    expected = {}
    for step in range(1, (halvings or 0) + 1):
        expected |= {f"conv{step}/kernel": (3, 3, 5, 5)}
        expected |= {f"norm{step}/scale": (5,), f"norm{step}/bias": (5,)}
    assert parameters == expected


def test_strided_adaptor_by_hand():
    adaptor = ResolutionAdaptor(2, 3)
    inputs = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
    variables = adaptor.init(jax.random.key(0), jnp.float32(inputs), train=False)
    kernel = np.asarray(variables["params"]["conv1"]["kernel"], np.float64)
    padded = np.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((2, 2, 3, 3))
    for i, j in np.ndindex(2, 3):
        window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        expected[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    expected = np.maximum(expected / np.sqrt(1 + 1e-5), 0)  # fresh statistics
    np.testing.assert_allclose(
        adaptor.apply(variables, jnp.float32(inputs), train=False), expected, rtol=1e-5, atol=1e-5
    )


def test_adaptor_of_a_map_that_fits_is_the_identity():
    inputs = jnp.float32(fill((2, 4, 4, 3), 7, 0))
    np.testing.assert_array_equal(ResolutionAdaptor(4, 4).apply({}, inputs, train=True), inputs)


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((7, 7), (4, 4)),
        ((6, 6), (4, 4)),
        ((12, 12), (4, 4)),
        ((5, 9), (3, 2)),
        ((10, 7), (4, 3)),
        ((7, 6), (7, 4)),
        ((8, 8), (1, 1)),
    ],
)
def test_adaptive_average_pool(size, target):
    inputs = np.random.default_rng(1).normal(size=(2, *size, 3))
    expected = np.zeros((2, *target, 3))
    # PyTorch's AdaptiveAvgPool2d: cell i averages from floor(i H / n) up to ceil((i + 1) H / n).
    for i, j in np.ndindex(*target):
        top, left = (int(np.floor(x * n / m)) for x, n, m in zip((i, j), size, target, strict=True))
        bottom, right = (int(np.ceil((x + 1) * n / m)) for x, n, m in zip((i, j), size, target, strict=True))
        expected[:, i, j] = inputs[:, top:bottom, left:right].mean((1, 2))
    actual = jax.jit(adaptive_average_pool, static_argnums=(1, 2))(jnp.float32(inputs), *target)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_fusion_of_unequal_maps():
    inputs = [(2, 8, 8, 3), (2, 4, 4, 6), (2, 6, 4, 5)]
    (logits, fused_map), parameters = shapes(FusionModule(7), inputs)
    assert logits == (2, 7)
    assert fused_map == (2, 4, 4, 6)
    assert parameters["depthwise_conv/kernel"] == (3, 3, 1, 14)  # 3 + 6 + 5 channels
    assert parameters["pointwise_conv/kernel"] == (1, 1, 14, 6)  # the widest
    assert parameters["head/kernel"] == (6, 7)
    assert {name.split("/")[0] for name in parameters if "adaptor" in name} == {"adaptor_0"}
    _, parameters = shapes(FusionModule(7, features=9), inputs)
    assert parameters["pointwise_conv/kernel"] == (1, 1, 14, 9)
    assert parameters["head/kernel"] == (9, 7)


def test_smallest_height_and_width_may_belong_to_different_maps():
    _, parameters = shapes(FusionModule(7), [(2, 4, 8, 3), (2, 8, 4, 3)])
    assert not [name for name in parameters if "adaptor" in name]  # one side only: both are pooled


def test_fused_classifier_trains_every_map_through_its_adaptor():
    maps = [jnp.float32(fill(shape, 7, 1)) for shape in [(2, 8, 8, 2), (2, 4, 4, 3), (2, 6, 6, 2)]]
    module = FusionModule(3)
    variables = jax.jit(functools.partial(module.init, train=False))(jax.random.key(0), maps)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(params, maps):
        (logits, _), _ = module.apply(
            variables | {"params": params}, maps, train=True, mutable=["batch_stats"]
        )
        return (logits * jnp.arange(6.0).reshape(2, 3)).sum()

    by_params, by_maps = gradient(variables["params"], maps)
    for values in by_maps:
        assert np.abs(values).max() > 1e-4
    assert np.abs(by_params["adaptor_0"]["conv1"]["kernel"]).max() > 1e-4


def test_adaptors_belong_to_the_weight_decay_of_the_fusion_module():
    """Where real networks differ in resolution, the adaptors' paths fall under the configuration's rule."""
    method = METHODS["ffl"](build("resnet8+resnet18", 2, 10), 10)  # on 32 pixels: maps of 8x8 and 1x1
    params = jax.eval_shape(
        functools.partial(method.init, train=False), jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )["params"]
    assert set(params) == {"subnetworks", "fusion"}
    assert set(params["fusion"]["adaptor_0"]) == {f"{x}{i}" for x in ("conv", "norm") for i in (1, 2, 3)}
    adaptor = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params["fusion"]["adaptor_0"])
    params = {"subnetworks": {"kernel": jnp.ones(2)}, "fusion": {"adaptor_0": adaptor}}
    config = cifar100.get_config()
    optimizer = optimizers.make_optimizers(
        method.trains, params, config.optimizer, config.optimizer_rules, 10, 300
    )["loss"]
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    # Without a gradient the first step is -lr (1 + 0.9) decay.
    np.testing.assert_allclose(updates["subnetworks"]["kernel"], -0.1 * 1.9 * 1e-4, rtol=1e-5)
    for leaf in jax.tree.leaves(updates["fusion"]):
        np.testing.assert_allclose(leaf, -0.1 * 1.9 * 1e-5, rtol=1e-5)
