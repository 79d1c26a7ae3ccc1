"""Teachers that are trained before their student: found, or trained first, and put into its first state.

On the command line, `--config.teachers.runs=DIR` names the finished run of a teacher; it is given once for
each of them. What a student once has in a checkpoint it needs no teacher's run for.
"""

import logging
import operator
import shlex
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from ffl_jax import methods
from ffl_jax.data import Dataset, Split, resident
from ffl_jax.errors import CheckpointError, ConfigError
from ffl_jax.training import config as config_lib
from ffl_jax.training import config_file, start_weights
from ffl_jax.training.defaults import stretch
from ffl_jax.training.experiment import RUN_FORMAT, Experiment, resolve, stands_still
from ffl_jax.training.steps import TrainState
from ffl_jax.workdir import checkpoint
from ffl_jax.workdir.paths import expanded


def to_train(config: ConfigDict, workdir: Path) -> Iterator[tuple[ConfigDict, str]]:
    """(configuration, folder) of the teachers of a new run that the configuration names no runs for.

    Each is from a seed of its own, in `workdir/teachers`. Trained in turn, those that are finished there are
    taken as they are, and one that was stopped continues.

    Args: config, workdir: of the student.

    Raises:
      ConfigError: the runs that are named are not one for each teacher.
    """
    if not methods.takes_teachers(config.method.name) or named_runs(config):
        return
    names = config_lib.teacher_names(config)
    for index, folder in enumerate(_own_runs(config, workdir)):
        teacher = teacher_config(config, index)
        what = f"{teacher.method.name}, {names[index]}, {teacher.epochs} epochs, in {folder}"
        logging.info("Teacher %d of %d first: %s", index + 1, len(names), what)
        yield teacher, folder
    logging.info("Now their student, in %s", workdir)


def _own_runs(config, workdir):
    return [str(workdir / "teachers" / str(index)) for index in range(config.teachers.num)]


def named_runs(config: ConfigDict) -> list[str]:
    """The runs that `config.teachers.runs` names; raises ConfigError if they are not one for each teacher."""
    runs, num = list(config.teachers.runs), config.teachers.num
    for run in runs:
        if not isinstance(run, str):
            raise ConfigError(f"config.teachers.runs: {run} is read as a number, write it as ./{run}.")
    if runs and len(runs) != num:
        raise ConfigError(
            f"config.teachers.runs names {len(runs)} run(s), but config.teachers.num is {num}: set it to "
            f"{len(runs)}, or give --config.teachers.runs=DIR once for each teacher."
        )
    return runs


def teacher_config(config: ConfigDict, index: int) -> ConfigDict:
    """What teacher `index` of a student is trained with.

    It is the student's own configuration, but for the network, the seed and, if `teachers.epochs` is not 0,
    the epochs. The teacher learns from the labels alone, or, with `generations` > 1, is itself the student of
    teachers with one generation less.
    """
    teacher = ConfigDict(config.to_dict())
    # Student and teachers of all generations are numbered as in a heap, so that no two seeds are equal.
    number = config.seed // 1000 * config.teachers.num + index + 1
    teacher.seed = config.seed % 1000 + 1000 * number
    teacher.subnetworks.network = config_lib.teacher_names(config)[index]
    teacher.subnetworks.num = 1
    teacher.subnetworks.update(shared_stages=0, limbs=())
    # The student's own, which need not suit another network.
    teacher.subnetworks.update(start=(), start_digests=(), freeze_epochs=0.0, statistics="adapted")
    teacher.subnetworks.update(dropout=0.0, drop_path=0.0)
    teacher.optimizer.layer_decay = 1.0
    teacher.ema_decay = 0.0  # a student learns from what teachers ship
    # Each is one network of one run, which cannot be spread.
    teacher.parallel.update(subnetworks=1, seeds=1)
    if config.teachers.epochs not in (0, config.epochs):
        teacher.epochs = config.teachers.epochs
        teacher.optimizer = stretch(config.optimizer.to_dict(), teacher.epochs, config.epochs)
    if config.teachers.generations > 1:
        teacher.teachers.generations = config.teachers.generations - 1
        teacher.teachers.runs = ()
    else:
        teacher.method = {"name": "independent"} | methods.hyper_parameters("independent")
        teacher.optimizer_rules = ()
        del teacher["teachers"]
    return teacher


def install(state: TrainState, experiment: Experiment, workdir: Path) -> TrainState:
    """The first state of a student, with the trained weights of its teachers in place of random ones.

    Args:
      state: with random ones.
      experiment, workdir: of the student, after `to_train`.

    Raises:
      CheckpointError: see `load`.
    """
    config = experiment.config
    if not methods.takes_teachers(config.method.name):
        return state
    teachers = load(named_runs(config) or _own_runs(config, workdir), experiment)

    def join(kind, tree):
        if "teachers" not in tree:
            return tree
        loaded = {f"networks_{k}": teacher[kind] for k, teacher in enumerate(teachers) if kind in teacher}
        return {**tree, "teachers": loaded}

    model_state = {kind: join(kind, tree) for kind, tree in state.model_state.items()}
    return state.replace(params=join("params", state.params), model_state=model_state)


def load(runs: list[str], experiment: Experiment) -> list[dict]:
    """The variables of the teachers of an experiment, from their runs.

    Raises:
      CheckpointError: a run is missing or unfinished, and the message has the command that trains it; or it
        is not one of such a network on such data.
    """
    places = [_place(run) for run in runs]
    problems = [_problem(*place, index, experiment) for index, place in enumerate(places)]
    if any(problems):
        raise CheckpointError(
            f"config.teachers.runs: {'; '.join(filter(None, problems))}. Without config.teachers.runs, all "
            "teachers are trained first."
        )
    return [_load(*place, index, experiment) for index, place in enumerate(places)]


def _place(run: str) -> tuple[Path, str]:
    """(folder, prediction) of a run; the prediction is empty where the headline is meant."""
    folder, colon, prediction = run.rpartition(":")
    if not colon or expanded(run).is_dir():  # a folder's own name may have a colon
        folder, prediction = run, ""
    return expanded(folder), prediction


def _problem(folder, prediction, index, experiment) -> str | None:
    """Why a run cannot give a teacher yet, and the command that changes it."""
    directory = folder / "checkpoints"
    if not checkpoint.exists(directory):
        config = teacher_config(experiment.config, index)
        alone = f", and leave out :{prediction}" if prediction else ""
        return f"{folder} holds no run, train it with `{_command(config, experiment.dataset, folder)}`{alone}"
    step = checkpoint.find(directory)
    stored = checkpoint.load_run(directory, step)
    config = config_lib.from_json(stored["config"])
    per_epoch = resident.steps_per_epoch(stored["dataset"]["train_examples"], config.batch_size)
    total = config.epochs * per_epoch
    ended = step >= total or stands_still(
        config, per_epoch, stored.get("best"), stored.get("evaluated_step", -1)
    )
    if ended or not step:  # imported weights are at step 0, where no training saves
        return None
    command = _command(config, experiment.dataset, folder)
    return f"{folder} is at step {step} of {total}, continue it with `{command}`"


def _load(folder, prediction, index, experiment) -> dict:
    """The variables of one network of a finished run."""
    config, dataset = experiment.config, experiment.dataset
    directory = folder / "checkpoints"
    step = checkpoint.find(directory)
    stored = checkpoint.load_run(directory, step)

    def require(what, found, wanted, remedy, same=operator.eq):
        if not same(found, wanted):
            raise CheckpointError(f"teacher {folder} has {what} {found}, but this run has {wanted}: {remedy}")

    require("format", stored["format"], RUN_FORMAT, "train it again with this version.")
    names = stored["dataset"]["class_names"]
    other = "take a teacher of the same classes, in the same order."
    require("classes", len(names), len(dataset.class_names), other)
    for label, pair in enumerate(zip(names, dataset.class_names, strict=True)):
        require(f"class {label}", *pair, other)
    size = list(experiment.image_shape)
    require("images of", stored["dataset"]["image_shape"], size, "take a teacher of images of that size.")

    settings = config_lib.from_json(stored["config"])
    flags = shlex.join(f"--config.data.{key}={settings.data[key]}" for key in ("mean", "std"))
    for key in ("mean", "std"):
        found, wanted = settings.data[key], config.data[key]
        remedy = f"images must be normalised alike, add {flags}."
        require(f"config.data.{key}", found, wanted, remedy, start_weights.close)
    if stored["dataset"]["fingerprint"] != dataset.fingerprint:
        logging.warning("Teacher %s was trained on other images than those of this run.", folder)

    # Its variables do not depend on these, and what the student trains on need not suit them.
    settings.batch_size, settings.data.pad = 1, 0
    teacher = Experiment(settings, dataset)
    prediction = prediction or teacher.method.headline
    known = teacher.method.network_names()
    if prediction not in known:
        raise CheckpointError(
            f"teacher {folder}: {prediction!r} is not one plain network; write DIR:NAME with NAME one of "
            f"{', '.join(known)}."
        )
    state = checkpoint.restore(directory, step, teacher.abstract_state())
    network, variables = teacher.method.extract(state.variables, prediction)
    if network != experiment.method.teachers.member(index):
        wanted = config_lib.teacher_names(config)[index]
        raise CheckpointError(
            f"teacher {folder}:{prediction} is not a {wanted}, but of {settings.subnetworks.network}: set "
            "config.teachers.network, or take another teacher."
        )
    logging.info("Teacher %d of %d: %s of %s", index + 1, config.teachers.num, prediction, folder)
    return variables


def _command(config: ConfigDict, dataset: Dataset, workdir: Path) -> str:
    """The command that trains a configuration, or continues it: a file of ours, and all that differs."""
    fitting = [name for name in config_file.names() if config.data.name.startswith(name)]
    file = max(fitting, key=len, default="cifar10")
    preset = f"method={config.method.name},network={config.subnetworks.network},epochs={config.epochs}"
    start = config_file.read(f"configs/{file}.py:{preset}")
    if isinstance(dataset.train, Split):  # else there is nothing that mean and std could come from
        start = resolve(start, dataset)
    start, wanted = (config_lib.flatten(one.to_dict()) for one in (start, config))
    changes = [f"--config.{key}={value}" for key, value in wanted.items() if start.get(key) != value]
    arguments = [f"--config=configs/{file}.py:{preset}", *changes, f"--workdir={workdir}"]
    return shlex.join(["python", "-m", "ffl_jax.main", *arguments])
