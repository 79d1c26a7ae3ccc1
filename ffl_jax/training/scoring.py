"""Scores a whole split: every example exactly once, whatever its size and the number of devices."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ffl_jax import data
from ffl_jax.devices import preemption, processes
from ffl_jax.devices.parallel import OWN, Parallel
from ffl_jax.errors import ConfigError
from ffl_jax.registry import check_choice, nearest
from ffl_jax.training import config as config_lib
from ffl_jax.training import confusion, metrics, steps
from ffl_jax.training.experiment import Experiment, check_belongs, remembered_dataset
from ffl_jax.workdir import checkpoint


class SplitSums:
    """One split, and a compiled program that adds up sums over it, every example exactly once.

    Attributes:
      input: of `data.eval_input`.
      program: (sums, variables, arrays of a batch) -> sums.
    """

    def __init__(self, step: Callable, method, split, config, parallel: Parallel, variables=None):
        """Compiles and traces nothing yet.

        Args:
          step: `steps.eval_step` or another of its form.
          split: a `data.Split`.
          config: all of it.
          variables: shapes of the method's, where they are known; else it is traced for them.
        """
        self.input = inputs = data.eval_input(split, config, parallel)
        self._parallel, self._sums_of = parallel, (step, method, split.image_shape, variables)

        def add(sums, variables, arrays):
            new = step(variables, inputs.batch(arrays), method=method, precision=config.precision)
            return jax.tree.map(jnp.add, sums, new)

        self.program = parallel.map(add, (OWN, OWN, inputs.kinds))

    @functools.cached_property
    def zero(self):
        """The sums of nothing, on the devices; the program adds to sums, so that none waits for the host."""
        step, method, image_shape, variables = self._sums_of
        if variables is None:
            params, state = steps.init_variables.eval_shape(method, jax.random.key(0), image_shape)
            variables = {"params": params, **state}
        shapes = _sums_of_one.eval_shape(variables, step, method, image_shape)
        return self._parallel.repeat(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))

    def __call__(self, state: steps.TrainState):
        """The sums of a state on the devices, there too; None if a signal came. The state stays as it is."""
        sums = self.zero
        for arrays in self.input.batches():
            if preemption.requested() and not processes.several():  # else all of them go on together
                return None
            finished, sums = sums, self.program(sums, state.variables, arrays)
            jax.block_until_ready(finished)  # one batch ahead, so that a signal need not wait for more
        return sums


class Evaluator:
    """One split on the devices, and the compiled program that scores it."""

    def __init__(
        self, method, split, config, parallel: Parallel, confused: str | None = None, variables=None
    ):
        """Compiles nothing yet.

        Args:
          method: a `Method`.
          split: a `data.Split`.
          config: the whole configuration.
          confused: the prediction whose errors are counted class by class; what is shipped by default.
          variables: see `SplitSums`.
        """
        step = functools.partial(steps.eval_step, confused=confused) if confused else steps.eval_step
        self._sums = SplitSums(step, method, split, config, parallel, variables)
        self._parallel, self._confused = parallel, confused or method.headline

    def __call__(self, state: steps.TrainState) -> list[dict[str, dict]] | None:
        """The scores of a state on the devices, for each seed; None if a signal came. The state stays.

        Returns:
          `predictions`: {prediction: {score: number}}. `reliability`: {prediction: its diagram}. `diversity`:
          {score: a K x K list}, or {}. `classes`: of `metrics.class_scores`. All of it is JSON-able.
        """
        sums = self._sums(state)
        if sums is None:
            return None
        return [_scores(one, self._confused) for one in self._parallel.fetch_runs(sums)]


def _scores(sums, confused):
    sums = jax.device_get(sums)
    predictions, diversity = sums["predictions"], sums["diversity"]
    return {
        "predictions": {name: metrics.classification_scores(one) for name, one in predictions.items()},
        "reliability": {name: metrics.reliability(one) for name, one in predictions.items()},
        "diversity": {
            name: one.tolist()
            for name, one in (metrics.diversity_scores(diversity).items() if diversity else ())
        },
        "classes": metrics.class_scores(sums["classes"], confused),
    }


@functools.partial(jax.jit, static_argnames=("step", "method", "image_shape"))  # for its cache of shapes
def _sums_of_one(variables, step, method, image_shape):
    batch = {
        "image": jnp.zeros((1, *image_shape)),
        "label": jnp.zeros((1,), jnp.int32),
        "weight": jnp.zeros((1,)),
    }
    return step(variables, batch, method=method)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint in memory.

    Attributes:
      experiment: what it belongs to.
      step: its step.
      run: of `experiment.run_record`.
      state: on one device.
    """

    experiment: Experiment
    step: int
    run: dict
    state: steps.TrainState


def restore_checkpoint(
    workdir: str | Path, step: int | None = None, data_dir: str | None = None, with_data: bool = True
) -> Restored:
    """Loads a checkpoint with nothing but what is in it and the dataset.

    Args:
      workdir: of a finished or running training.
      step: which checkpoint, kept newest ones and the best; None takes the newest whole one.
      data_dir: where the dataset is now; None where the training had it.
      with_data: False does without the dataset, see `experiment.remembered_dataset`.

    Raises:
      FFLError: there is no such checkpoint, or the data is missing or not what was trained on.
    """
    directory = Path(workdir) / "checkpoints"
    seeds = sorted(Path(workdir).glob("seed_*/checkpoints"))
    if seeds and not directory.exists():
        raise ConfigError(
            f"{workdir} holds {len(seeds)} seeds: choose one, such as --workdir={seeds[0].parent}."
        )
    directory, step = checkpoint.locate(directory, step)
    run = checkpoint.load_run(directory, step)
    config = config_lib.from_json(run["config"])
    if data_dir is not None:
        config.data.data_dir = data_dir
    where = directory / str(step)
    dataset = data.load(config.data) if with_data else remembered_dataset(run, where)
    experiment = Experiment(config, dataset)
    check_belongs(run, experiment, where)
    return Restored(experiment, step, run, checkpoint.restore(directory, step, experiment.abstract_state()))


def evaluate_checkpoint(
    workdir: str | Path,
    step: int | None = None,
    split: str = "test",
    data_dir: str | None = None,
    predictor: str | None = None,
) -> tuple[int, dict[str, dict]]:
    """Scores a checkpoint with nothing but what is in it and the dataset; writes nothing.

    Args:
      workdir, step, data_dir: see `restore_checkpoint`.
      split: "test", "validation" or "train".
      predictor: whose errors are counted class by class; what is shipped by default.

    Returns:
      (step, what `Evaluator` gives for it, and `per_class` of `confusion`).

    Raises:
      FFLError: there is no such checkpoint, split or prediction, or the data is missing or not what was
        trained on.
    """
    check_choice("split", split, ("train", "validation", "test"))
    restored = restore_checkpoint(workdir, step, data_dir)
    experiment = restored.experiment
    part = getattr(experiment.dataset, split)
    if part is None:
        raise ConfigError(f"{workdir} has no {split} split: it was trained without one.")
    predictor = predictor or experiment.method.headline
    if predictor not in (known := experiment.method.roles()):
        raise ConfigError(
            f"{experiment.config.method.name} has no prediction {predictor!r}: {nearest(predictor, known)}"
        )
    parallel = Parallel(experiment.config.parallel.mode)
    evaluator = Evaluator(experiment.method, part, experiment.config, parallel, predictor)
    scored = evaluator(parallel.place_runs([restored.state]))
    assert scored  # no signal stops what no training began
    scores, names = scored[0], experiment.dataset.class_names
    return restored.step, scores | {"per_class": confusion.per_class(scores["classes"], names, predictor)}
