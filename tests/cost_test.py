"""What a prediction costs, against parameters and operations counted by hand."""

import functools

import jax
import pytest

from configs import digits
from ffl_jax import data
from ffl_jax.devices.parallel import Parallel
from ffl_jax.methods import METHODS
from ffl_jax.methods.subnetworks import build
from ffl_jax.training import cost, steps, vectorize
from ffl_jax.training.experiment import Experiment


@functools.cache
def costs(network, num=2, classes=100, shared_stages=2, side=32, vectorize=False):
    method = METHODS["ffl"](build(network, num, classes, shared_stages, vectorize), classes)
    shape = (side, side, 3)
    params, model_state = jax.eval_shape(
        functools.partial(steps.init_variables, method, image_shape=shape), jax.random.key(0)
    )
    return cost.prediction_costs(method, {"params": params, **model_state}, shape)


def test_parameters_of_resnet32_on_a_trunk():
    # A plain network; a trunk of 112592 with two branches of 360164; these and the fusion module of 16228
    # without the two heads of 64 * 100 + 100, which the fused classifier does not use.
    expected = {"sub_0": 472_756, "sub_1": 472_756, "ensemble": 832_920, "fused": 849_148 - 2 * 6500}
    assert {name: one["parameters"] for name, one in costs("resnet32").items()} == expected


def test_parameters_of_separate_networks():
    expected = {"sub_0": 278_324, "sub_1": 278_324, "ensemble": 2 * 278_324, "fused": 572_876 - 2 * 6500}
    actual = costs("resnet20", shared_stages=0)
    assert {name: one["parameters"] for name, one in actual.items()} == expected


def test_parameters_of_different_networks():
    # resnet8 has one block to a stage where resnet14 has two: 3 convolutions of 9 w^2 and norms of 2 w less.
    resnet8 = 27 * 16 + 32  # stem
    resnet8 += 2 * (9 * 16 * 16 + 32)
    resnet8 += 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32 + 3 * 64
    resnet8 += 9 * 32 * 64 + 9 * 64 * 64 + 32 * 64 + 3 * 128
    resnet14 = resnet8 + sum(2 * (9 * width**2 + 2 * width) for width in (16, 32, 64))
    head, fusion = 64 * 10 + 10, 9 * 128 + 256 + 128 * 64 + 128 + 64 * 10 + 10
    actual = costs("resnet8+resnet14", classes=10, shared_stages=0, side=8)
    assert {name: one["parameters"] for name, one in actual.items()} == {
        "sub_0": resnet8 + head,
        "sub_1": resnet14 + head,
        "ensemble": resnet8 + resnet14 + 2 * head,
        "fused": resnet8 + resnet14 + fusion,
    }


def test_vectorizing_changes_no_cost():
    loop, vmap = (costs("resnet8", 3, 10, 2, 8, vectorize) for vectorize in (False, True))
    assert vmap == loop


def padded(side, stride=1):
    """Multiply-adds of a 3x3 convolution along one axis, without those on the padding."""
    return sum(0 <= i * stride + tap < side for i in range(-(-side // stride)) for tap in (-1, 0, 1))


def test_operations():
    """Two for each multiply-add, those on the padding left out; norms and ReLUs are little beside."""
    stem = 2 * padded(32) ** 2 * 3 * 16
    trunk = stem + 2 * 2 * padded(32) ** 2 * 16 * 16
    trunk += 2 * (padded(32, 2) ** 2 * 16 * 32 + padded(16) ** 2 * 32 * 32 + 16 * 16 * 16 * 32)
    branch = 2 * (padded(16, 2) ** 2 * 32 * 64 + padded(8) ** 2 * 64 * 64 + 8 * 8 * 32 * 64)
    head = 2 * 64 * 10
    fusion = 2 * (padded(8) ** 2 * 128 + 8 * 8 * 128 * 64)
    expected = {
        "sub_0": trunk + branch + head,
        "sub_1": trunk + branch + head,
        "ensemble": trunk + 2 * (branch + head),
        "fused": trunk + 2 * branch + fusion + head,
    }
    actual = costs("resnet8", classes=10)
    for name, operations in expected.items():
        assert actual[name]["flops"] == pytest.approx(operations, rel=0.03), name
        assert actual[name]["flops"] > operations


@pytest.fixture(scope="module")
def dataset():
    return data.load(digits.get_config().data)


MEMORY = {
    "ffl": ("network=tiny", {}),
    "accumulate": ("network=tiny", {"accumulate": 4}),
    "remat": ("network=tiny", {"subnetworks.remat": True}),
    "bfloat16": ("network=tiny", {"precision": "bfloat16"}),
    "views": ("network=tiny,method=kdcl", {}),
    "mixed": ("network=tiny+tiny_wide,method=afd", {}),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_for_training_is_near_what_xla_takes(name, dataset):
    """The compiled step's arguments, without its batch, and what it needs beside them."""
    arg, settings = MEMORY[name]
    config = digits.get_config(arg)
    config.update_from_flattened_dict(settings)
    experiment, devices = Experiment(config, dataset), Parallel(num_devices=1)
    program, state, batch = vectorize.training_step(experiment, experiment.method, devices)
    analysis = program.lower(state, batch).compile().memory_analysis()
    needed = cost.training_memory(experiment, 1)
    gradient = needed["state"] - analysis.alias_size_in_bytes
    assert 0 < gradient < needed["state"] / 2
    assert 0.5 < (needed["maps"] + gradient) / analysis.temp_size_in_bytes < 2
    assert needed["data"] == (1437 + 360) * (8 * 8 * 3 + 4)


def test_each_device_takes_its_part(dataset):
    experiment = Experiment(digits.get_config("network=tiny"), dataset)
    one, four = (cost.training_memory(experiment, devices) for devices in (1, 4))
    assert one["state"] == four["state"]
    assert 3.9 < one["maps"] / four["maps"] < 4.1


def test_operations_are_counted_for_a_cpu():
    """JAX does not count before it compiles elsewhere."""
    devices = []

    def product(x):
        devices.append(jax.config.jax_default_device)
        return x @ x

    assert cost.flops(product, jax.ShapeDtypeStruct((8, 8), "float32")) == 2 * 8**3
    assert [device.platform for device in devices] == ["cpu"]
