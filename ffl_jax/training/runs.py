"""The runs of one training, one for each seed: their folders, their first states, their summaries."""

import contextlib
import dataclasses
import functools
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from ffl_jax.devices import processes
from ffl_jax.devices.parallel import Parallel
from ffl_jax.errors import CheckpointError, NonFiniteError, ResourceError
from ffl_jax.training import config as config_lib
from ffl_jax.training import confusion, start_weights, steps, summary, teachers
from ffl_jax.training.experiment import Experiment, check_belongs, run_record, stands_still, versions
from ffl_jax.workdir import checkpoint
from ffl_jax.workdir.run_folder import RunFolder

_RECALLED = ("best", "evaluated_step", "scores", "seconds")  # of a `Run`, by its checkpoints


@dataclasses.dataclass
class Run:
    """One seed: where it is written, and what is known of it beside its arrays.

    Attributes:
      experiment: of this seed alone.
      folder: its own.
      best: {"step", "epoch", "validation_top1", "predictors"} of the epoch that the validation split prefers;
        None without one.
      evaluated_step: the last step that was evaluated, -1 at first.
      scores: {split: what `Evaluator` gives} there.
      seconds: that training took, with evaluations and earlier starts; a part where seeds share it.
      log_bytes: size of `metrics.jsonl` at the checkpoint that it continues from.
      alarms: those that were sounded at the last evaluation; again after a restart.
      diverged: whether it met a number that is not finite.
    """

    experiment: Experiment
    folder: RunFolder
    best: dict | None = None
    evaluated_step: int = -1
    scores: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    log_bytes: int = 0
    alarms: frozenset = frozenset()
    diverged: bool = False

    def record(self, num_devices: int) -> dict:
        """What a checkpoint holds beside the state."""
        self.folder.log.sync()
        about = {key: getattr(self, key) for key in _RECALLED}
        return run_record(self.experiment, num_devices, metrics_bytes=self.folder.log.size, **about)

    def recall(self, record: dict):
        """Takes back what `record` gave."""
        self.log_bytes = record["metrics_bytes"]
        for key in _RECALLED:
            setattr(self, key, record[key])

    def check_finite(self, record, step: int, params=None):
        """Raises NonFiniteError, naming the first bad step and its terms, or parameters, if there are."""
        count, finite = int(record["steps"]), int(record["finite_steps"])
        if finite < count:
            terms = [name for name, x in record["terms"].items() if not np.isfinite(x)]
            predictions = record["predictions"].items()
            logits = [f"logits of {name}" for name, sums in predictions if not np.isfinite(sums["nll"])]
            self._refuse(step - count + finite + 1, [*logits[:4], *terms])
        broken = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if not np.isfinite(np.asarray(leaf)).all()
        ]
        if broken:
            self._refuse(step, broken)

    def _refuse(self, step, names):
        self.diverged = True
        kept = self.folder.steps()
        raise NonFiniteError(
            f"training became infinite or not a number at step {step}, in {', '.join(names[:6])}: lower "
            f"config.optimizer.learning_rate (now {self.experiment.config.optimizer.learning_rate}); "
            f"last good checkpoint: {f'step {kept[-1]}' if kept else 'none'} in {self.folder.checkpoints}."
        )


class Runs:
    """One run, or several that differ in their seed, side by side.

    Attributes:
      experiment: of all of them.
      each: a `Run` for each seed.
      several: whether there are several, each in a folder of its own.
      writes: whether this process is the one that writes.
    """

    def __init__(self, experiment: Experiment, workdir: Path, parallel: Parallel):
        self.experiment, self.workdir, self.several = experiment, workdir, parallel.num_seeds > 1
        self.device = f"{parallel.num_devices} x {parallel.devices[0].device_kind}"
        self.writes = processes.is_first()
        seeds = range(experiment.config.seed, experiment.config.seed + parallel.num_seeds)
        self.each = [
            Run(experiment.of_seed(seed), RunFolder(workdir / f"seed_{seed}" if self.several else workdir))
            for seed in seeds
        ]
        self._clock = None

    def __len__(self) -> int:
        return len(self.each)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.each)

    @property
    def evaluated_step(self) -> int:
        """The last step that all runs have evaluated."""
        return min(run.evaluated_step for run in self)

    def are_complete(self, step: int) -> bool:
        """Whether this is the last step, and all runs have evaluated it."""
        per_epoch = self.experiment.steps_per_epoch
        is_last = step >= self.experiment.total_steps or all(
            stands_still(self.experiment.config, per_epoch, run.best, run.evaluated_step) for run in self
        )
        return is_last and all(run.evaluated_step == step for run in self)

    def newest_step(self) -> int | None:
        """The newest step that all runs have whole; None where a kill came before all had one."""
        while True:
            newest = [run.folder.newest_step() for run in self]
            kept = [set(run.folder.steps()) for run in self]
            if None in newest and all(len(one) < 2 for one in kept):
                return None
            common = set.intersection(*kept)
            if not common:
                raise CheckpointError(
                    f"{self.workdir}: no step is whole in the checkpoints of all seeds: begin again in "
                    "another --workdir, or continue each seed alone in its own folder."
                )
            with contextlib.suppress(CheckpointError):  # by size only were they whole, but now set aside
                return max(checkpoint.find(run.folder.checkpoints, max(common), True) for run in self)

    def first_states(self) -> list[steps.TrainState]:
        """The state of each run before its first step; the teachers that it needs are trained."""
        states = []
        for run in self:
            state = run.experiment.initial_state()
            if self.writes:
                state = start_weights.install(state, run.experiment)
                state = teachers.install(state, run.experiment, run.folder.path)
            states.append(processes.from_first(state))
        return states

    def restored(self, step: int) -> list[steps.TrainState]:
        """The state of each run at a step that all have; they recall what was known then."""
        states = []
        for run in self:

            def load(run=run):
                record = checkpoint.load_run(run.folder.checkpoints, step)
                check_belongs(record, run.experiment, run.folder.checkpoints / str(step))
                return record

            record = processes.value_of_first(load)
            run.recall(record)
            if self.writes:
                self._tell_versions(record["versions"], step)
                if run.best is not None and run.experiment.dataset.validation is not None:
                    run.folder.mend_best(run.best["step"])
                abstract = run.experiment.abstract_state()
                state = checkpoint.restore(run.folder.checkpoints, step, abstract)
            else:
                state = run.experiment.initial_state()  # for its form
            states.append(processes.from_first(state))
        return states

    def _tell_versions(self, then: dict, step: int):
        now = versions().items()
        different = [f"{name} {then.get(name)} -> {new}" for name, new in now if then.get(name) != new]
        if different:
            text = "Step %d was written under other versions, numbers may differ from here on: %s"
            logging.warning(text, step, ", ".join(different))

    def check_space(self):
        """Raises ResourceError now, not after an epoch, where the checkpoints cannot fit."""
        leaves, keep = (
            jax.tree.leaves(self.experiment.abstract_state()),
            self.experiment.config.checkpoint.keep,
        )
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) * (keep + 1) * len(self)
        free = shutil.disk_usage(self.workdir).free
        if free < needed:
            raise ResourceError(
                f"{self.workdir} has {free / 1e6:.1f} MB free, but {keep} checkpoints and the next one "
                f"need {needed / 1e6:.1f} MB: free space, or choose another --workdir."
            )

    def stop_watch(self):
        """Gives the runs the time that went by since the last call, each its part."""
        now = time.monotonic()
        for run in self:
            run.seconds += (now - (self._clock or now)) / len(self)
        self._clock = now

    def write_summary(self, status: str, step: int, speeds: dict[str, float | None]) -> dict:
        """Writes every run's summary, and one of all seeds where they are several; returns the latter."""
        # Of those that ended because another one diverged, each was well itself.
        own = ["preempted" if status == "diverged" and not run.diverged else status for run in self]
        written = [self._write(run, one, step, speeds) for run, one in zip(self, own, strict=True)]
        joint = summary.joint(written) | {"status": status}
        self._write_joint(joint, anew=True)
        return joint

    def _write_joint(self, joint: dict, anew: bool):
        if self.several and self.writes:
            folder = RunFolder(self.workdir)
            folder.write_config(config_lib.to_json(self.experiment.config), anew)
            if anew or folder.read_summary() != joint:
                folder.write_summary(joint)

    def stored_summary(self, step: int) -> dict:
        """The summary of a complete training; that of a run is written again where a kill came before it."""
        summaries = []
        for run in self:
            stored = run.folder.read_summary()
            whole = summary.repeats(stored, run, step)
            summaries.append(stored if whole else self._write(run, "completed", step, {}))
            if self.writes:
                run.folder.write_config(config_lib.to_json(run.experiment.config), anew=False)
        joint = summary.joint(summaries)
        self._write_joint(joint, anew=False)
        return joint

    def _write(self, run, status, step, speeds):
        one = summary.of_run(run, self._costs, status, step, speeds, self.device)
        if self.writes:
            classes = run.scores.get("test", {}).get("classes")
            if classes and classes["confusion"]:
                table = confusion.csv_of(classes, run.experiment.dataset.class_names)
                run.folder.write_confusion(table)
            run.folder.write_summary(one)
        return one

    @functools.cached_property
    def _costs(self):
        return summary.Costs(self.experiment)
