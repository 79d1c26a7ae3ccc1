"""One run: the training of one seed in one folder, and all that it reads from there and writes to it."""

import contextlib
import functools
import logging
import time
from pathlib import Path

import jax
import numpy as np

from ffl_jax.devices import processes
from ffl_jax.errors import NonFiniteError
from ffl_jax.training import config as config_lib
from ffl_jax.training import cost, metrics, teachers
from ffl_jax.training.experiment import Experiment, check_same, run_record, versions
from ffl_jax.workdir import alarms, checkpoint, outputs


class Run:
    """Checkpoints, log, curves and summary of one seed.

    Attributes:
      workdir, directory: the folder, and the one of its checkpoints.
      experiment: a configuration and a dataset.
      total_steps: of the whole training.
      best: {"step", "epoch", "validation_top1", "predictors"} of the epoch that the validation split prefers;
        None without one.
      evaluated_step: the last step that was evaluated, -1 at first.
      scores: {split: what `Evaluator` gives} there.
      diverged: whether it met a number that is not finite.
    """

    def __init__(
        self, experiment: Experiment, workdir: Path, devices: str, num_devices: int, num_seeds: int = 1
    ):
        """What is in `workdir` is left alone until `restore`.

        Args:
          experiment, workdir: see above.
          devices, num_devices: what trains it, for the summary and the checkpoints.
          num_seeds: runs that share the time, for the summary.
        """
        self.experiment, self.workdir = experiment, workdir
        self.directory = workdir / "checkpoints"
        self.total_steps = experiment.config.epochs * experiment.steps_per_epoch
        self._devices, self._num_devices = devices, num_devices
        self.best = None
        self.evaluated_step = -1
        self.scores = {}
        self.diverged = False
        self._metrics_bytes = 0
        self._seconds, self._began, self._num_seeds = 0.0, None, num_seeds
        self._alarms = set()
        self._writes = processes.is_first()
        self._log, self._newest, self._best = None, None, None

    # -- from the disk -------------------------------------------------------------------------------------

    def newest_step(self) -> int | None:
        """The newest step that is whole; damaged ones are set aside. None where nothing was ever saved."""
        if not checkpoint.exists(self.directory):
            return None
        return checkpoint.find(self.directory, quarantine=True)

    def restore(self, step: int | None, train):
        """The state to continue from, on one device.

        Args:
          step: a whole one, or None to begin: with teachers, these are found or trained first.
          train: `train.train`.
        """
        experiment = self.experiment
        if step is None:
            runs = teachers.prepare(experiment.config, self.workdir, train)
            state = experiment.initial_state()
            return processes.from_first(teachers.install(state, runs, experiment) if self._writes else state)
        run = processes.value_of_first(functools.partial(self._load_run, step))
        self.best, self.evaluated_step, self.scores = run["best"], run["evaluated_step"], run["scores"]
        self._metrics_bytes, self._seconds = run["metrics_bytes"], run["seconds"]
        if not self._writes:
            return processes.from_first(experiment.initial_state())
        state = checkpoint.restore(self.directory, step, experiment.abstract_state())
        return processes.from_first(state)

    def _load_run(self, step: int) -> dict:
        run = checkpoint.load_run(self.directory, step)
        check_same(run, self.experiment, self.directory / str(step))
        return run

    def stored_summary(self, step: int) -> dict:
        """The summary of a run that is complete; written again where a kill came before it."""
        summary = outputs.read_json(self.workdir / "summary.json")
        if summary.get("status") == "completed" and summary.get("step") == step:
            return summary
        return self.write_summary("completed", step, None)

    # -- to the disk ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, step: int):
        """Inside, lines and checkpoints after `step` can be written; at the end the last are on the disk."""
        config, self._began = self.experiment.config, time.monotonic()
        if not self._writes:
            yield
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        outputs.write_json(self.workdir / "config.json", config_lib.to_json(config))
        with contextlib.ExitStack() as stack:
            wandb_run = None
            if config.wandb:
                wandb_run = outputs.start_wandb(config.wandb, self.workdir, config_lib.to_json(config))
            self._log = outputs.MetricsLog(self.workdir, self._metrics_bytes, step, wandb_run)
            stack.callback(self._log.close)
            self._newest = stack.enter_context(checkpoint.Checkpoints(self.directory, config.checkpoint.keep))
            if self.experiment.dataset.validation is not None:
                self._best = stack.enter_context(checkpoint.Checkpoints(self.directory / "best", keep=1))
            yield

    def save(self, step: int, state, replace: bool = False):
        """Begins to save a state of one device; raises NonFiniteError instead where it is beyond use."""
        self._save(self._newest, step, state, replace)

    def _save(self, checkpoints, step, state, replace=False):
        self._check_finite(jax.device_get(state.record), step)
        broken = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
            if not np.isfinite(np.asarray(leaf)).all()
        ]
        if broken:
            raise self._not_finite(step, broken)
        if not self._writes:
            return
        self._log.sync()
        run = run_record(
            self.experiment,
            self._num_devices,
            self._log.size,
            self.best,
            self.evaluated_step,
            self.scores,
            self.seconds(),
        )
        checkpoints.save(step, state, run, replace)

    def write_line(self, record, step: int, images_per_second: float | None) -> tuple[float, float]:
        """Writes what the steps since the last line gave; returns their mean loss and accuracy.

        Raises:
          NonFiniteError: one of the steps was not finite.
        """
        method = self.experiment.method
        self._check_finite(record, step)
        terms = {name: float(total) / int(record["steps"]) for name, total in record["terms"].items()}
        scores = {name: metrics.classification_scores(sums) for name, sums in record["predictions"].items()}
        if self._writes:
            self._log.write(step, step / self.experiment.steps_per_epoch, "train", terms | _by_name(scores))
            if images_per_second:
                self._log.write_speed(step, images_per_second)
        return sum(terms[name] for name in method.trains), scores[method.headline]["top1"]

    def write_images(self, images: np.ndarray, step: int):
        """Shows augmented images as the networks see them, normalised [B, H, W, 3] or [K, B, H, W, 3]."""
        if not self._writes:
            return
        data = self.experiment.config.data
        pixels = np.rint(255 * (images * np.array(data.std) + np.array(data.mean)))
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
        views = pixels if images.ndim == 5 else pixels[None]
        for k, view in enumerate(views):
            name = f"train/batch/view_{k}" if len(views) > 1 else "train/batch"
            self._log.write_images(step, name, view)

    def write_scores(self, scores: dict[str, dict], step: int, state):
        """Writes the scores of every split, draws the curves, keeps the state if validation prefers it.

        Args:
          scores: {split: what `Evaluator` gives}.
          step: where they were taken.
          state: a function that gives the state there.
        """
        epoch = step / self.experiment.steps_per_epoch
        config = self.experiment.config
        self.scores, self.evaluated_step = scores, step
        for split, one in scores.items():
            if self._writes:
                self._log.write(step, epoch, split, _by_name(one["predictions"]) | _diversity(one))
        if "validation" in scores:
            top1 = scores["validation"]["predictions"][self.experiment.method.headline]["top1"]
            if self.best is None or top1 > self.best["validation_top1"]:
                test = scores["test"]["predictions"]
                self.best = {"step": step, "epoch": epoch, "validation_top1": top1, "predictors": test}
                self._save(self._best, step, state())
        if not self._writes:
            return
        self._tell_alarms(epoch)
        if config.log_histograms:
            self._log.write_histograms(step, {"params": jax.device_get(state().params)})
        title = f"{config.method.name} · {config.subnetworks.network} · {config.data.name}"
        outputs.draw_curves(self.workdir, title, self.experiment.method.headline)

    def _tell_alarms(self, epoch: float):
        """Logs what has begun to look wrong since the last evaluation; again after a restart."""
        method, test = self.experiment.method, self.scores["test"]
        rows = outputs.read_metrics(self.workdir / "metrics.jsonl")
        found = alarms.identical(method.subnetwork_names(), test["diversity"])
        found |= alarms.growing(rows, method.num_classes)
        for name in sorted(found.keys() - self._alarms):
            logging.warning("ALARM, %s, epoch %g: %s", self.workdir, epoch, found[name])
        self._alarms = found.keys()

    def seconds(self) -> float:
        """What training took until now, with evaluations and earlier starts; a part where seeds share it."""
        return self._seconds + (time.monotonic() - self._began if self._began else 0) / self._num_seeds

    def write_summary(self, status: str, step: int, images_per_second: float | None) -> dict:
        """Writes `summary.json`, and returns it."""
        experiment, config = self.experiment, self.experiment.config
        abstract = experiment.abstract_state()
        costs = cost.prediction_costs(
            experiment.method, abstract.params, abstract.model_state, experiment.image_shape
        )
        test = self.scores.get("test", {})
        scores = test.get("predictions", {})
        # To trace a step takes a second or two: once a run.
        flops = cost.training_flops(experiment) if status == "completed" else None
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
            "reliability": test.get("reliability", {}),
            "diversity": {"pairs": test["diversity"], **_diversity(test, "")}
            if test.get("diversity")
            else {},
            "training": {
                "seconds": self.seconds(),
                "flops": flops and step * flops,
            },
            "fingerprint": experiment.dataset.fingerprint,
            "images_per_second": images_per_second,
            "device": self._devices,
            "versions": versions(),
        }
        if self._writes:
            outputs.write_json(self.workdir / "summary.json", summary)
        return summary

    def _check_finite(self, record, step: int):
        """Raises NonFiniteError, naming the first bad step and its terms, unless all steps were fine."""
        count, finite = int(record["steps"]), int(record["finite_steps"])
        if finite < count:
            terms = [name for name, x in record["terms"].items() if not np.isfinite(x)]
            predictions = record["predictions"].items()
            logits = [f"logits of {name}" for name, sums in predictions if not np.isfinite(sums["nll"])]
            raise self._not_finite(step - count + finite + 1, [*logits[:4], *terms])

    def _not_finite(self, step: int, names: list[str]) -> NonFiniteError:
        self.diverged = True
        kept = checkpoint.steps(self.directory)
        return NonFiniteError(
            f"training became infinite or not a number at step {step}, in {', '.join(names[:6])}: lower "
            f"config.optimizer.learning_rate (now {self.experiment.config.optimizer.learning_rate}); "
            f"last good checkpoint: {f'step {kept[-1]}' if kept else 'none'} in {self.directory}."
        )


def tell(epoch: float, runs: list[Run]):
    """Logs the scores of the last evaluation: of one run, or the mean over several."""
    for split, one in runs[0].scores.items():
        means = {
            name: np.mean([run.scores[split]["predictions"][name]["top1"] for run in runs])
            for name in one["predictions"]
        }
        shown = "  ".join(f"{name} {100 * top1:.2f}%" for name, top1 in means.items())
        over = f", mean of {len(runs)} seeds" if len(runs) > 1 else ""
        logging.info("epoch %g, %s%s: %s", epoch, split, over, shown)


def joint_summary(summaries: list[dict]) -> dict:
    """One summary of several seeds: what differs between them, and every score, is a list over seeds."""
    first = summaries[0]
    if len(summaries) == 1:
        return first
    predictors = {
        name: {key: [one["predictors"][name].get(key) for one in summaries] for key in values}
        for name, values in first["predictors"].items()
    }
    differing = ("seed", "best", "reliability", "diversity", "training")
    lists = {key: [one[key] for one in summaries] for key in differing}
    return {**first, **lists, "predictors": predictors}


def _by_name(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{name}/{score}": value for name, one in scores.items() for score, value in one.items()}


def _diversity(scores: dict, prefix: str = "diversity/") -> dict[str, float]:
    return {f"{prefix}{name}": metrics.mean_over_pairs(one) for name, one in scores["diversity"].items()}
