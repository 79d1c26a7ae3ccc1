"""One and several devices, pmap and shard_map, compute the same: in float64, where rounding hides nothing."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from ffl_jax.devices import parallel
from ffl_jax.errors import ConfigError

SCRIPT = pathlib.Path(__file__).parent / "parallel_script.py"


def run_script(commands, what, path):
    """{(mode or method, devices): {path: array}} after a few steps."""
    commands.run(SCRIPT, what, path, devices=8)
    grouped = {}
    for name, value in np.load(path).items():
        run, devices, leaf = name.split(" ", 2)
        grouped.setdefault((run, int(devices)), {})[leaf] = value
    return grouped


@pytest.fixture(scope="module")
def results(commands, tmp_path_factory):
    return run_script(commands, "ffl", tmp_path_factory.mktemp("parallel") / "results.npz")


@pytest.mark.parametrize(
    ("run", "alone"),
    [
        *(((mode, 8), (mode, 1)) for mode in parallel.MODES),
        (("mesh", 8), ("shard_map", 1)),
        (("mesh_second", 8), ("second", 1)),
    ],
    ids=str,
)
def test_devices_agree(results, run, alone):
    """All that is trained or logged; were statistics not synchronised, it would differ by percents."""
    one, several = results[alone], results[run]
    assert one.keys() == several.keys()
    for leaf, expected in one.items():
        # Scores and the ramp are float32 in any case.
        single = "predictions" in leaf or "distillation_weight" in leaf
        rtol, atol = (1e-6, 1e-6) if single else (1e-10, 1e-12)
        np.testing.assert_allclose(several[leaf], expected, rtol=rtol, atol=atol, err_msg=leaf)


@pytest.mark.parametrize("devices", [1, 8])
def test_modes_agree(results, devices):
    for leaf, expected in results["pmap", devices].items():
        actual = results["shard_map", devices][leaf]
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12, err_msg=leaf)


def test_training_moved_everything(results):
    """Else equal numbers would say little."""
    momenta = [value for leaf, value in results["pmap", 1].items() if "trace" in leaf]
    assert len(momenta) == len([leaf for leaf in results["pmap", 1] if leaf.startswith("[0]")]) > 15
    assert all(np.abs(value).max() > 0 for value in momenta)


def test_outside_a_mapped_program_nothing_is_joined():
    assert parallel.axis_name() is None
    x = jnp.arange(4.0)
    for function in (parallel.mean, parallel.sum, parallel.first, parallel.share):
        np.testing.assert_array_equal(function(x), x)


def test_indivisible_batch_names_the_nearest_sizes(commands):
    code = "from ffl_jax.devices import parallel; parallel.Parallel().check_batch_size(10)"
    process = commands.start("-c", code, devices=4)
    assert "set config.batch_size to 8 or 12" in process.communicate()[1]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mode": "pjit"}, "pmap, shard_map"),
        ({"num_devices": 2}, r"1 device.*1\.\.1"),
        ({"subnetworks": 2}, "config.parallel.mode=shard_map"),
        ({"mode": "shard_map", "subnetworks": 2}, "does not divide the 1 device"),
        ({"mode": "shard_map", "seeds": 2, "num_seeds": 2}, "does not divide the 1 device"),
        ({"mode": "shard_map", "seeds": 0}, "from 1 on"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ConfigError, match=text):
        parallel.Parallel(**settings)


def test_what_cannot_be_spread_is_refused(commands):
    code = """
import sys
from ffl_jax import errors
from ffl_jax.devices import parallel
from ffl_jax.methods import subnetworks
spread = parallel.Parallel("shard_map", subnetworks=2)
spread.check_networks(subnetworks.build("resnet8", 4, 10))
for network, num in ("resnet8", 3), ("resnet8+resnet14", 2):
    try:
        spread.check_networks(subnetworks.build(network, num, 10))
    except errors.ConfigError as error:
        print(error)
try:
    parallel.Parallel("shard_map", seeds=2, num_seeds=3)
except errors.ConfigError as error:
    print(error)
"""
    process = commands.start("-c", code, devices=2)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = output.splitlines()
    assert len(lines) == 3
    assert "now 3, must be a multiple of it" in lines[0]
    assert "the networks the same" in lines[1]
    assert "parallel.seeds=2 does not divide num_seeds=3" in lines[2]
