"""Whole trainings with every choice made as on an accelerator, where no accelerator is.

XLA's own convolutions, `vmap` over copies of a network, once both ways were timed, and over seeds.
"""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest
from conftest import equations

from configs import digits
from ffl_jax import data, methods
from ffl_jax.deployment import exporting
from ffl_jax.devices import backend, parallel, preemption, timing
from ffl_jax.errors import Preempted
from ffl_jax.training import loop, scoring, vectorize
from ffl_jax.training.experiment import Experiment


def configuration(method="ffl", num_seeds=2):
    """Two steps and an evaluation."""
    config = digits.get_config(f"method={method},network=tiny,epochs=1")
    config.update(num_seeds=num_seeds, batch_size=200, log_every_steps=1)
    return config


@functools.cache
def dataset():
    """The digits, with 400 images to train on."""
    whole = data.load(configuration().data)
    return dataclasses.replace(whole, train=whole.train.take(np.arange(len(whole.train)) < 400))


@pytest.fixture(autouse=True)
def accelerator(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with backend.as_accelerator():
        yield


def vmap_is_faster(monkeypatch, timed=False):
    """What `settle` is told, of how many seeds; `timed` if both ways shall run for it all the same."""
    ran, measure = [], vectorize.measure

    def measured(experiment, devices):
        ran.append(measure(experiment, devices) if timed else devices.num_seeds)
        return {"loop": 2.0, "vmap": 1.0}

    monkeypatch.setattr(timing, "_BLOCKS", 1)
    monkeypatch.setattr(timing, "_BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(vectorize, "measure", measured)
    return ran


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_runs_its_copies_in_the_faster_way(method, monkeypatch):
    """Both are timed where there are several; method_test.py takes the steps."""
    for num_seeds in (1, 2):
        asked, config = vmap_is_faster(monkeypatch), configuration(method, num_seeds)
        experiment = types.SimpleNamespace(
            config=config, method=methods.build(config, 10), image_shape=(8, 8, 3)
        )
        vectorize.settle(experiment, parallel.Parallel(num_devices=1, num_seeds=num_seeds))
        num = experiment.method.subnetworks.num
        assert asked == ([num_seeds] if num > 1 else [])
        assert num == 1 or experiment.method.subnetworks.vectorize


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_stopped_continued_evaluated_and_exported(num_seeds, traced_once, tmp_path, monkeypatch):
    """Stopped after one step of two, it ends with the bits of a run that was left alone."""
    ran = vmap_is_faster(monkeypatch, timed=True)
    config = configuration(num_seeds=num_seeds)
    whole = loop.train(config, tmp_path / "whole", dataset())
    assert [one.keys() for one in ran] == [{"loop", "vmap"}]  # remembered from then on
    with monkeypatch.context() as patch:
        advance, begun = loop.Progress.advance, []
        patch.setattr(loop.Progress, "advance", lambda *args: begun.append(args[1]) or advance(*args))
        patch.setattr(preemption, "requested", lambda: bool(begun))
        with pytest.raises(Preempted):
            loop.train(config, tmp_path / "stopped", dataset())
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["step"] == 1
    again = loop.train(config, tmp_path / "stopped", dataset())
    assert again["predictors"] == whole["predictors"]
    folder = tmp_path / "stopped" / ("seed_1" if num_seeds == 2 else "")
    _, scores = scoring.evaluate_checkpoint(folder)
    nll = np.ravel(whole["predictors"]["fused"]["nll"])[-1]
    assert scores["predictions"]["fused"]["nll"] == pytest.approx(nll, rel=1e-5)
    if num_seeds == 2:
        assert exporting.export(folder, tmp_path / "fused.stablehlo", name="fused").images == 64


def test_number_of_seeds_is_part_of_what_is_remembered(monkeypatch):
    """A time that was taken of one seed says nothing of three, and each is that of so many."""
    seen = []

    def step_seconds(step, state, batch):
        seen.append((state.step.shape, batch["label"].shape))
        return 1.0

    monkeypatch.setattr(vectorize, "step_seconds", step_seconds)
    experiment = Experiment(configuration(num_seeds=1), dataset())
    for num_seeds in (1, 3, 1, 3):
        vectorize.settle(experiment, parallel.Parallel(num_devices=1, num_seeds=num_seeds))
    assert seen == [((1,), (1, 200))] * 2 + [((1, 3), (1, 3, 200))] * 2  # behind the axis of pmap


@pytest.mark.parametrize("as_on_accelerator", [True, False])
def test_programs_are_those_of_an_accelerator(as_on_accelerator):
    """One convolution for all copies and seeds, its gradients by XLA, and memory that is given away."""
    with backend.as_accelerator(as_on_accelerator):
        experiment = Experiment(configuration("independent", 1), dataset())
        devices = parallel.Parallel(num_devices=1, num_seeds=2)
        method = vectorize.vectorized(experiment.method, True)
        step, state, batch = vectorize.training_step(experiment, method, devices)
        names = [one.primitive.name for one in equations(jax.make_jaxpr(step)(state, batch).jaxpr)]
        # Three layers: their results, and the gradients of their kernels and inputs; XLA drops the images'.
        assert (names.count("conv_general_dilated") == 3 + 3 + 3) == as_on_accelerator
        assert ("scan" in names) == (not as_on_accelerator)
        kernels = state.params["subnetworks"]["branches"]["stage1_conv"]["kernel"]
        step(state, batch)
        assert kernels.is_deleted()
