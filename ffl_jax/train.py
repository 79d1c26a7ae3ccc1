"""The training loop: data, state, step, log, evaluate, checkpoint; no maths."""

import functools
import logging
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ffl_jax import checkpoint, cost, data, methods, metrics, optimizers, outputs, preemption, steps
from ffl_jax import config as config_lib
from ffl_jax import parallel as parallel_lib
from ffl_jax.data import resident
from ffl_jax.errors import CheckpointError, DatasetError, NonFiniteError
from ffl_jax.evaluation import Evaluator
from ffl_jax.progress import Progress

RUN_FORMAT = 1


class Experiment:
    """What a configuration and a dataset determine, before any number is trained."""

    def __init__(self, config: ConfigDict, dataset):
        if len(dataset.train.labels) < config.batch_size:
            raise DatasetError(
                f"{dataset.name}: {len(dataset.train.labels)} training examples are fewer than one batch: "
                f"set config.batch_size to at most that, now {config.batch_size}."
            )
        self.config = resolve(config, dataset)
        self.dataset = dataset
        self.image_shape = dataset.train.images.shape[1:]
        self.method = methods.build(config, len(dataset.class_names))
        self.steps_per_epoch = resident.steps_per_epoch(len(dataset.train.labels), config.batch_size)
        key = jax.random.key(config.seed)
        params, _ = jax.eval_shape(
            functools.partial(steps.init_variables, self.method, image_shape=self.image_shape), key
        )
        self.optimizers = optimizers.make_optimizers(
            self.method.trains,
            params,
            config.optimizer,
            config.optimizer_rules,
            self.steps_per_epoch,
            config.epochs,
        )
        self._init = functools.partial(
            steps.create_state, self.method, self.optimizers, key, image_shape=self.image_shape
        )

    def initial_state(self) -> steps.TrainState:
        """The state before the first step, on one device."""
        return jax.jit(self._init)()

    def abstract_state(self) -> steps.TrainState:
        """Its shapes and types."""
        return jax.eval_shape(self._init)


def resolve(config: ConfigDict, dataset) -> ConfigDict:
    """The configuration with what depends on the data filled in: the channels' mean and std."""
    config = ConfigDict(config)
    if not config.data.mean:
        # Whole sums of integers, so that the order of the images does not matter.
        images = dataset.train.images.reshape(-1, 3)
        sums = images.sum(axis=0, dtype=np.uint64)
        squares = np.array([np.square(images[:, c], dtype=np.uint64).sum() for c in range(3)], np.float64)
        mean = sums / len(images)
        std = np.sqrt(np.maximum(squares / len(images) - mean**2, 1.0))
        config.data.mean = tuple(float(x) for x in mean / 255)
        config.data.std = tuple(float(x) for x in std / 255)
    return config


def train(config: ConfigDict, workdir: str | Path) -> dict:
    """Trains, or continues, the run in `workdir`, and returns its summary.

    Raises:
      FFLError: with the exit code of what went wrong; `Preempted` when a signal stopped the run and its state
        is saved.
    """
    config_lib.check(config)
    parallel = parallel_lib.Parallel(**config.parallel)
    parallel.check_batch_size(config.batch_size)
    workdir = Path(workdir).absolute()
    with checkpoint.lock(workdir):
        run = _Run(config, workdir, parallel)
        return run.train()


class _Run:
    """One training in one folder."""

    def __init__(self, config, workdir, parallel):
        self.workdir, self.parallel = workdir, parallel
        self.directory = workdir / "checkpoints"
        self.experiment = Experiment(config, data.load(config.data))
        self.config = self.experiment.config
        self.total_steps = self.config.epochs * self.experiment.steps_per_epoch
        self.best = None
        self.evaluated_step = -1
        self.scores = {}

    # -- from and to the disk ------------------------------------------------------------------------------

    def restore(self):
        """(state, bytes of the log) to continue from: of the newest whole checkpoint, or of a new run."""
        fresh = not self.directory.exists() or not any(self.directory.iterdir())
        if fresh or (not checkpoint.steps(self.directory) and not (self.workdir / "metrics.jsonl").exists()):
            return self.experiment.initial_state(), 0
        step = checkpoint.find(self.directory, quarantine=True)
        run = checkpoint.load_run(self.directory, step)
        check_same(run, self.experiment, self.directory / str(step))
        self.best, self.evaluated_step, self.scores = run["best"], run["evaluated_step"], run["scores"]
        state = checkpoint.restore(self.directory, step, self.experiment.abstract_state())
        logging.info("Continuing from step %d of %d.", step, self.total_steps)
        return state, run["metrics_bytes"]

    def run_record(self, metrics_bytes: int) -> dict:
        """What is saved beside the state."""
        return {
            "format": RUN_FORMAT,
            "config": config_lib.to_json(self.config),
            "dataset": {
                "fingerprint": self.experiment.dataset.fingerprint,
                "train_examples": len(self.experiment.dataset.train.labels),
                "class_names": list(self.experiment.dataset.class_names),
                "image_shape": list(self.experiment.image_shape),
            },
            "best": self.best,
            "evaluated_step": self.evaluated_step,
            "scores": self.scores,
            "metrics_bytes": metrics_bytes,
            "versions": versions(),
            "devices": self.parallel.num_devices,
        }

    def save(self, checkpoints, step: int, state, log):
        log.sync()
        host_state = self.parallel.fetch(state)
        broken = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path((host_state.params, host_state.model_state))
            if not np.isfinite(np.asarray(leaf)).all()
        ]
        if broken:
            raise self.diverged(step, broken)
        checkpoints.save(step, host_state, self.run_record(log.size))

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
            return outputs.read_json(self.workdir / "summary.json")
        outputs.write_json(self.workdir / "config.json", config_lib.to_json(self.config))
        log = outputs.MetricsLog(self.workdir, metrics_bytes, step)
        progress = Progress(self.total_steps, step, self.config.batch_size, self.experiment.steps_per_epoch)
        try:
            with (
                preemption.deferred(),
                checkpoint.Checkpoints(self.directory, self.config.checkpoint.keep) as checkpoints,
            ):
                step = self.loop(self.parallel.replicate(state), step, log, progress, checkpoints)
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

    def loop(self, state, step, log, progress, checkpoints) -> int:
        """Trains from `step` until the end, or until a signal; returns the last step, which is saved."""
        config, dataset, per_epoch = self.config, self.experiment.dataset, self.experiment.steps_per_epoch
        examples = self.parallel.replicate((dataset.train.images, dataset.train.labels))
        train_step, epoch_order = self.programs()
        evaluators = {
            name: Evaluator(self.experiment.method, split, config, self.parallel)
            for name, split in (("validation", dataset.validation), ("test", dataset.test))
            if split is not None
        }
        order = None
        saved = step if checkpoint.steps(self.directory) else -1
        while True:
            epoch, position = divmod(step, per_epoch)
            last = step == self.total_steps
            evaluation_due = position == 0 and (epoch % config.evaluation.every_epochs == 0 or last)
            if evaluation_due and step > 0 and self.evaluated_step < step and not preemption.requested():
                self.evaluate(evaluators, state, step, log, checkpoints)
                progress.restart_clock()
            save_due = position == 0 and (epoch % config.checkpoint.every_epochs == 0 or last)
            save_due |= config.checkpoint.every_steps > 0 and step % config.checkpoint.every_steps == 0
            stopping = preemption.requested()
            if step > 0 and saved != step and (save_due or stopping):
                self.save(checkpoints, step, state, log)
                saved = step
            if last or stopping:
                return step
            if order is None or position == 0:
                order = epoch_order(self.parallel.replicate(np.int32(epoch)))
            state = train_step(state, order, examples)
            step += 1
            progress.advance()
            if step % config.log_every_steps == 0 or step % per_epoch == 0:
                self.record(state, step, log, progress)

    def programs(self):
        """The compiled training step and the compiled order of an epoch."""
        experiment, config = self.experiment, self.config

        def step(state, order, examples):
            epoch, position = jnp.divmod(state.step, experiment.steps_per_epoch)
            # A line of the log was written, or the run begins.
            fresh = (position == 0) | (state.step % config.log_every_steps == 0)
            state = state.replace(record=jax.tree.map(lambda x: jnp.where(fresh, 0, x), state.record))
            indices = parallel_lib.share(order[position])
            batch = resident.train_batch(*examples, indices, config.seed, epoch, config.data)
            return steps.train_step(
                state,
                batch,
                method=experiment.method,
                optimizers=experiment.optimizers,
                steps_per_epoch=experiment.steps_per_epoch,
            )

        def order(epoch):
            return resident.epoch_order(
                config.seed, epoch, len(experiment.dataset.train.labels), config.batch_size
            )

        return self.parallel.map(step, donate_argnums=(0,)), self.parallel.map(order)

    def record(self, state, step: int, log, progress):
        """Writes the line for the steps since the last one; raises if one of them was not finite."""
        record = jax.device_get(self.parallel.fetch(state.record))
        count, finite = int(record["steps"]), int(record["finite_steps"])
        terms = {name: float(total) / count for name, total in record["terms"].items()}
        if finite < count:
            broken = [name for name, value in terms.items() if not math.isfinite(value)]
            raise self.diverged(step - count + finite + 1, broken)
        scores = {name: metrics.classification_scores(sums) for name, sums in record["predictions"].items()}
        log.write(step, step / self.experiment.steps_per_epoch, "train", terms | _by_name(scores))
        headline = scores[self.experiment.method.headline]
        progress.show(
            loss=sum(terms[name] for name in self.experiment.method.trains), accuracy=headline["top1"]
        )
        if progress.images_per_second:
            log.write_speed(step, progress.images_per_second)

    def evaluate(self, evaluators, state, step: int, log, checkpoints):
        """Scores every split, draws the curves, keeps the state if it is the best on the validation split."""
        epoch = step / self.experiment.steps_per_epoch
        self.scores = {split: evaluator(state) for split, evaluator in evaluators.items()}
        for split, scores in self.scores.items():
            log.write(step, epoch, split, _by_name(scores))
            shown = "  ".join(f"{name} {100 * one['top1']:.2f}%" for name, one in scores.items())
            logging.info("epoch %g, %s: %s", epoch, split, shown)
        self.evaluated_step = step
        if "validation" in self.scores:
            top1 = self.scores["validation"][self.experiment.method.headline]["top1"]
            if math.isfinite(top1) and (self.best is None or top1 > self.best["validation_top1"]):
                predictors = self.scores["test"]
                self.best = {"step": step, "epoch": epoch, "validation_top1": top1, "predictors": predictors}
                with checkpoint.Checkpoints(self.directory / "best", keep=1) as best:
                    self.save(best, step, state, log)
        title = f"{self.config.method.name} · {self.config.subnetworks.network} · {self.config.data.name}"
        outputs.draw_curves(self.workdir, title)


def _by_name(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{name}/{score}": value for name, one in scores.items() for score, value in one.items()}


def check_same(run: dict, experiment: Experiment, where: Path):
    """Raises CheckpointError, listing the differences, unless a checkpoint belongs to this experiment."""
    if run["format"] != RUN_FORMAT:
        raise CheckpointError(
            f"{where} has format {run['format']} (written with {run['versions']}); "
            f"this version reads {RUN_FORMAT}."
        )
    stored, current = (
        config_lib.fixed_part(values) for values in (run["config"], config_lib.to_json(experiment.config))
    )
    different = checkpoint.differences({"config": stored}, {"config": current})
    fingerprint = experiment.dataset.fingerprint
    if run["dataset"]["fingerprint"] != fingerprint:
        old, new = run["dataset"]["train_examples"], len(experiment.dataset.train.labels)
        different.append(
            f"dataset: fingerprint {run['dataset']['fingerprint'][:12]} ({old} training examples) in the "
            f"checkpoint, {fingerprint[:12]} ({new}) now"
        )
    if different:
        raise CheckpointError(
            f"{where} belongs to another run: {'; '.join(different)}. "
            "Undo the change, or choose another --workdir."
        )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import version

    packages = ("ffl-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: version(name) for name in packages}
