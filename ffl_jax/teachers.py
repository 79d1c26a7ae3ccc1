"""Teachers that are trained before their student: found, or trained first, and put into its first state."""

import logging
import shlex
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from ffl_jax import checkpoint, methods
from ffl_jax import config as config_lib
from ffl_jax.cli import ROOT
from ffl_jax.errors import CheckpointError
from ffl_jax.experiment import Experiment
from ffl_jax.steps import TrainState


def prepare(config: ConfigDict, workdir: Path, train: Callable) -> list[str]:
    """The runs that the teachers of a new run come from, "DIR" or "DIR:PREDICTION" each; empty without any.

    Where the configuration names none, they are trained first, in `workdir/teachers`, each from a seed of its
    own.

    Args:
      config: of the student.
      workdir: of the student.
      train: `train.train`.
    """
    if not methods.takes_teachers(config.method.name):
        return []
    if config.teachers.runs:
        return list(config.teachers.runs)
    runs = []
    for index in range(config.teachers.num):
        runs.append(str(workdir / "teachers" / str(index)))
        logging.info("Teacher %d of %d, in %s", index + 1, config.teachers.num, runs[-1])
        train(teacher_config(config, index), runs[-1])
    return runs


def teacher_config(config: ConfigDict, index: int) -> ConfigDict:
    """What teacher `index` of a student is trained with.

    It is the student's own configuration, but for the network, the seed and the epochs. The teacher learns
    from the labels alone, or, with `generations` > 1, is itself the student of teachers with one generation
    less.
    """
    teacher = ConfigDict(config.to_dict())
    teacher.seed = config.seed + 1000 * (index + 1)
    teacher.subnetworks.network = config_lib.teacher_names(config)[index]
    teacher.epochs = config.teachers.epochs
    teacher.optimizer = config_lib.stretch(config.optimizer.to_dict(), teacher.epochs, config.epochs)
    if config.teachers.generations > 1:
        teacher.teachers.generations = config.teachers.generations - 1
    else:
        teacher.method = {"name": "independent"} | methods.hyper_parameters("independent")
        teacher.optimizer_rules = ()
        del teacher["teachers"]
    return teacher


def install(state: TrainState, runs: list[str], experiment: Experiment) -> TrainState:
    """The first state of a student, with the trained weights of its teachers in place of random ones.

    Raises:
      CheckpointError: a run is missing, or is not one of such a network on such data.
    """
    if not runs:
        return state
    if len(runs) != experiment.config.teachers.num:
        raise CheckpointError(
            f"config.teachers.runs names {len(runs)} runs, but config.teachers.num is "
            f"{experiment.config.teachers.num}: name one for each teacher."
        )
    loaded = [_load(run, index, experiment) for index, run in enumerate(runs)]
    joined = {kind: {f"networks_{k}": one[kind] for k, one in enumerate(loaded)} for kind in loaded[0]}
    params = {**state.params, "teachers": joined.pop("params")}
    trees = {kind: {**state.model_state[kind], "teachers": tree} for kind, tree in joined.items()}
    return state.replace(params=params, model_state={**state.model_state, **trees})


def _load(run: str, index: int, experiment: Experiment) -> dict:
    """The variables of one network of a run."""
    config, dataset = experiment.config, experiment.dataset
    folder, _, prediction = run.partition(":")
    directory = Path(folder) / "checkpoints"
    try:
        step = checkpoint.find(directory)
    except CheckpointError as error:
        raise CheckpointError(
            f"config.teachers.runs: {error}. Train this teacher with `{_command(config, index, folder)}`, or "
            "leave config.teachers.runs empty to have all of them trained first."
        ) from error
    stored = checkpoint.load_run(directory, step)

    def require(what, found, wanted, remedy):
        if found != wanted:
            raise CheckpointError(f"teacher {folder} has {what} {found}, but this run has {wanted}: {remedy}")

    require(
        "classes", len(stored["dataset"]["class_names"]), len(dataset.class_names), "take another teacher."
    )
    teacher = Experiment(config_lib.from_json(stored["config"]), dataset)
    for key in ("mean", "std"):
        found, wanted = (tuple(round(x, 4) for x in one.data[key]) for one in (teacher.config, config))
        require(
            f"config.data.{key}", found, wanted, "images must be normalised alike, set it to the teacher's."
        )
    prediction = prediction or teacher.method.headline
    if prediction not in teacher.method.network_names():
        raise CheckpointError(
            f"teacher {folder}: {prediction!r} is not one plain network; write DIR:NAME with one of "
            f"{', '.join(teacher.method.network_names())}."
        )
    names = dict(
        zip(teacher.method.subnetwork_names(), config_lib.network_names(teacher.config), strict=True)
    )
    require(
        "network",
        names.get(prediction),
        config_lib.teacher_names(config)[index],
        "set config.teachers.network.",
    )
    state = checkpoint.restore(directory, step, teacher.abstract_state())
    _, variables = teacher.method.extract({"params": state.params, **state.model_state}, prediction)
    return variables


def _command(config, index, workdir) -> str:
    """The command that trains a missing teacher."""
    teacher = teacher_config(config, index)
    # Of configs/cifar10.py and configs/cifar100.py, the one that the dataset's name begins with the most of.
    files = sorted((ROOT / "configs").glob("*.py"), key=lambda path: len(path.stem))
    file = next((path for path in reversed(files) if config.data.name.startswith(path.stem)), files[0])
    arguments = [
        f"--config=configs/{file.name}:method=independent,network={teacher.subnetworks.network},"
        f"epochs={teacher.epochs}",
        "--config.subnetworks.num=1",
        f"--config.seed={teacher.seed}",
        f"--workdir={workdir}",
    ]
    if config.data.data_dir:
        arguments.insert(1, f"--config.data.data_dir={config.data.data_dir}")
    return shlex.join(["python", "-m", "ffl_jax.main", *arguments])
