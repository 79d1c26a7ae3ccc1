"""The training loop: data, state, step, log, evaluate, checkpoint; no maths."""

import contextlib
import itertools
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ffl_jax import data
from ffl_jax.devices import backend, preemption, processes
from ffl_jax.devices import parallel as parallel_lib
from ffl_jax.errors import CheckpointError, NonFiniteError, ResourceError
from ffl_jax.training import config as config_lib
from ffl_jax.training import cost, steps, vectorize
from ffl_jax.training.experiment import Experiment, resolve
from ffl_jax.training.run import Run, joint_summary, tell
from ffl_jax.training.scoring import Evaluator, Sweep
from ffl_jax.workdir import checkpoint, outputs
from ffl_jax.workdir.progress import Pace, Progress

_SHOWN = 32  # images of a training batch


def train(config: ConfigDict, workdir: str | Path, dataset: data.Dataset | None = None) -> dict:
    """Trains, or continues, the run in `workdir`, and returns its summary.

    With `config.num_seeds` > 1, these are as many runs in one program, in `workdir/seed_N` each.

    Args:
      config: see `configs/common.py`.
      workdir: made if it is not there.
      dataset: where it is loaded already, in place of the one that `config.data` describes.

    Raises:
      FFLError: with the exit code of what went wrong; `Preempted` when a signal stopped the run and its state
        is saved.
    """
    config_lib.check(config)
    parallel = parallel_lib.Parallel(**config.parallel, num_seeds=config.num_seeds)
    parallel.check_batch_size(config.batch_size, config.accumulate)
    workdir = Path(workdir).absolute()
    with checkpoint.lock(workdir) if processes.is_first() else contextlib.nullcontext():
        return _Training(config, workdir, parallel, dataset or data.load(config.data)).train()


class _Training:
    """One run, or several that differ in their seed, side by side.

    Attributes:
      experiment: of the first run. The others have its method and optimisers too.
      runs: one for each seed.
    """

    def __init__(self, config, workdir, parallel, dataset):
        self.workdir, self.parallel = workdir, parallel
        devices = f"{parallel.num_devices} x {parallel.devices[0].device_kind}"
        self.config = resolve(config, dataset)
        self.runs = []
        for seed in range(config.seed, config.seed + config.num_seeds):
            own = ConfigDict(self.config.to_dict())
            own.seed, own.num_seeds = seed, 1
            folder = workdir / f"seed_{seed}" if config.num_seeds > 1 else workdir
            experiment = Experiment(own, dataset)
            self.runs.append(Run(experiment, folder, devices, parallel.num_devices, config.num_seeds))
        self.experiment = self.runs[0].experiment
        self.total_steps = self.runs[0].total_steps
        parallel.check_networks(self.experiment.method.subnetworks)
        processes.check_same(self.experiment.identity())
        vectorize.settle(self.experiment, parallel)

    def train(self) -> dict:
        step = processes.value_of_first(self.newest_step)
        states = [run.restore(step, train) for run in self.runs]
        if step is not None:
            logging.info("Continuing from step %d of %d.", step, self.total_steps)
        step = step or 0
        if step >= self.total_steps and all(run.evaluated_step == step for run in self.runs):
            logging.info("%s is complete: %d epochs. Nothing to do.", self.workdir, self.config.epochs)
            return joint_summary([run.stored_summary(step) for run in self.runs])
        if processes.is_first():
            self.check_space()
        self.tell_memory()
        progress = Progress(
            self.total_steps,
            step,
            self.config.batch_size * len(self.runs),
            self.experiment.steps_per_epoch,
        )
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(preemption.deferred())
                for run in self.runs:
                    stack.enter_context(run.writing(step))
                state = states[0] if len(states) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *states)
                step = self.loop(self.parallel.place(state, parallel_lib.OWN), step, progress, stack)
        except NonFiniteError:
            self.write_summary("diverged", progress.step, progress.images_per_second)
            raise
        finally:
            progress.close()
        processes.gathered([step])  # the last checkpoint is whole: now all of them may end
        done = step == self.total_steps and all(run.evaluated_step == step for run in self.runs)
        summary = self.write_summary("completed" if done else "preempted", step, progress.images_per_second)
        if not done:
            raise preemption.stop(step)
        return summary

    def newest_step(self) -> int | None:
        """The newest step that all runs have whole; None where a kill came before all had one."""
        newest = [run.newest_step() for run in self.runs]
        kept = [checkpoint.steps(run.directory) for run in self.runs]
        if None in newest and all(len(one) < 2 for one in kept):
            return None
        step = min(step or 0 for step in newest)
        for run, one in zip(self.runs, kept, strict=True):
            if step not in one:
                raise CheckpointError(
                    f"{run.directory} has no whole step {step}, which is the newest of another seed: begin "
                    "again in another --workdir, or continue each seed alone in its own folder."
                )
        return step

    def check_space(self):
        """Raises ResourceError now, not after an epoch, where the checkpoints cannot fit."""
        leaves = jax.tree.leaves(self.experiment.abstract_state())
        copies = (self.config.checkpoint.keep + 1) * len(self.runs)
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) * copies
        free = shutil.disk_usage(self.workdir).free
        if free < needed:
            raise ResourceError(
                f"{self.workdir} has {free / 1e6:.1f} MB free, but {self.config.checkpoint.keep} checkpoints "
                f"and the next one need {needed / 1e6:.1f} MB: free space, or choose another --workdir."
            )

    def tell_memory(self):
        """Logs what training will take of each device, and a warning where it is more than there is."""
        here = len(self.runs) // self.parallel.seeds
        at_once = 1 if backend.is_cpu() else here
        needed = cost.training_memory(self.experiment, self.parallel.shares, here, at_once)
        parts = (f"{part} {size / 1e6:.0f} MB" for part, size in needed.items())
        logging.info("Memory for training on each device, estimated: %s.", ", ".join(parts))
        limit = (self.parallel.devices[0].memory_stats() or {}).get("bytes_limit")
        if limit and sum(needed.values()) > limit:
            logging.warning(
                "That is more than the device's %.0f MB: set config.accumulate=2 or more, "
                "config.subnetworks.remat=True, config.precision=bfloat16, or a smaller config.batch_size.",
                limit / 1e6,
            )

    def write_summary(self, status: str, step: int, images_per_second: float | None) -> dict:
        """Writes every run's summary, and one of all seeds where they are several; returns the latter."""
        summaries = []
        for run in self.runs:
            # The others were well, and stopped with it.
            own = "preempted" if status == "diverged" and not run.diverged else status
            summaries.append(run.write_summary(own, step, images_per_second))
        summary = joint_summary(summaries) | {"status": status}
        if len(self.runs) > 1 and processes.is_first():
            outputs.write_json(self.workdir / "config.json", config_lib.to_json(self.config))
            outputs.write_json(self.workdir / "summary.json", summary)
        return summary

    def loop(self, state, step, progress, stack) -> int:
        """Trains from `step` to the end, or until a signal; returns the last step, which is being saved."""
        config, dataset, per_epoch = self.config, self.experiment.dataset, self.experiment.steps_per_epoch
        method = self.experiment.method
        views = method.subnetworks.num if method.views else 0
        inputs = data.train_input(dataset.train, config, self.parallel, views)
        stack.callback(inputs.close)
        program, before_epoch = self.training_program(inputs), self.validation_update()
        evaluators = {
            name: Evaluator(method, split, config, self.parallel)
            for name, split in (("validation", dataset.validation), ("test", dataset.test))
            if split is not None
        }
        batches, saved = None, (step, self.evaluated_step)
        # At multiples of these a dispatch ends; 0 stands for never.
        ends = (config.log_every_steps, config.checkpoint.every_steps, per_epoch)
        pace, line = Pace(), None  # the latest line of the log waits here for the devices
        host = processes.Agreement(pace, step)
        while True:
            epoch, position = divmod(step, per_epoch)
            last = step == self.total_steps
            due = position == 0 and (epoch % config.evaluation.every_epochs == 0 or last)
            if due and self.evaluated_step < step > 0 and not host.stopping(step):
                line = self.write_line(line, progress)
                self.evaluate(evaluators, state, step)
                progress.restart_clock()
                pace.restart_clock()
            due = position == 0 and (epoch % config.checkpoint.every_epochs == 0 or last)
            due |= config.checkpoint.every_steps > 0 and step % config.checkpoint.every_steps == 0
            stopping = host.stopping(step)
            if (due or stopping) and saved != (step, self.evaluated_step):
                line = self.write_line(line, progress)
                fetched = self.parallel.fetch(state)
                for index, run in enumerate(self.runs):
                    # Replaced where a signal had it saved before the evaluation that was due.
                    run.save(step, self.of_run(fetched, index), replace=saved[0] == step)
                saved = (step, self.evaluated_step)
            if last or stopping:
                return step
            if position == 0:
                state = before_epoch(state)
                if host.stopping(step):
                    continue
            if batches is None or position == 0:
                batches = inputs.batches(epoch, position)
                if step == 0:
                    batches = self.shown(inputs, batches)
            count = min(host.steps, *(end - step % end for end in ends if end)) if inputs.reusable else 1
            stop = self.parallel.place(np.int32(step + count))
            state, record = program(state, next(batches), stop)
            step += count
            progress.advance(count)
            pace.wait(record, count)
            line = self.write_line(line, progress)
            if step % config.log_every_steps == 0 or step % per_epoch == 0:
                line = record, step

    @property
    def evaluated_step(self) -> int:
        """The last step that all runs have evaluated."""
        return min(run.evaluated_step for run in self.runs)

    def of_run(self, tree, index: int):
        """One run's part of a tree that all share."""
        return tree if len(self.runs) == 1 else jax.tree.map(lambda x: x[index], tree)

    def training_program(self, inputs):
        """The compiled steps: (state, arrays of their batches, step to stop at) -> (state, its record).

        How many steps it takes does not change the program, and so not the bits.
        """
        experiment, every = self.experiment, self.config.log_every_steps

        def one(state_and_own, shared):
            state, own = state_and_own
            # A line of the log was written, or the run begins.
            fresh = (state.step % experiment.steps_per_epoch == 0) | (state.step % every == 0)
            state = state.replace(record=jax.tree.map(lambda x: jnp.where(fresh, 0, x), state.record))
            return steps.train_step(
                state,
                inputs.batch(own, shared, state.step),
                method=experiment.method,
                optimizers=experiment.optimizers,
                steps_per_epoch=experiment.steps_per_epoch,
                precision=experiment.config.precision,
                accumulate=experiment.config.accumulate,
            )

        each = self.parallel.for_seeds(one)

        def program(state, arrays, stop):
            own, shared = inputs.apart(arrays)
            state = jax.lax.while_loop(
                lambda state: jnp.ravel(state.step)[0] < stop,
                lambda state: each((state, own), shared),
                state,
            )
            return state, state.record

        own, shared = parallel_lib.OWN, parallel_lib.SHARED
        return self.parallel.map(program, (own, inputs.arrays, shared), (0, own), donate_argnums=(0,))

    def shown(self, inputs, batches):
        """The same batches; images of the first are written to the logs."""
        first = next(batches)

        def images(arrays):
            own, shared = inputs.apart(arrays)
            own = own if len(self.runs) == 1 else jax.tree.map(lambda x: x[0], own)
            return inputs.batch(own, shared, jnp.int32(0))["image"][..., :_SHOWN, :, :, :]

        # Of the first device, and of the first of several seeds.
        program = self.parallel.map(images, (inputs.arrays,), parallel_lib.SHARED)
        self.runs[0].write_images(np.asarray(self.parallel.fetch(program(first))), step=0)
        return itertools.chain([first], batches)

    def validation_update(self):
        """What is done to the state before every epoch: where the method learns from the validation split."""
        method = self.experiment.method
        if not method.uses_validation:
            return lambda state: state
        split = self.experiment.dataset.validation
        sweep = Sweep(steps.validation_step, method, split, self.config, self.parallel)

        def one(state_and_sums):
            state, sums = state_and_sums
            return state.replace(model_state={**state.model_state, **method.validation_state(sums)})

        each = self.parallel.for_seeds(one)
        own = parallel_lib.OWN
        program = self.parallel.map(
            lambda state, sums: each((state, sums)), (own, own), 0, donate_argnums=(0,)
        )

        def before_epoch(state):
            sums = sweep(state)
            return state if sums is None else program(state, sums)

        return before_epoch

    def write_line(self, line, progress) -> None:
        """Writes a line of the log, (record, step), if there is one; raises if a step was not finite."""
        if line is None:
            return
        record, step = jax.device_get(self.parallel.fetch(line[0])), line[1]
        speed = progress.images_per_second
        means = [
            run.write_line(self.of_run(record, index), step, speed) for index, run in enumerate(self.runs)
        ]
        loss, accuracy = np.mean(means, axis=0)
        progress.show(step, loss, accuracy)

    def evaluate(self, evaluators, state, step: int):
        """Scores every split, and has the runs keep what they need of it.

        A signal ends it early, and nothing is kept: the continued run begins with it again.
        """
        by_split = {split: evaluator(state) for split, evaluator in evaluators.items()}
        if None in by_split.values():
            return
        for index, run in enumerate(self.runs):
            scores = {split: seeds[index] for split, seeds in by_split.items()}
            run.write_scores(scores, step, lambda index=index: self.of_run(self.parallel.fetch(state), index))
        tell(step / self.experiment.steps_per_epoch, self.runs)
