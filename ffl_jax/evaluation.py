"""Scores a whole split: every example exactly once, whatever its size and the number of devices."""

import functools

import jax
import jax.numpy as jnp

from ffl_jax import metrics, steps
from ffl_jax import parallel as parallel_lib
from ffl_jax.data import resident


class Evaluator:
    """One split on the devices, and the compiled program that scores it."""

    def __init__(self, method, split, config, parallel: parallel_lib.Parallel):
        """Args: method: a `Method`. split: a `data.base.Split`. config: the whole configuration."""
        devices = parallel.num_devices
        batch_size = min(config.evaluation.batch_size, len(split.labels))
        batch_size = -(-batch_size // devices) * devices
        # The program adds to sums that it is given, so that nothing waits for the host until the end.
        self._zero = parallel.replicate(_zero_sums(method, split.images.shape[1:]))
        indices, weights = resident.eval_batches(len(split.labels), batch_size)
        self._batches = [parallel.replicate(batch) for batch in zip(indices, weights, strict=True)]
        self._data = parallel.replicate((split.images, split.labels))
        self._parallel = parallel
        self._program = parallel.map(functools.partial(_score_batch, method=method, settings=config.data))

    def __call__(self, state: steps.TrainState) -> dict[str, dict[str, float]]:
        """{prediction: scores} of a replicated state; the state stays as it is."""
        sums = self._zero
        for batch in self._batches:
            sums = self._program(sums, (state.params, state.model_state), self._data, batch)
        sums = jax.device_get(self._parallel.fetch(sums))
        return {name: metrics.classification_scores(one) for name, one in sums.items()}


def _score_batch(sums, variables, data, batch, *, method, settings):
    params, model_state = variables
    indices, weights = (parallel_lib.share(x) for x in batch)
    inputs = resident.eval_batch(*data, indices, weights, settings)
    new = steps.eval_step({"params": params, **model_state}, inputs, method=method)
    return jax.tree.map(jnp.add, sums, new)


def _zero_sums(method, image_shape):
    def sums():
        params, model_state = steps.init_variables(method, jax.random.key(0), image_shape)
        batch = {
            "image": jnp.zeros((1, *image_shape)),
            "label": jnp.zeros((1,), jnp.int32),
            "weight": jnp.zeros((1,)),
        }
        return steps.eval_step({"params": params, **model_state}, batch, method=method)

    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(sums))
