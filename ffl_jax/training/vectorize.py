"""How copies of one network run: one after another, or by `vmap`, whichever this machine does faster."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ffl_jax.devices import backend, processes
from ffl_jax.devices.parallel import OWN, Parallel
from ffl_jax.devices.timing import step_seconds
from ffl_jax.methods.subnetworks import vectorized
from ffl_jax.training import config as config_lib
from ffl_jax.training import steps
from ffl_jax.workdir import files
from ffl_jax.workdir.paths import cache_directory

_MODES = {"loop": False, "vmap": True}
# On a CPU, at 4 vmap was 1.4 to 1.9 times as fast as the loop, at 8 it took 1.2 to 1.7 times as long.
_SMALL_SIDE = 4


def settle(experiment, parallel: Parallel):
    """Makes the method of an experiment run its sub-networks as `config.subnetworks.execution` says.

    For "auto" a CPU takes the loop, for a vmapped convolution is a grouped one, which is slower there, except
    on the smallest maps (docs/performance.md). Elsewhere one training step is timed in both ways, once for
    each machine, configuration and number of seeds; the file `execution.json` in the cache folder remembers
    it.
    """
    config, networks = experiment.config, experiment.method.subnetworks
    if config.subnetworks.execution != "auto" or not networks.are_copies or networks.num == 1:
        return
    if backend.is_cpu():
        small = _branch_side(networks, experiment.image_shape) <= _SMALL_SIDE
        experiment.method = vectorized(experiment.method, small)
        return
    path, key = cache_directory() / "execution.json", _key(experiment, parallel)
    seconds = processes.value_of_first(lambda: _remembered(path, key))
    if seconds is None:
        # All processes measure, for they train together, and take what the first of them found.
        found = measure(experiment, parallel)
        seconds = processes.value_of_first(lambda: _remember(path, key, found))
    best, other = sorted(seconds, key=seconds.get)
    logging.info(
        "Sub-networks run by %s: %.2f ms a step, by %s %.2f ms.",
        *(best, 1e3 * seconds[best], other, 1e3 * seconds[other]),
    )
    experiment.method = vectorized(experiment.method, _MODES[best])


def _branch_side(networks, image_shape) -> int:
    """Pixels along the longer side of the maps that the branches begin with."""
    shape = (1, *image_shape)
    if networks.shared_stages:
        trunk = networks.network.clone(stop=networks.shared_stages)
        init = functools.partial(trunk.init_with_output, train=False)
        images = jax.ShapeDtypeStruct(shape, jnp.float32)
        output, _ = jax.eval_shape(init, jax.random.key(0), images)
        shape = trunk.feature_map(output).shape
    return max(shape[1:3])


def measure(experiment, parallel: Parallel) -> dict[str, float]:
    """{"loop", "vmap": seconds of one training step of all runs, without input}."""
    found = {}
    for mode, vectorize in _MODES.items():
        step, state, batch = training_step(experiment, vectorized(experiment.method, vectorize), parallel)
        found[mode] = step_seconds(step, state, batch)
    return found


def training_step(experiment, method, parallel: Parallel) -> tuple[Callable, steps.TrainState, dict]:
    """(training step to be compiled: state, batch -> state; a state to begin with; a batch of noise)."""
    batch = experiment.abstract_batch(parallel.shares)
    noise = np.random.default_rng(0).normal(size=batch["image"].shape).astype(np.float32)
    batch = {"image": noise, "label": np.zeros(batch["label"].shape, np.int32)}

    def number(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.full(leaf.shape, 0.01, leaf.dtype)

    other = experiment.with_method(method)
    other.freeze_steps = 0  # what most steps are like
    step = parallel.map(other.train_step, (OWN, OWN), 0, donate=(0,))
    state = jax.tree.map(number, experiment.abstract_state())
    return step, parallel.repeat(state), parallel.repeat(batch)


def _key(experiment, parallel) -> str:
    """Names all that the speed depends on."""
    config = config_lib.to_json(experiment.config)
    parts = {key: config[key] for key in ("method", "subnetworks", "batch_size", "precision", "accumulate")}
    parts |= {"image": list(experiment.image_shape), "classes": experiment.method.num_classes}
    parts |= {"devices": [parallel.devices[0].device_kind, parallel.num_devices, parallel.num_seeds]}
    parts |= {"jax": jax.__version__}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _remembered(path, key: str) -> dict[str, float] | None:
    try:
        return {mode: float(files.read_json(path)[key][mode]) for mode in _MODES}
    except (KeyError, TypeError, ValueError):  # not there, or not ours
        return None


def _remember(path, key: str, found: dict[str, float]) -> dict[str, float]:
    try:
        os.makedirs(path.parent, exist_ok=True)
        files.write_json(path, {**files.read_json(path), key: found})
    except OSError as error:  # it is measured again the next time
        logging.warning("cannot write %s: %s", path, error.strerror)
    return found
