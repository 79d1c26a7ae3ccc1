"""The training loop: data, state, step, log, evaluate, checkpoint; no maths."""

import contextlib
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ffl_jax import checkpoint, cost, data, execution, metrics, outputs, preemption, steps, teachers
from ffl_jax import config as config_lib
from ffl_jax import parallel as parallel_lib
from ffl_jax.errors import NonFiniteError, ResourceError
from ffl_jax.evaluation import Evaluator, Sweep
from ffl_jax.experiment import Experiment, check_same, run_record, versions
from ffl_jax.progress import Pace, Progress


def train(config: ConfigDict, workdir: str | Path, dataset: data.Dataset | None = None) -> dict:
    """Trains, or continues, the run in `workdir`, and returns its summary.

    Args:
      config: see `configs/common.py`.
      workdir: made if it is not there.
      dataset: where it is loaded already, in place of the one that `config.data` describes.

    Raises:
      FFLError: with the exit code of what went wrong; `Preempted` when a signal stopped the run and its state
        is saved.
    """
    config_lib.check(config)
    parallel = parallel_lib.Parallel(**config.parallel)
    parallel.check_batch_size(config.batch_size, config.accumulate)
    workdir = Path(workdir).absolute()
    with checkpoint.lock(workdir):
        return _Run(config, workdir, parallel, dataset or data.load(config.data)).train()


class _Run:
    """One training in one folder.

    Attributes:
      best: {"step", "epoch", "validation_top1", "predictors"} of the epoch that the validation split prefers;
        None without one.
      evaluated_step: the last step that was evaluated, -1 at first.
      scores: {split: {prediction: scores}} there.
    """

    def __init__(self, config, workdir, parallel, dataset):
        self.workdir, self.parallel = workdir, parallel
        self.directory = workdir / "checkpoints"
        self.experiment = Experiment(config, dataset)
        self.config = self.experiment.config
        execution.settle(self.experiment, parallel)
        self.total_steps = self.config.epochs * self.experiment.steps_per_epoch
        self.best = None
        self.evaluated_step = -1
        self.scores = {}

    # -- from and to the disk ------------------------------------------------------------------------------

    def restore(self):
        """(state, bytes of the log) to continue from: of the newest whole checkpoint, or of a new run."""
        if not checkpoint.exists(self.directory):
            runs = teachers.prepare(self.config, self.workdir, train)
            return teachers.install(self.experiment.initial_state(), runs, self.experiment), 0
        step = checkpoint.find(self.directory, quarantine=True)
        run = checkpoint.load_run(self.directory, step)
        check_same(run, self.experiment, self.directory / str(step))
        self.best, self.evaluated_step, self.scores = run["best"], run["evaluated_step"], run["scores"]
        state = checkpoint.restore(self.directory, step, self.experiment.abstract_state())
        logging.info("Continuing from step %d of %d.", step, self.total_steps)
        return state, run["metrics_bytes"]

    def save(self, checkpoints, step: int, state, log, replace: bool = False):
        """Begins to save; raises NonFiniteError instead where the state is beyond use."""
        log.sync()
        host_state = self.parallel.fetch(state)
        self.check_finite(jax.device_get(host_state.record), step)
        broken = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(host_state.params)
            if not np.isfinite(np.asarray(leaf)).all()
        ]
        if broken:
            raise self.diverged(step, broken)
        run = run_record(
            self.experiment, self.parallel.num_devices, log.size, self.best, self.evaluated_step, self.scores
        )
        checkpoints.save(step, host_state, run, replace)

    def check_space(self):
        """Raises ResourceError now, not after an epoch, where the checkpoints cannot fit."""
        leaves = jax.tree.leaves(self.experiment.abstract_state())
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) * (self.config.checkpoint.keep + 1)
        free = shutil.disk_usage(self.workdir).free
        if free < needed:
            raise ResourceError(
                f"{self.workdir} has {free / 1e6:.1f} MB free, but {self.config.checkpoint.keep} checkpoints "
                f"and the next one need {needed / 1e6:.1f} MB: free space, or choose another --workdir."
            )

    def tell_memory(self):
        """Logs what training will take of each device, and a warning where it is more than there is."""
        needed = cost.training_memory(self.experiment, self.parallel.num_devices)
        parts = (f"{part} {size / 1e6:.0f} MB" for part, size in needed.items())
        logging.info("Memory for training on each device, estimated: %s.", ", ".join(parts))
        limit = (self.parallel.devices[0].memory_stats() or {}).get("bytes_limit")
        if limit and sum(needed.values()) > limit:
            logging.warning(
                "That is more than the device's %.0f MB: set config.accumulate=2 or more, "
                "config.subnetworks.remat=True, config.precision=bfloat16, or a smaller config.batch_size.",
                limit / 1e6,
            )

    def check_finite(self, record, step: int):
        """Raises NonFiniteError, naming the first bad step and its terms, unless all steps were fine."""
        count, finite = int(record["steps"]), int(record["finite_steps"])
        if finite < count:
            terms = record["terms"].items()
            raise self.diverged(step - count + finite + 1, [name for name, x in terms if not np.isfinite(x)])

    def diverged(self, step: int, names: list[str]) -> NonFiniteError:
        kept = checkpoint.steps(self.directory)
        return NonFiniteError(
            f"training became infinite or not a number at step {step}, in {', '.join(names[:6])}: lower "
            f"config.optimizer.learning_rate (now {self.config.optimizer.learning_rate}); "
            f"last good checkpoint: {f'step {kept[-1]}' if kept else 'none'} in {self.directory}."
        )

    def write_summary(self, status: str, step: int, images_per_second: float | None) -> dict:
        experiment, config = self.experiment, self.config
        abstract = experiment.abstract_state()
        costs = cost.prediction_costs(
            experiment.method, abstract.params, abstract.model_state, experiment.image_shape
        )
        scores = self.scores.get("test", {})
        summary = {
            "status": status,
            "step": step,
            "epoch": step / experiment.steps_per_epoch,
            "seed": config.seed,
            "method": config.method.name,
            "networks": config_lib.network_names(config),
            "dataset": config.data.name,
            "predictors": {name: scores.get(name, {}) | one for name, one in costs.items()},
            "deploy": experiment.method.headline,
            "best": self.best,
            "images_per_second": images_per_second,
            "device": f"{self.parallel.num_devices} x {self.parallel.devices[0].device_kind}",
            "versions": versions(),
        }
        outputs.write_json(self.workdir / "summary.json", summary)
        return summary

    # -- the loop ------------------------------------------------------------------------------------------

    def train(self) -> dict:
        state, metrics_bytes = self.restore()
        step = int(state.step)
        if step >= self.total_steps and self.evaluated_step == step:
            logging.info("%s is complete: %d epochs. Nothing to do.", self.workdir, self.config.epochs)
            summary = outputs.read_json(self.workdir / "summary.json")
            if summary.get("status") == "completed" and summary.get("step") == step:
                return summary
            return self.write_summary("completed", step, None)  # it was killed just before
        self.check_space()
        self.tell_memory()
        outputs.write_json(self.workdir / "config.json", config_lib.to_json(self.config))
        log = outputs.MetricsLog(self.workdir, metrics_bytes, step)
        progress = Progress(self.total_steps, step, self.config.batch_size, self.experiment.steps_per_epoch)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(preemption.deferred())
                writers = {"newest": checkpoint.Checkpoints(self.directory, self.config.checkpoint.keep)}
                if self.experiment.dataset.validation is not None:
                    writers["best"] = checkpoint.Checkpoints(self.directory / "best", keep=1)
                for writer in writers.values():
                    stack.enter_context(writer)
                step = self.loop(self.parallel.replicate(state), step, log, progress, writers, stack)
        except NonFiniteError:
            self.write_summary("diverged", progress.step, progress.images_per_second)
            raise
        finally:
            progress.close()
            log.close()
        done = step == self.total_steps and self.evaluated_step == step
        summary = self.write_summary("completed" if done else "preempted", step, progress.images_per_second)
        if not done:
            raise preemption.stop(step)
        return summary

    def loop(self, state, step, log, progress, writers, stack) -> int:
        """Trains from `step` to the end, or until a signal; returns the last step, which is being saved."""
        config, dataset, per_epoch = self.config, self.experiment.dataset, self.experiment.steps_per_epoch
        method = self.experiment.method
        views = method.subnetworks.num if method.views else 0
        inputs = data.train_input(dataset.train, config, self.parallel, views)
        stack.callback(inputs.close)
        run, before_epoch = self.training_program(inputs), self.validation_update()
        evaluators = {
            name: Evaluator(method, split, config, self.parallel)
            for name, split in (("validation", dataset.validation), ("test", dataset.test))
            if split is not None
        }
        batches, saved = None, (step, self.evaluated_step)
        # At multiples of these a dispatch ends; 0 stands for never.
        ends = (config.log_every_steps, config.checkpoint.every_steps, per_epoch)
        pace, line = Pace(), None  # the latest line of the log waits here for the devices
        while True:
            epoch, position = divmod(step, per_epoch)
            last = step == self.total_steps
            due = position == 0 and (epoch % config.evaluation.every_epochs == 0 or last)
            if due and self.evaluated_step < step > 0 and not preemption.requested():
                line = self.write(line, log, progress)
                self.evaluate(evaluators, state, step, log, writers)
                progress.restart_clock()
                pace.restart_clock()
            due = position == 0 and (epoch % config.checkpoint.every_epochs == 0 or last)
            due |= config.checkpoint.every_steps > 0 and step % config.checkpoint.every_steps == 0
            stopping = preemption.requested()
            if (due or stopping) and saved != (step, self.evaluated_step):
                line = self.write(line, log, progress)
                # Replaced where a signal had it saved before the evaluation that was due.
                self.save(writers["newest"], step, state, log, replace=saved[0] == step)
                saved = (step, self.evaluated_step)
            if last or stopping:
                return step
            if position == 0:
                state = before_epoch(state)
                if preemption.requested():
                    continue
            if batches is None or position == 0:
                batches = inputs.batches(epoch, position)
            count = min(pace.steps, *(end - step % end for end in ends if end)) if inputs.reusable else 1
            stop = self.parallel.replicate(np.int32(step + count))
            state, record = run(state, next(batches), stop)
            step += count
            progress.advance(count)
            pace.wait(record, count)
            line = self.write(line, log, progress)
            if step % config.log_every_steps == 0 or step % per_epoch == 0:
                line = record, step

    def training_program(self, inputs):
        """The compiled steps: (state, arrays of their batches, step to stop at) -> (state, its record).

        How many steps it takes does not change the program, and so not the bits.
        """
        experiment, every = self.experiment, self.config.log_every_steps

        def one(state, arrays):
            # A line of the log was written, or the run begins.
            fresh = (state.step % experiment.steps_per_epoch == 0) | (state.step % every == 0)
            state = state.replace(record=jax.tree.map(lambda x: jnp.where(fresh, 0, x), state.record))
            return steps.train_step(
                state,
                inputs.batch(arrays, state.step),
                method=experiment.method,
                optimizers=experiment.optimizers,
                steps_per_epoch=experiment.steps_per_epoch,
                precision=experiment.config.precision,
                accumulate=experiment.config.accumulate,
            )

        def run(state, arrays, stop):
            state = jax.lax.while_loop(
                lambda state: state.step < stop, lambda state: one(state, arrays), state
            )
            return state, state.record

        return self.parallel.map(run, donate_argnums=(0,), sharded_argnums=(1,) if inputs.sharded else ())

    def validation_update(self):
        """What is done to the state before every epoch: where the method learns from the validation split."""
        method = self.experiment.method
        if not method.uses_validation:
            return lambda state: state
        split = self.experiment.dataset.validation
        sweep = Sweep(steps.validation_step, method, split, self.config, self.parallel)

        def update(state, sums):
            return state.replace(model_state={**state.model_state, **method.validation_state(sums)})

        program = self.parallel.map(update, donate_argnums=(0,))

        def before_epoch(state):
            sums = sweep(state)
            return state if sums is None else program(state, sums)

        return before_epoch

    def write(self, line, log, progress) -> None:
        """Writes a line of the log, (record, step), if there is one; raises if a step was not finite."""
        if line is None:
            return
        record, step = jax.device_get(self.parallel.fetch(line[0])), line[1]
        self.check_finite(record, step)
        terms = {name: float(total) / int(record["steps"]) for name, total in record["terms"].items()}
        scores = {name: metrics.classification_scores(sums) for name, sums in record["predictions"].items()}
        log.write(step, step / self.experiment.steps_per_epoch, "train", terms | _by_name(scores))
        headline = scores[self.experiment.method.headline]
        progress.show(
            step, loss=sum(terms[name] for name in self.experiment.method.trains), accuracy=headline["top1"]
        )
        if progress.images_per_second:
            log.write_speed(step, progress.images_per_second)

    def evaluate(self, evaluators, state, step: int, log, writers):
        """Scores every split, draws the curves, keeps the state if it is the best on the validation split.

        A signal ends it early, and nothing is kept: the continued run begins with it again.
        """
        epoch = step / self.experiment.steps_per_epoch
        by_split = {split: evaluator(state) for split, evaluator in evaluators.items()}
        if None in by_split.values():
            return
        self.scores = by_split
        for split, scores in self.scores.items():
            log.write(step, epoch, split, _by_name(scores))
            shown = "  ".join(f"{name} {100 * one['top1']:.2f}%" for name, one in scores.items())
            logging.info("epoch %g, %s: %s", epoch, split, shown)
        self.evaluated_step = step
        if "validation" in self.scores:
            top1 = self.scores["validation"][self.experiment.method.headline]["top1"]
            if self.best is None or top1 > self.best["validation_top1"]:
                scores = self.scores["test"]
                self.best = {"step": step, "epoch": epoch, "validation_top1": top1, "predictors": scores}
                self.save(writers["best"], step, state, log)
        title = f"{self.config.method.name} · {self.config.subnetworks.network} · {self.config.data.name}"
        outputs.draw_curves(self.workdir, title)


def _by_name(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{name}/{score}": value for name, one in scores.items() for score, value in one.items()}
