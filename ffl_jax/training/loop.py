"""The training loop: what is due, do it, step. No maths."""

import contextlib
import copy
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ffl_jax import data
from ffl_jax.devices import preemption, processes
from ffl_jax.devices.parallel import Parallel
from ffl_jax.errors import NonFiniteError
from ffl_jax.methods.base import KNOWLEDGE
from ffl_jax.training import config as config_lib
from ffl_jax.training import (
    cost,
    metrics,
    optimizers,
    programs,
    start_weights,
    steps,
    teachers,
    vectorize,
)
from ffl_jax.training.experiment import Experiment
from ffl_jax.training.runs import Run, Runs
from ffl_jax.training.scoring import Evaluator
from ffl_jax.workdir import alarms, checkpoint, curves
from ffl_jax.workdir.onlooker import Onlooker
from ffl_jax.workdir.progress import Pace, Progress
from ffl_jax.workdir.run_folder import RunFolder

_RESULTS = {f"final/{key}": key for key in ("top1", "top5", "nll", "ece")}  # of a run, in TensorBoard


def train(
    config: ConfigDict,
    workdir: str | Path,
    dataset: data.Dataset | None = None,
    callback: Callable[[dict], None] | None = None,
) -> dict:
    """Trains, or continues, the run in `workdir`, and returns its summary.

    With `config.num_seeds` > 1, these are as many runs in one program, in `workdir/seed_N` each.

    Args:
      config: see `training/defaults.py`.
      workdir: made if it is not there.
      dataset: where it is loaded already, in place of the one that `config.data` describes.
      callback: called with each line that `metrics.jsonl` gets, and its "seed". At the end of this call,
        however it comes, with the summary, whose "split" is "end". What it raises is said once, and the run
        goes on without it. Of several processes the first calls it; teachers that are trained do not.

    Raises:
      FFLError: with the exit code of what went wrong; `Preempted` when a signal stopped the run and its state
        is saved.
    """
    tell = functools.partial(Onlooker("callback"), callback or (lambda line: None))
    config_lib.check(config)
    parallel = Parallel(**config.parallel, num_seeds=config.num_seeds)
    parallel.check_batch_size(config.batch_size, config.accumulate)
    workdir = Path(workdir).absolute()
    with contextlib.ExitStack() as stack:
        locks = [stack.enter_context(checkpoint.lock(workdir))] if processes.is_first() else []
        experiment = Experiment(config, dataset or data.load(config.data))
        parallel.check_networks(experiment.method.subnetworks)
        processes.check_equal(experiment.identity())
        vectorize.settle(experiment, parallel)
        runs = Runs(experiment, workdir, parallel)
        if runs.several and processes.is_first():  # each can be continued alone
            locks += [stack.enter_context(checkpoint.lock(run.folder.path)) for run in runs]
        step = processes.value_of_first(runs.newest_step)
        if step is None:
            for run in runs:
                for teacher, folder in teachers.to_train(run.experiment.config, run.folder.path):
                    train(teacher, folder)
            step, states = 0, None
        else:
            states = runs.restored(step)
            logging.info("Continuing from step %d of %d.", step, experiment.total_steps)
        if runs.are_complete(step):
            epochs = step // experiment.steps_per_epoch
            logging.info("%s is complete: %d epochs. Nothing to do.", workdir, epochs)
            return told(runs.stored_summary(step), tell)
        if processes.is_first():
            runs.check_space()
        logging.info("Learning rate: %s", optimizers.course(config.optimizer, config.epochs))
        for text in start_weights.told(experiment):
            logging.info(text)
        loop = Loop(runs, parallel, step, locks, tell)
        loop.begin_compiling(stack)
        cost.tell_memory(experiment, parallel)
        return loop.train(states or runs.first_states())


def told(summary: dict, tell: Callable[[dict], None]) -> dict:
    """A summary, of which the callback has heard."""
    if processes.is_first():
        tell(copy.deepcopy({**summary, "split": "end"}))
    return summary


class Loop:
    """Trains the runs of one training from one step on.

    Attributes:
      step: finished steps, or begun ones where the devices still work.
      saved: (step, the last evaluated step) of the newest checkpoint.
      line: (record, step) of the latest line of the log, which waits here for the devices; None without one.
    """

    def __init__(
        self,
        runs: Runs,
        parallel: Parallel,
        step: int,
        locks: Sequence[checkpoint.lock],
        tell: Callable[[dict], None],
    ):
        """Args: runs: at that step. locks: of the folders that are written. tell: `train`'s callback."""
        self.runs, self.parallel, self.experiment = runs, parallel, runs.experiment
        self.config = self.experiment.config
        self.step, self.saved, self.line = step, (step, runs.evaluated_step), None
        self.locks, self.curves, self.told = locks, Onlooker("curves.png"), tell
        self.inputs: Any = None
        self.wait_for_program: Callable[[], object] = lambda: None
        self.pace = Pace()
        self.host = processes.Agreement(self.pace, step)
        self.progress = Progress(
            self.experiment.total_steps,
            step,
            self.config.batch_size * len(runs),
            self.experiment.steps_per_epoch,
        )

    def train(self, states: list[steps.TrainState]) -> dict:
        """Trains from these states, one of each run, to the end or until a signal; returns the summary."""
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(preemption.deferred())
                self.runs.stop_watch()
                self.open(stack)
                self.loop(self.parallel.place_runs(states))
                if self.runs.are_complete(self.step):
                    self.write_results()
        except NonFiniteError:
            self.write_summary("diverged")
            raise
        finally:
            self.progress.close()
        processes.gathered([self.step])  # the last checkpoint is whole: now all of them may end
        if self.runs.are_complete(self.step):
            return self.write_summary("completed")
        self.write_summary("preempted")
        raise preemption.stop(self.step)

    def write_summary(self, status: str) -> dict:
        """See `Runs.write_summary`: at this step, with the speeds that were seen."""
        self.guard()
        self.runs.stop_watch()
        speeds = {
            "images_per_second": self.progress.images_per_second,
            "start_seconds": self.pace.start_seconds,
        }
        return told(self.runs.write_summary(status, self.step, speeds), self.told)

    def write_results(self):
        """The scores of the last evaluation of what is shipped."""
        for run in self.runs if self.runs.writes else ():
            scores = run.scores["test"]["predictions"][self.experiment.method.headline]
            run.folder.log.write_result(self.step, {name: scores[key] for name, key in _RESULTS.items()})

    def open(self, stack: contextlib.ExitStack):
        """Makes what the loop needs: the runs' folders, batches, compiled programs."""
        config, dataset, method = self.config, self.experiment.dataset, self.experiment.method
        for run in self.runs if self.runs.writes else ():
            settings, keep = config_lib.to_json(run.experiment.config), config.checkpoint.keep
            best = dataset.validation is not None
            stack.enter_context(run.folder.open(settings, self.step, run.log_bytes, keep, best, self.guard))
            trained = config_lib.fixed_part(settings) | {"epochs": config.epochs}
            run.folder.log.write_settings(self.step, config_lib.flatten(trained), list(_RESULTS))
        self.open_inputs(stack)
        self.batches = None
        self.before_epoch = programs.before_epoch(self.experiment, self.parallel)
        variables = self.experiment.abstract_state().variables
        self.evaluators = {
            name: Evaluator(method, split, config, self.parallel, variables=variables)
            for name, split in (("validation", dataset.validation), ("test", dataset.test))
            if split is not None
        }

    def begin_compiling(self, stack: contextlib.ExitStack):
        """Has the training's program compiled while the first state is drawn and the rest made ready."""
        in_memory = isinstance(self.experiment.dataset.train, data.Split)  # else processes start for images
        if self.parallel.compiles_ahead and in_memory and self.step < self.experiment.total_steps:
            self.open_inputs(stack)
            self.wait_for_program = self.parallel.compile_ahead(
                self.program,
                self.experiment.abstract_state(),
                next(self.inputs.batches(0, 0)),
                self.parallel.place(np.int32(0)),
            )

    def open_inputs(self, stack: contextlib.ExitStack):
        """Makes the batches, and the program that trains on them, unless they are there."""
        if self.inputs is None:
            split, num_views = self.experiment.dataset.train, self.experiment.method.num_views
            self.inputs = data.train_input(split, self.config, self.parallel, num_views)
            stack.callback(self.inputs.close)
            self.program = programs.training(self.experiment, self.inputs, self.parallel)

    def guard(self):
        """Raises CheckpointError where another run has come to write to one of the folders."""
        for lock in self.locks:
            lock.check()

    def loop(self, state):
        """What is due, then some steps, until the end or a signal; the last state is being saved then."""
        while True:
            if self.evaluation_is_due() and not self.host.stopping(self.step):
                self.evaluate(state)
            # Asked again, for a signal may have come, and ended the evaluation. What was saved before an
            # evaluation is saved once more after it: scores and the best epoch go with the state.
            stopping, complete = self.host.stopping(self.step), self.runs.are_complete(self.step)
            if (stopping or complete or self.checkpoint_is_due()) and self.saved != (
                self.step,
                self.runs.evaluated_step,
            ):
                self.save(state)
            if complete and self.step < self.experiment.total_steps:
                patience = self.config.evaluation.patience
                logging.info("Stopped early: not better in %d evaluations of the validation split.", patience)
            if stopping or complete:
                return
            if self.at_epoch:
                # Not saved: a continued run does it again from the same parameters.
                state = self.before_epoch(state)
                if self.host.stopping(self.step):
                    continue
            state = self.take_steps(state)

    @property
    def at_epoch(self) -> bool:
        """Whether an epoch begins here."""
        return self.step % self.experiment.steps_per_epoch == 0

    def every(self, epochs: int) -> bool:
        """Whether so many epochs are over, or all of them."""
        finished = self.step // self.experiment.steps_per_epoch
        return self.at_epoch and (finished % epochs == 0 or self.step == self.experiment.total_steps)

    def evaluation_is_due(self) -> bool:
        return self.every(self.config.evaluation.every_epochs) and self.runs.evaluated_step < self.step > 0

    def checkpoint_is_due(self) -> bool:
        every_steps = self.config.checkpoint.every_steps
        after_steps = every_steps > 0 and self.step % every_steps == 0
        return after_steps or self.every(self.config.checkpoint.every_epochs)

    def take_steps(self, state):
        """Gives the devices as many steps as fit until something is due; returns the state after them."""
        if self.batches is None or self.at_epoch:
            epoch, position = divmod(self.step, self.experiment.steps_per_epoch)
            self.batches = self.inputs.batches(epoch, position)
            if self.step == 0:
                self.batches = self.shown(self.batches)
        count = self.count()
        self.wait_for_program()
        state, record = self.program(state, next(self.batches), self.parallel.place(np.int32(count)))
        self.step += count
        self.progress.advance(count)
        # The host is one dispatch ahead, never more, so that a signal need not wait for long. A line is read
        # one dispatch after its last step, when its numbers are there without waiting.
        self.pace.wait(record, count)
        self.write_line()
        if self.step % self.config.log_every_steps == 0 or self.at_epoch:
            self.line = record, self.step
        return state

    def count(self) -> int:
        """Steps until the next at which something may be due, but no more than last for a moment."""
        ends = (
            self.config.log_every_steps,
            self.config.checkpoint.every_steps,
            self.experiment.steps_per_epoch,
        )
        until = (end - self.step % end for end in ends if end)  # 0 stands for never
        return min(self.host.steps, *until) if self.inputs.reusable else 1

    # -- what is told and kept -----------------------------------------------------------------------------

    def shown(self, batches):
        """The same batches; images of the first go to the log of the first run, as its networks see them."""
        first = next(batches)
        views = programs.images_shown(self.experiment, self.inputs, self.parallel, first)
        for k, view in enumerate(views if self.runs.writes else ()):
            name = f"train/batch/view_{k}" if len(views) > 1 else "train/batch"
            self.runs.each[0].folder.log.write_images(0, name, view)
        return itertools.chain([first], batches)

    def write_line(self):
        """Writes the line of the log that waits, if there is one; raises if a step was not finite."""
        if self.line is None:
            return
        (record, step), self.line = self.line, None
        speed, means = self.progress.images_per_second, []
        epoch, method = step / self.experiment.steps_per_epoch, self.experiment.method
        for run, one in zip(self.runs, jax.device_get(self.parallel.fetch_runs(record)), strict=True):
            run.check_finite(one, step)
            terms = {name: float(total) / int(one["steps"]) for name, total in one["terms"].items()}
            scores = {name: metrics.classification_scores(sums) for name, sums in one["predictions"].items()}
            means.append((sum(terms[name] for name in method.trains), scores[method.headline]["top1"]))
            if self.runs.writes:
                gauges = {name: float(x) for name, x in one["gauges"].items()}
                self.log(run, step, epoch, "train", terms | metrics.by_name(scores), gauges)
                if speed:
                    run.folder.log.write_speed(step, speed)
        self.progress.show(step, *np.mean(means, axis=0))

    def log(self, run: Run, *line):
        """Writes a line, which the callback gets too; see `MetricsLog.write`."""
        self.told({**run.folder.log.write(*line), "seed": run.experiment.config.seed})

    def evaluate(self, state):
        """Scores every split; keeps the state if validation prefers it, draws the curves, sounds alarms.

        A signal ends it early, and nothing is kept: the continued run begins with it again.
        """
        self.write_line()
        by_split = {split: evaluator(state) for split, evaluator in self.evaluators.items()}
        if None not in by_split.values():
            for index, run in enumerate(self.runs):
                run.scores = {split: seeds[index] for split, seeds in by_split.items()}
                run.evaluated_step = self.step
            epoch = self.step / self.experiment.steps_per_epoch
            for index, run in enumerate(self.runs):
                self.judge(run, epoch, lambda index=index: self.parallel.fetch_runs(state)[index])
                if self.runs.writes:
                    self.tell(run, epoch)
            self.tell_scores(epoch)
        self.progress.restart_clock()
        self.pace.restart_clock()

    def judge(self, run: Run, epoch: float, state):
        """Writes the scores; keeps `state()` as the best if the validation split prefers it."""
        for split, one in run.scores.items() if self.runs.writes else ():
            diversity = metrics.pair_means(one["diversity"])
            scalars = metrics.by_name(one["predictions"]) | metrics.by_name({"diversity": diversity})
            self.log(run, self.step, epoch, split, scalars)
        if "validation" in run.scores:
            top1 = run.scores["validation"]["predictions"][self.experiment.method.headline]["top1"]
            if run.best is None or top1 > run.best["validation_top1"]:
                test = run.scores["test"]["predictions"]
                run.best = {"step": self.step, "epoch": epoch, "validation_top1": top1, "predictors": test}
                self.keep(run, state(), RunFolder.save_best)
        if self.runs.writes and self.config.log_histograms:
            run.folder.log.write_histograms(self.step, {"params": jax.device_get(state().params)})

    def tell(self, run: Run, epoch: float):
        """Logs what has begun to look wrong since the last evaluation, and draws the curves."""
        method, test, rows = self.experiment.method, run.scores["test"], run.folder.log.rows
        terms = {name: (term.kind, term.learner) for name, term in self.experiment.terms.items()}
        knowledge = [name for name, (kind, _) in terms.items() if kind == KNOWLEDGE]
        found = alarms.identical(method.subnetwork_names(), test["diversity"])
        found |= alarms.growing(rows, method.num_classes, knowledge)
        for name in sorted(found.keys() - run.alarms):
            logging.warning("ALARM, %s, epoch %g: %s", run.folder.path, epoch, found[name])
        run.alarms = frozenset(found)
        config = self.config
        title = f"{config.method.name} · {config.subnetworks.network} · {config_lib.dataset_title(config)}"
        path = run.folder.path / "curves.png"
        names = list(test["predictions"])
        self.curves(curves.draw_curves, path, rows, title, method.headline, names, terms)

    def tell_scores(self, epoch: float):
        """Logs the scores of the last evaluation: of one run, or the mean over several."""
        over = f", mean of {len(self.runs)} seeds" if self.runs.several else ""
        for split, one in self.runs.each[0].scores.items():
            means = {
                name: np.mean([run.scores[split]["predictions"][name]["top1"] for run in self.runs])
                for name in one["predictions"]
            }
            shown = "  ".join(f"{name} {100 * top1:.2f}%" for name, top1 in means.items())
            self.progress.tell(f"epoch {epoch:g}, {split}{over}: {shown}")

    def save(self, state):
        """Begins to save every run; raises NonFiniteError instead where one is beyond use."""
        self.write_line()
        for run, one in zip(self.runs, self.parallel.fetch_runs(state), strict=True):
            # Replaced where a signal had it saved before the evaluation that was due.
            self.keep(run, one, RunFolder.save, replace=self.saved[0] == self.step)
        self.saved = (self.step, self.runs.evaluated_step)

    def keep(self, run: Run, state, save, **options):
        """Saves a state by a method of its folder, if it is finite."""
        run.check_finite(jax.device_get(state.record), self.step, state.params)
        if self.runs.writes:
            self.runs.stop_watch()
            save(run.folder, self.step, state, run.record(self.parallel.num_devices), **options)
