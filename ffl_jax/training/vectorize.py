"""How copies of one network run: one after another, or by `vmap`, whichever this machine does faster."""

import functools
import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ffl_jax.devices import backend, parallel, processes
from ffl_jax.training import config as config_lib
from ffl_jax.training import steps
from ffl_jax.workdir import outputs
from ffl_jax.workdir.paths import cache_directory

_MODES = {"loop": False, "vmap": True}
_BLOCKS, _BLOCK_SECONDS = 5, 0.3  # that a step is timed in
_SMALL_SIDE = (
    4  # On a CPU, at 4 vmap was 1.4 to 1.9 times as fast as the loop, at 8 it took 1.2 to 1.7 times as long.
)


def settle(experiment, devices: parallel.Parallel):
    """Makes the method of an experiment run its sub-networks as `config.subnetworks.execution` says.

    For "auto" a CPU takes the loop, for a vmapped convolution is a grouped one, which is slower there, except
    on the smallest maps (docs/performance.md). Elsewhere one training step is timed in both ways, once for
    each machine and configuration; the file `execution.json` in the cache folder remembers it.
    """
    config, networks = experiment.config, experiment.method.subnetworks
    if config.subnetworks.execution != "auto" or not hasattr(networks, "vectorize") or networks.num == 1:
        return
    if backend.is_cpu():
        small = _branch_side(networks, experiment.image_shape) <= _SMALL_SIDE
        experiment.method = vectorized(experiment.method, small)
        return
    path, key = cache_directory() / "execution.json", _key(experiment, devices)
    seconds = processes.value_of_first(lambda: _remembered(path, key))
    if seconds is None:
        # All processes measure, for they train together, and take what the first of them found.
        found = measure(experiment, devices)
        seconds = processes.value_of_first(lambda: _remember(path, key, found))
    best = min(seconds, key=seconds.get)
    other = "vmap" if best == "loop" else "loop"
    logging.info(
        "Sub-networks run by %s: %.2f ms a step, by %s %.2f ms.",
        *(best, 1e3 * seconds[best], other, 1e3 * seconds[other]),
    )
    experiment.method = vectorized(experiment.method, _MODES[best])


def _branch_side(networks, image_shape) -> int:
    """Pixels along the longer side of the maps that the branches begin with."""
    shape = (1, *image_shape)
    if networks.shared_stages:
        trunk = functools.partial(
            networks.network.clone(stop=networks.shared_stages).init_with_output, train=False
        )
        shape = jax.eval_shape(trunk, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))[0].shape
    return max(shape[1:3])


def vectorized(method, vectorize: bool):
    """The method with its copies of one network run by `vmap`, or one after another; all else stays."""
    return method.clone(subnetworks=method.subnetworks.clone(vectorize=vectorize))


def measure(experiment, devices: parallel.Parallel) -> dict[str, float]:
    """{"loop", "vmap": seconds of one training step, without input}."""
    seconds = {}
    for mode, vectorize in _MODES.items():
        step, state, batch = training_step(experiment, vectorized(experiment.method, vectorize), devices)
        seconds[mode] = step_seconds(step, state, batch)
    return seconds


def training_step(experiment, method, devices: parallel.Parallel) -> tuple[Callable, steps.TrainState, dict]:
    """(training step to be compiled: state, batch -> state; a state to begin with; a batch of noise)."""
    config, views = experiment.config, method.subnetworks.num if method.views else 0
    rng = np.random.default_rng(0)
    size = config.batch_size // devices.shares
    seeds = (devices.num_seeds,) if devices.num_seeds > 1 else ()
    shape = (*seeds, *([views] if views else []), size, *experiment.image_shape)
    batch = devices.place(
        {
            "image": rng.normal(size=shape).astype(np.float32),
            "label": np.zeros((*seeds, size), np.int32),
        },
        parallel.OWN,
    )

    def one(state_and_batch):
        return steps.train_step(
            *state_and_batch,
            method=method,
            optimizers=experiment.optimizers,
            steps_per_epoch=experiment.steps_per_epoch,
            precision=config.precision,
            accumulate=config.accumulate,
        )

    each = devices.for_seeds(one)
    step = devices.map(
        lambda state, batch: each((state, batch)), (parallel.OWN, parallel.OWN), 0, donate_argnums=(0,)
    )

    def numbers(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key = jax.random.key(0)
            return jnp.stack([key] * devices.num_seeds) if seeds else key
        return jnp.full((*seeds, *leaf.shape), 0.01, leaf.dtype)

    state = devices.place(jax.tree.map(numbers, experiment.abstract_state()), parallel.OWN)
    return step, state, batch


def step_seconds(step: Callable, state, *rest) -> float:
    """Seconds of `state = step(state, *rest)`: the median over blocks of calls, after two that compile."""
    for _ in range(2):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state, *rest))
    calls = max(1, round(_BLOCK_SECONDS / (time.perf_counter() - start)))
    times = []
    for _ in range(_BLOCKS):
        start = time.perf_counter()
        for _ in range(calls):
            state = step(state, *rest)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def _key(experiment, devices) -> str:
    """Names all that the speed depends on."""
    config = config_lib.to_json(experiment.config)
    parts = {key: config[key] for key in ("method", "subnetworks", "batch_size", "precision", "accumulate")}
    parts |= {"image": list(experiment.image_shape), "classes": experiment.method.num_classes}
    parts |= {
        "devices": [devices.devices[0].device_kind, devices.num_devices, devices.num_seeds],
        "jax": jax.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _remembered(path, key: str) -> dict[str, float] | None:
    try:
        return {mode: float(outputs.read_json(path)[key][mode]) for mode in _MODES}
    except (KeyError, TypeError, ValueError):  # not there, or not ours
        return None


def _remember(path, key: str, found: dict[str, float]) -> dict[str, float]:
    try:
        os.makedirs(path.parent, exist_ok=True)
        outputs.write_json(path, {**outputs.read_json(path), key: found})
    except OSError as error:  # it is measured again the next time
        logging.warning("cannot write %s: %s", path, error.strerror)
    return found
