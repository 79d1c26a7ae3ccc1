"""The compiled programs of a training: steps on batches, and what comes before an epoch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ffl_jax.devices.parallel import OWN, SHARED, Parallel
from ffl_jax.training import steps
from ffl_jax.training.experiment import Experiment
from ffl_jax.training.scoring import SplitSums

_SHOWN = 32  # images of a training batch


def training(experiment: Experiment, inputs, parallel: Parallel) -> Callable:
    """(state, arrays of `inputs`, how many steps) -> (state, its record with the last step's `gauges`).

    How many steps it takes does not change the program, and so not the bits.
    """
    per_epoch, every = experiment.steps_per_epoch, experiment.config.log_every_steps

    norms = dict.fromkeys(experiment.optimizers, 0.0)
    names = jax.eval_shape(lambda: steps.gauges(experiment.optimizers, 0, norms))
    no_gauges = dict.fromkeys(names, np.float32(0))

    def program(state, arrays, count):
        def step(_, carry):
            state, _ = carry
            # A line of the log was written, or the run begins.
            fresh = (state.step % per_epoch == 0) | (state.step % every == 0)
            state = state.replace(record=jax.tree.map(lambda x: jnp.where(fresh, 0, x), state.record))
            return experiment.observed_step(state, inputs.batch(arrays, state.step))

        # The number of rounds is the same for all runs: were it each run's own, `vmap` would compute, in
        # every round, the old and the new state of each and choose.
        state, seen = jax.lax.fori_loop(0, count, step, (state, no_gauges))
        return state, {**state.record, "gauges": seen}

    return parallel.map(program, (OWN, inputs.kinds, SHARED), (0, OWN), donate=(0,))


def before_epoch(experiment: Experiment, parallel: Parallel) -> Callable:
    """state -> state before every epoch: where the method learns from the validation split."""
    method, config = experiment.method, experiment.config
    if not method.uses_validation:
        return lambda state: state
    sums_of = SplitSums(steps.validation_step, method, experiment.dataset.validation, config, parallel)

    def update(state, sums):
        return state.replace(model_state={**state.model_state, **method.validation_state(sums)})

    program = parallel.map(update, (OWN, OWN), 0, donate=(0,))

    def updated(state):
        sums = sums_of(state)
        return state if sums is None else program(state, sums)  # None where a signal came

    return updated


def images_shown(experiment: Experiment, inputs, parallel: Parallel, arrays) -> np.ndarray:
    """Images of the first batch of the first run, as people see them: uint8 [views, B, H, W, 3]."""

    def images(arrays):
        batch = inputs.batch(arrays, jnp.int32(0))
        if experiment.recipe is not None:  # with the key of the first step of the first run
            _, rng = jax.random.split(jax.random.key(experiment.config.seed))
            batch = experiment.recipe(batch, jax.random.fold_in(rng, 0))
        return batch["image"][..., :_SHOWN, :, :, :]

    program = parallel.map(images, (inputs.kinds,), seldom=True)
    seen = np.asarray(parallel.fetch_runs(program(arrays))[0])  # of the first device
    settings = experiment.config.data
    pixels = np.rint(255 * (seen * np.array(settings.std) + np.array(settings.mean)))
    return np.clip(pixels, 0, 255).astype(np.uint8).reshape(-1, *seen.shape[-4:])
