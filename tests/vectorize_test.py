"""Which way of running copies of one network is taken, and how it is found."""

import json
import types

import jax
import pytest

from configs import digits
from ffl_jax import data
from ffl_jax.devices import backend, timing
from ffl_jax.devices.parallel import Parallel
from ffl_jax.training import vectorize
from ffl_jax.training.experiment import Experiment


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ffl_jax"


@pytest.fixture(scope="module")
def dataset():
    return data.load(digits.get_config().data)


def experiment(dataset, network="tiny", mode="auto", **settings):
    config = digits.get_config(f"network={network}")
    config.subnetworks.execution = mode
    config.update(settings)
    return Experiment(config, dataset)


def accelerator(kind="Test 1"):
    devices = Parallel(num_devices=1)
    devices.devices = [types.SimpleNamespace(platform="gpu", device_kind=kind)]
    return devices


def settled(experiment, devices):
    with backend.as_accelerator(devices.devices[0].platform != "cpu"):
        vectorize.settle(experiment, devices)
    return experiment.method.subnetworks.vectorize


def test_the_faster_one_is_taken_and_remembered(dataset, folder, monkeypatch):
    """For this device, batch size and network; others are measured for themselves."""
    times, measured = {"loop": 0.2, "vmap": 0.1}, []

    def measure(experiment, devices):
        measured.append(experiment.config.batch_size)
        return dict(times)

    monkeypatch.setattr(vectorize, "measure", measure)
    assert settled(experiment(dataset), accelerator()) is True
    times["loop"] = 0.05
    assert settled(experiment(dataset), accelerator()) is True
    assert measured == [64]
    assert settled(experiment(dataset, batch_size=32), accelerator()) is False
    assert settled(experiment(dataset), accelerator("Test 2")) is False
    assert settled(experiment(dataset, network="tiny_wide"), accelerator()) is False
    assert measured == [64, 32, 64, 64]

    file = folder / "execution.json"
    assert len(json.loads(file.read_text())) == 4
    file.write_text("{broken")
    assert settled(experiment(dataset), accelerator()) is False
    assert len(measured) == 5
    file.unlink()
    folder.rmdir()
    folder.write_text("a file stands where the folder should be")
    assert settled(experiment(dataset), accelerator()) is False


@pytest.mark.parametrize(
    ("mode", "network", "devices", "expected"),
    [
        ("loop", "tiny", accelerator, False),
        ("vmap", "tiny", accelerator, True),
        ("vmap", "tiny", Parallel, True),
        ("auto", "tiny", Parallel, True),  # a CPU, and branches that begin with maps of 4x4
    ],
)
def test_nothing_is_measured_where_it_is_known(mode, network, devices, expected, dataset, monkeypatch):
    monkeypatch.setattr(vectorize, "measure", None)
    assert settled(experiment(dataset, network, mode), devices()) is expected


def test_a_cpu_takes_larger_maps_one_after_another(dataset, monkeypatch):
    """The trunk of one stage leaves 8x8, as the whole networks see."""
    monkeypatch.setattr(vectorize, "measure", None)
    for shared_stages in (0, 1):
        settings = {"shared_stages": shared_stages}
        assert settled(experiment(dataset, subnetworks=settings), Parallel()) is False


def test_different_networks_have_no_choice(dataset, monkeypatch):
    monkeypatch.setattr(vectorize, "measure", None)
    mixed = experiment(dataset, "tiny+tiny_wide")
    before = mixed.method
    with backend.as_accelerator():
        vectorize.settle(mixed, accelerator())
    assert mixed.method is before


@pytest.mark.parametrize("method", ["ffl", "kdcl"])
def test_both_ways_are_timed(method, dataset):
    """On this CPU, with and without a view for each sub-network."""
    config = digits.get_config(f"network=tiny,method={method}")
    seconds = vectorize.measure(Experiment(config, dataset), Parallel(num_devices=1))
    assert seconds.keys() == {"loop", "vmap"}
    assert all(1e-5 < x < 10 for x in seconds.values())


def test_a_step_is_timed_by_its_median(monkeypatch):
    """Five blocks of three calls, of which one is interrupted; compiling does not count."""
    clock, cost = [0.0], iter([50.0, 0.1, *[0.2] * 3, *[0.2, 9.0, 0.2], *[0.3] * 3, *[0.2] * 3, *[0.2] * 3])

    def step(state):
        clock[0] += next(cost)
        return state

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing.step_seconds(step, jax.numpy.zeros(())) == pytest.approx(0.2)
    assert next(cost, None) is None
