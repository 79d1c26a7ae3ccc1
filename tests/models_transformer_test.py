"""ViTs and ConvNeXts: values of timm and torchvision, sizes, cuts, and what is random in training."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from conftest import draw_variables
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from configs import common
from ffl_jax import methods
from ffl_jax.deployment import folding, onnx_operations, stablehlo
from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS
from ffl_jax.methods.subnetworks import Mixed, Stacked, build
from ffl_jax.models import NETWORKS, base, convnext, vit
from ffl_jax.pytorch import names
from ffl_jax.training import optimizers, steps

GOLDEN = np.load(Path(__file__).parent / "data" / "vit_convnext.npz")
VIT = vit.ViT(5, patch=4, width=16, heads=2, blocks=(1, 1))
CONVNEXT = convnext.ConvNeXt(5, widths=(4, 8, 8, 16), blocks=(1, 1, 2, 1))
NETS = {"vit": (VIT, (8, 8)), "convnext": (CONVNEXT, (64, 32))}


def shapes(network, side):
    init = functools.partial(network.init_with_output, train=False)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((2, side, side, 3)))


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# timm 1.0.31 and torchvision 0.28 count them so: vit_*_patch16_224 (vit_b_16), convnext_tiny.
@pytest.mark.parametrize(
    ("name", "side", "classes", "parameters"),
    [
        ("vit_tiny_patch16", 224, 1000, 5_717_416),
        ("vit_small_patch16", 224, 1000, 22_050_664),
        ("vit_base_patch16", 224, 1000, 86_567_656),
        ("convnext_tiny", 224, 1000, 28_589_128),
        # By hand: patches of 16 * 16 and 4 * 4 pixels, 196 and 64 positions, 1000 and 100 classes.
        ("vit_tiny_patch4", 32, 100, 5_717_416 - 240 * 3 * 192 - 132 * 192 - 900 * 193),
        # 4 * 4 * 3 * 96 and 2 * 2 * 3 * 96.
        ("convnext_tiny_patch2", 32, 1000, 28_589_128 - 12 * 3 * 96),
    ],
)
def test_parameter_counts(name, side, classes, parameters):
    _, variables = shapes(NETWORKS.lookup(name)(classes), side)
    assert variables.keys() == {"params"}
    assert size(variables) == parameters


@pytest.mark.parametrize(
    ("network", "side", "maps"),
    [
        (VIT, 8, [(2, 16)] * 2),
        (CONVNEXT, 36, [(9, 4), (4, 8), (2, 8), (1, 16)]),
        (CONVNEXT.clone(patch=2), 36, [(18, 4), (9, 8), (4, 8), (2, 16)]),
    ],
)
def test_shapes_and_cuts(network, side, maps):
    whole, variables = shapes(network, side)
    assert [x.shape for x in whole.feature_maps] == [(2, n, n, width) for n, width in maps]
    assert whole.features.shape == (2, maps[-1][1])
    for cut in range(1, network.num_stages):
        middle, trunk = shapes(network.clone(stop=cut), side)
        init = functools.partial(network.clone(start=cut).init_with_output, train=False)
        outputs, branch = jax.eval_shape(init, jax.random.key(0), middle)
        assert not trunk["params"].keys() & branch["params"].keys()
        chex.assert_trees_all_equal_shapes_and_dtypes(trunk["params"] | branch["params"], variables["params"])
        assert (network.feature_map(middle), *outputs.feature_maps) == whole.feature_maps[cut - 1 :]


@functools.cache
def golden(family, source):
    """(network, variables by the rules for that source, images, logits of that source in float64)."""
    network, (height, width) = NETS[family]
    prefix = f"{family}/{source}/"
    stored = {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN if key.startswith(prefix)}
    entries = {
        key.removeprefix("weights/"): value / np.float32(64)
        for key, value in stored.items()
        if key.startswith("weights/")
    }
    init = functools.partial(network.init, train=False)
    tree = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, height, width, 3)))
    taken = names.Entries(entries)

    def leaf(path, x):
        name = names.torch_name(network, [key.key for key in path][1:], source)
        return jnp.asarray(taken.take(name, x.shape))

    variables = jax.tree_util.tree_map_with_path(leaf, tree)
    taken.check(prefix, "")
    return network, variables, stored["images"] / np.float32(64), stored["logits"]


@pytest.mark.parametrize("source", ["timm", "torchvision"])
@pytest.mark.parametrize("family", NETS)
def test_logits_are_those_of_pytorch(family, source):
    network, variables, images, expected = golden(family, source)
    logits = jax.jit(functools.partial(network.apply, train=False))(variables, images).logits
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("family", NETS)
def test_trunk_and_branches_are_the_whole_network(family):
    """With the same weights in every copy: on a trunk and apart, one after another and by vmap."""
    network, variables, images, expected = golden(family, "timm")
    last = network.num_stages - 1

    @jax.jit
    def run(params, images):
        found = []
        for shared_stages, vectorize in ((last, True), (0, False)):
            module = Stacked(network, 2, shared_stages, vectorize)
            trunk, branch = {}, {}
            for key, value in params.items():
                early = key.startswith("stem") or (key[:5] == "stage" and int(key[5]) <= shared_stages)
                (trunk if early and shared_stages else branch)[key] = value
            branches = jax.tree.map(lambda x: jnp.stack([x, x]), branch)
            joint = {"branches": branches} | ({"trunk": trunk} if shared_stages else {})
            outputs = module.apply({"params": joint}, images, train=False)
            assert (outputs[0].trunk_map is None) == (not shared_stages)
            found += [output.logits for output in outputs]
        return found

    for logits in run(variables["params"], images):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"patches of 4x4 pixels do not divide images of 10x10: set config"):
        shapes(VIT, 10)
    with pytest.raises(ConfigError, match=r"patches of 2x2 pixels of a map that is 1x1: take larger images"):
        shapes(CONVNEXT, 8)


def test_dropout_and_stochastic_depth():
    """Whole examples or single numbers are 0, the rest is divided by the share that stays."""
    x = jnp.ones((400, 5, 7))
    for examples in (False, True):
        layer = base.Dropout(0.25, examples)
        y = np.asarray(layer.apply({}, x, True, rngs={"dropout": jax.random.key(0)}))
        np.testing.assert_allclose(y[y > 0], 4 / 3)
        assert abs((y > 0).mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / (400 if examples else y.size))
        assert (np.ptp(y.reshape(400, -1), axis=1) == 0).all() == examples
        np.testing.assert_array_equal(layer.apply({}, x, False), x)
    assert base.drop_path_rates(0.3, (1, 2, 1)) == [[0.0], [pytest.approx(0.1), pytest.approx(0.2)], [0.3]]


@pytest.mark.parametrize("examples", [False, True])
def test_devices_draw_what_one_would(examples):
    """Each its own part of what is drawn for the whole batch."""
    x, layer, rngs = jnp.ones((8, 5)), base.Dropout(0.5, examples), {"dropout": jax.random.key(3)}
    whole = layer.apply({}, x, True, rngs=rngs)
    shares = jax.vmap(lambda x: layer.apply({}, x, True, rngs=rngs), axis_name="data")(x.reshape(4, 2, 5))
    np.testing.assert_array_equal(shares.reshape(8, 5), whole)
    assert len(np.unique(whole, axis=0)) > 1


@pytest.mark.parametrize("vectorize", [False, True])
def test_sub_networks_draw_apart_and_repeat(vectorize):
    network = VIT.clone(dropout=0.1, drop_path=0.5)
    module = Stacked(network, 2, 1, vectorize)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = draw_variables(module, images)
    branches = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), variables["params"]["branches"])
    variables = {"params": variables["params"] | {"branches": branches}}

    def run(variables, images, key, train=True):
        outputs, _ = module.apply(variables, images, train, mutable=["batch_stats"], rngs={"dropout": key})
        return jnp.stack([output.logits for output in outputs])

    run = jax.jit(run, static_argnames="train")
    first = run(variables, images, jax.random.key(0))
    assert np.abs(first[0] - first[1]).max() > 1e-3
    np.testing.assert_array_equal(first, run(variables, images, jax.random.key(0)))
    assert np.abs(first - run(variables, images, jax.random.key(1))).max() > 1e-3
    plain = run(variables, images, jax.random.key(0), train=False)
    np.testing.assert_allclose(plain[0], plain[1], rtol=1e-6)
    # What is taken out of it, for evaluation and export, is the network that the name stands for.
    assert module.member(1) == VIT
    assert Mixed((network, CONVNEXT)).member(0) == VIT


def test_rates_go_to_the_networks_that_have_them():
    module = build("vit_tiny_patch4+convnext_tiny", 2, 5, dropout=0.1, drop_path=0.2)
    assert [(one.dropout, one.drop_path) for one in module.networks] == [(0.1, 0.2), (0.0, 0.2)]
    with pytest.raises(
        ConfigError, match=r"subnetworks.dropout=0.1, but convnext_tiny has none: set it to 0"
    ):
        build("convnext_tiny", 2, 5, dropout=0.1)


# Those that ask a network for more than logits; what trains without batch norms; and maps of several sizes.
@pytest.mark.parametrize(
    ("name", "network"),
    [
        *((name, VIT) for name in ("independent", "one", "pcl", "ffl", "afd", "mfef", "ffsd", "feed")),
        *(("independent", CONVNEXT), ("ffsd", CONVNEXT)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_methods_take_them(name, network, monkeypatch):
    """Traced: all shapes fit, and the state keeps its form. On a trunk where the method can, else apart."""
    monkeypatch.setitem(
        NETWORKS, "vit_or_convnext", lambda num_classes: network.clone(num_classes=num_classes)
    )
    config = common.get_config(f"method={name},network=vit_or_convnext")
    if METHODS[name].refuses_trunk or METHODS[name].num[1] == 1:
        config.subnetworks.shared_stages = 0
    else:
        config.subnetworks.shared_stages = 1
    method = methods.build(config, 5)
    rules = (method.trains, config.optimizer, config.optimizer_rules, 2, config.epochs)

    def state():
        params, _ = steps.init_variables(method, jax.random.key(0), (32, 32, 3))
        made = optimizers.make_optimizers(rules[0], params, *rules[1:])
        return steps.create_state(method, made, jax.random.key(0), (32, 32, 3))

    def step(state):
        made = optimizers.make_optimizers(rules[0], state.params, *rules[1:])
        views = (method.num_views,) if method.views else ()
        batch = {"image": jnp.zeros((*views, 4, 32, 32, 3)), "label": jnp.zeros(4, jnp.int32)}
        return steps.train_step(state, batch, method=method, optimizers=made, steps_per_epoch=2)

    first = jax.eval_shape(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step, first), first)


@pytest.mark.parametrize("family", NETS)
def test_exports_compute_the_same(family, tmp_path):
    """The programs of an export, for any number of images; in int8 by the recipe of docs/deploy.md, about."""
    network, variables, _, _ = golden(family, "timm")
    shape = (*NETS[family][1], 3)

    def logits(variables, images):
        return network.apply(variables, images.astype(jnp.float32) / 255, train=False).logits

    folded, draw = folding.fold(logits, variables), np.random.default_rng(1).integers
    model = onnx_operations.convert(folded, shape).SerializeToString()
    (batch,) = jax.export.symbolic_shape("batch")
    any_images = jax.ShapeDtypeStruct((batch, *shape), np.uint8)
    program = jax.export.export(jax.jit(folded), platforms=stablehlo.PLATFORMS)(any_images)
    program = jax.export.deserialize(bytearray(program.serialize()))
    calibration = iter(draw(256, size=(32, 1, *shape), dtype=np.uint8))
    reader = type("Images", (), {"get_next": lambda _: next(({"images": x} for x in calibration), None)})
    (tmp_path / "float.onnx").write_bytes(model)
    names = [str(tmp_path / f"{name}.onnx") for name in ("float", "prepared", "int8")]
    quant_pre_process(*names[:2], skip_symbolic_shape=True)
    quantize_static(*names[1:], reader(), per_channel=True)
    sessions = [onnxruntime.InferenceSession(one) for one in (model, names[2])]
    images = draw(256, size=(16, *shape), dtype=np.uint8)
    expected = np.asarray(jax.jit(logits)(variables, images))
    exact, rough = (session.run(None, {"images": images})[0] for session in sessions)
    one = sessions[0].run(None, {"images": images[:1]})[0]
    scale = np.abs(expected).max()
    for found in (exact, one, jax.jit(program.call)(images)):
        np.testing.assert_allclose(found, expected[: len(found)], rtol=0, atol=1e-5 * scale)
    assert np.sqrt(np.square(rough - expected).mean()) < 0.1 * scale
