"""Teachers' runs: trained first, or found; and what is refused, with a command that can be pasted."""

import functools
import itertools
import logging
import pathlib
import re
import shlex
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from configs import digits, folder
from ffl_jax import cli, data, doctor, main
from ffl_jax.data import Split
from ffl_jax.devices import preemption
from ffl_jax.errors import CheckpointError, ConfigError, Preempted
from ffl_jax.training import config as config_lib
from ffl_jax.training import loop, teachers
from ffl_jax.training.experiment import Experiment, run_record
from ffl_jax.workdir import checkpoint, files


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Reading the digits again for every run would take longer than training."""
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells all it does
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_digits", functools.cache(datasets.load_digits))
        yield
    logging.getLogger("absl").setLevel(logging.NOTSET)


def configuration(method="kd", teachers="tiny", module=digits, **changes):
    """A student of one epoch; `changes` have a double underscore for every dot."""
    config = module.get_config(f"method={method},network=tiny,epochs=1")
    config.optimizer.schedule = "constant"
    if "teachers" in config:
        config.teachers.network, config.teachers.num = teachers, len(teachers.split("+"))
    if method == "independent":
        config.subnetworks.num = 1
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def make_experiment(config):
    return Experiment(config, data.load(config.data))


def draw(abstract, seed):
    """A state with random variables: nothing is compiled for it."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.replace(rng=jnp.uint32(0)))
    return zeros.replace(
        params=jax.tree.map(leaf, abstract.params),
        model_state=jax.tree.map(leaf, abstract.model_state),
        rng=jax.random.key(0),
    )


def write_run(config, workdir, step=None, seed=0, state=None):
    """Writes the checkpoint of a run, of its last step where none is given, without training it."""
    experiment = Experiment(config, data.load(config.data))
    state = state or draw(experiment.abstract_state(), seed)
    step = experiment.total_steps if step is None else step
    with checkpoint.Checkpoints(pathlib.Path(workdir) / "checkpoints") as checkpoints:
        record = run_record(experiment, evaluated_step=step)
        checkpoints.save(step, state.replace(step=jnp.int32(step)), record)
    return state


def install(config, experiment=None):
    """The state of a new student whose teachers' runs are named."""
    experiment = experiment or make_experiment(config)
    workdir = pathlib.Path("unused")
    assert list(teachers.to_train(experiment.config, workdir)) == []
    return teachers.install(draw(experiment.abstract_state(), 99), experiment, workdir)


def assert_equal(tree, expected):
    leaves, expected = jax.tree.leaves(tree), jax.tree.leaves(expected)
    assert len(leaves) == len(expected) > 0
    for leaf, other in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(leaf, other)


# -- trained first -------------------------------------------------------------------------------------------


def final_state(workdir, config):
    directory = pathlib.Path(workdir) / "checkpoints"
    abstract = make_experiment(config).abstract_state()
    return checkpoint.restore(directory, checkpoint.find(directory), abstract)


def test_one_command_trains_all_and_continues(traced_once, tmp_path, monkeypatch, caplog):
    """Stopped in the second of two teachers, continued; then the student needs their folders no more."""
    caplog.set_level(logging.INFO)
    config = configuration(teachers="tiny+tiny_wide", log_every_steps=9)
    first, second = tmp_path / "teachers/0", tmp_path / "teachers/1"
    written = write_run(teachers.teacher_config(config, 0), first)  # as if trained before
    with monkeypatch.context() as patch:
        log = second / "metrics.jsonl"
        patch.setattr(preemption, "requested", lambda: log.exists() and log.stat().st_size > 0)
        with pytest.raises(Preempted, match=r"step \d+ is saved; run the same command again") as stopped:
            loop.train(config, tmp_path)
    (stopped_at,) = re.findall(r"step (\d+)", str(stopped.value))
    assert 9 < int(stopped_at) < 23  # that line was written while the devices went on
    assert not checkpoint.exists(tmp_path / "checkpoints")
    assert f"Teacher 1 of 2 first: independent, tiny, 1 epochs, in {first}\n" in caplog.text
    assert f"{first} is complete" in caplog.text
    assert f"Teacher 2 of 2 first: independent, tiny_wide, 1 epochs, in {second}\n" in caplog.text
    caplog.clear()

    summary = loop.train(config, tmp_path)
    assert f"Continuing from step {stopped_at} of 23" in caplog.text
    assert f"Now their student, in {tmp_path}\n" in caplog.text
    assert f"Teacher 1 of 2: sub_0 of {first}\n" in caplog.text
    assert f"Teacher 2 of 2: sub_0 of {second}\n" in caplog.text
    assert (summary["status"], summary["step"], summary["deploy"]) == ("completed", 23, "student")
    assert list(summary["predictors"]) == ["student", "teacher_0", "teacher_1", "teacher_ensemble"]
    scores = files.read_json(second / "summary.json")["predictors"]["sub_0"]
    assert summary["predictors"]["teacher_1"] == pytest.approx(scores)  # parameters and FLOPs, too
    assert files.read_json(second / "config.json")["seed"] == 2000

    # Bitwise what they were, statistics included, after an epoch of the student; each in its place.
    trained = final_state(second, configuration("independent", subnetworks__network="tiny_wide"))
    assert int(trained.step) == 23
    shutil.rmtree(tmp_path / "teachers")
    config.teachers.runs = ("gone", "gone")
    assert loop.train(config, tmp_path) == summary
    assert not (tmp_path / "teachers").exists()
    state = final_state(tmp_path, config)
    for index, teacher in enumerate((written, trained)):
        for found, expected in (
            (state.params, teacher.params),
            (state.model_state["batch_stats"], teacher.model_state["batch_stats"]),
        ):
            branch = jax.tree.map(lambda x: x[0], expected["subnetworks"]["branches"])
            assert_equal(found["teachers"][f"networks_{index}"], branch)


def test_generations_are_nested(tmp_path):
    """A student of a student: three networks, each with the one before in its own folder and checkpoint."""
    states = {}

    def train_nothing(config, workdir):
        """A training that ends where it begins, but for its teachers."""
        workdir = pathlib.Path(workdir)
        experiment = make_experiment(config)
        for teacher, path in teachers.to_train(experiment.config, workdir):
            train_nothing(teacher, path)
        state = draw(experiment.abstract_state(), config.seed)
        states[workdir] = write_run(config, workdir, state=teachers.install(state, experiment, workdir))

    train_nothing(configuration("feed", teachers__generations=2, seed=5), tmp_path)
    folders = [tmp_path, tmp_path / "teachers/0", tmp_path / "teachers/0/teachers/0"]
    assert list(states) == folders[::-1]
    runs = [checkpoint.load_run(path / "checkpoints", 23)["config"] for path in folders]
    assert [run["method"]["name"] for run in runs] == ["feed", "feed", "independent"]
    assert [run["seed"] for run in runs] == [5, 1005, 2005]
    for student, teacher in itertools.pairwise(folders):
        trained = states[teacher].params["subnetworks"]["branches"]
        assert_equal(states[student].params["teachers"]["networks_0"], jax.tree.map(lambda x: x[0], trained))


def test_all_seeds_differ():
    """Of 3 teachers with 3 teachers each: 13 networks."""
    config = configuration("feed", "tiny+tiny+tiny", teachers__generations=2, seed=7)
    seeds = [config.seed]

    def record(student, workdir):
        for teacher, path in teachers.to_train(student, pathlib.Path(workdir)):
            seeds.append(teacher.seed)
            record(teacher, path)

    record(config, "unused")
    assert len(set(seeds)) == len(seeds) == 13
    assert all(seed % 1000 == 7 for seed in seeds)


def test_what_a_teacher_is_trained_with():
    """The student's settings, but for those that are about the student alone."""
    config = digits.get_config("method=feed,epochs=300")
    config.optimizer.update({"schedule": "step", "decay_epochs": (150, 225), "warmup_epochs": 0.5})
    config.optimizer_rules = (("loss/translators_.*", {"weight_decay": 0.0}),)
    config.subnetworks.update({"num": 2, "shared_stages": 2})
    config.teachers.update({"network": "resnet14+resnet8+resnet8", "runs": ("a", "b", "c")})
    config.parallel.update({"mode": "shard_map", "subnetworks": 2, "seeds": 2})
    for epochs in (0, 300):
        config.teachers.epochs = epochs
        plain = teachers.teacher_config(config, 0)
        config_lib.check(plain)
        assert (plain.parallel.mode, plain.parallel.subnetworks, plain.parallel.seeds) == ("shard_map", 1, 1)
        assert plain.epochs == 300
        assert plain.optimizer == config.optimizer
        assert plain.optimizer_rules == ()
        assert (plain.method.name, plain.subnetworks.network, plain.subnetworks.num) == (
            "independent",
            "resnet14",
            1,
        )
    config.teachers.epochs = 200
    shorter = teachers.teacher_config(config, 0)
    assert (shorter.epochs, tuple(shorter.optimizer.decay_epochs)) == (200, (100, 150))
    config.teachers.generations = 2
    student = teachers.teacher_config(config, 1)
    config_lib.check(student)
    assert student.method == config.method
    assert student.optimizer_rules == config.optimizer_rules
    # A generation less, from runs of its own.
    expected = config.teachers.to_dict() | {"generations": 1, "runs": ()}
    assert student.teachers.to_dict() == expected


# -- found ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of several methods: {name: (folder, state)}."""
    root = tmp_path_factory.mktemp("runs")
    configurations = {
        "plain": configuration("independent"),
        "wide": configuration("independent", subnetworks__network="tiny_wide"),
        "ffl": configuration("ffl", subnetworks__shared_stages=1),
        "kd": configuration("kd"),
    }
    return {
        name: (root / name, write_run(config, root / name, seed=seed))
        for seed, (name, config) in enumerate(configurations.items())
    }


def test_runs_of_any_method(runs, monkeypatch):
    """By absolute and relative paths and below ~; a sub-network of FFL on its trunk, and a student of KD."""
    root = runs["plain"][0].parent
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    names = "+".join(["tiny", "tiny_wide", "tiny", "tiny"])
    paths = (str(runs["plain"][0]), "wide", "~/ffl:sub_1", "kd")
    state = install(configuration(teachers=names, teachers__runs=paths))
    for kind, loaded in (("params", state.params), ("batch_stats", state.model_state["batch_stats"])):

        def trained(name, kind=kind):
            state = runs[name][1]
            return (state.params if kind == "params" else state.model_state[kind])["subnetworks"]

        def branch(name, k=0):
            return jax.tree.map(lambda x: x[k], trained(name)["branches"])

        assert loaded["teachers"].keys() == {f"networks_{k}" for k in range(4)}
        assert_equal(loaded["teachers"]["networks_0"], branch("plain"))
        assert_equal(loaded["teachers"]["networks_1"], branch("wide"))
        assert_equal(loaded["teachers"]["networks_2"], {**trained("ffl")["trunk"], **branch("ffl", 1)})
        assert_equal(loaded["teachers"]["networks_3"], branch("kd"))


def test_student_itself_starts_from_its_own_seed(runs):
    config = configuration(teachers__runs=(str(runs["plain"][0]),))
    experiment = make_experiment(config)
    before = draw(experiment.abstract_state(), 99)
    state = install(config, experiment)
    assert_equal(state.params["subnetworks"], before.params["subnetworks"])
    assert_equal(state.opt_state, before.opt_state)
    assert jax.tree.structure(state) == jax.tree.structure(before)


def test_folder_with_a_colon_in_its_name(runs, tmp_path):
    folder = tmp_path / "lr:0.1"
    shutil.copytree(runs["plain"][0], folder)
    install(configuration(teachers__runs=(str(folder),)))
    install(configuration(teachers__runs=(f"{folder}:sub_0",)))


def test_data_that_does_not_suit_the_teachers_training(runs):
    """Fewer images than its batch, smaller than its padding: neither matters to a trained network."""
    config = configuration(teachers__runs=(str(runs["plain"][0]),), batch_size=16)
    whole = data.load(config.data)
    few = Split(whole.train.images[:20], whole.train.labels[:20])
    dataset = type(whole)(whole.name, few, whole.test, whole.class_names, whole.fingerprint)
    stored = checkpoint.load_run(runs["plain"][0] / "checkpoints", 23)["config"]
    config.data.mean, config.data.std = tuple(stored["data"]["mean"]), tuple(stored["data"]["std"])
    install(config, Experiment(config, dataset))


def test_other_images_are_noticed(runs, caplog):
    config = configuration(teachers__runs=(str(runs["plain"][0]),), data__validation_examples=100)
    install(config)
    assert "was trained on other images" in caplog.text
    caplog.clear()
    config.data.validation_examples = 0
    install(config)
    assert "other images" not in caplog.text


# -- the command line ----------------------------------------------------------------------------------------


def parse(monkeypatch, *arguments):
    """The values of the flags of `main`, as from a shell."""
    argv = ["main", *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
    values = cli.new_flags()
    main.flags.DEFINE_string("workdir", None, "", flag_values=values)
    cli.parse(values, argv, "", config=True)
    return values


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["=runs/a"], ("runs/a",)),
        (["=~/a-b.c:sub_1"], ("~/a-b.c:sub_1",)),
        (["=a", "=b:sub_1"], ("a", "b:sub_1")),
        (["=('a', 'with a blank')"], ("a", "with a blank")),
        (["=()"], ()),
    ],
)
def test_runs_on_the_command_line(monkeypatch, arguments, expected):
    arguments = [f"--config.teachers.runs{argument}" for argument in arguments]
    config = parse(monkeypatch, "--config=configs/digits.py:method=kd", *arguments).config
    assert config.teachers.runs == expected


def test_runs_must_be_one_for_each(runs):
    with pytest.raises(ConfigError, match=r"names 1 run\(s\), but config\.teachers\.num is 2: set it to 1"):
        install(configuration(teachers="tiny+tiny", teachers__runs=("a",)))
    with pytest.raises(ConfigError, match=r"2024 is read as a number, write it as \./2024"):
        install(configuration(teachers__runs=(2024,)))


def commands_in(error):
    return [shlex.split(text) for text in re.findall("`(.*?)`", str(error))]


def configuration_of(monkeypatch, command):
    assert command[:3] == ["python", "-m", "ffl_jax.main"]
    values = parse(monkeypatch, *command[3:])
    return values.config, values.workdir


def test_missing_runs_come_with_their_commands(monkeypatch, tmp_path):
    """Pasted, each says exactly what would be trained without it; and one of them is run."""
    monkeypatch.chdir(tmp_path)
    config = configuration(
        teachers="tiny+tiny_wide",
        teachers__runs=("mine/a b", "other:sub_1"),
        teachers__epochs=2,
        batch_size=128,
        data__flip=True,
        optimizer_rules=(("loss/.*", {"weight_decay": 0.0}),),
        seed=3,
    )
    experiment = make_experiment(config)
    with pytest.raises(CheckpointError) as error:
        install(config, experiment)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("config.teachers.runs: mine/a b holds no run, train it with `python -m")
    assert "` and leave out :sub_1" in message.replace(",", "")
    commands = commands_in(message)
    assert len(commands) == 2
    for index, command in enumerate(commands):
        given, workdir = configuration_of(monkeypatch, command)
        assert workdir == ("mine/a b", "other")[index]
        # The mean and std, which follow from the data, are computed again.
        expected = teachers.teacher_config(config, index).to_dict()
        assert given.to_dict() == expected
    main.command(commands[0][2:])
    with pytest.raises(CheckpointError) as error:
        install(config, experiment)
    assert len(commands_in(error.value)) == 1  # the first is there now


def test_doctor_looks_for_teachers(monkeypatch, tmp_path, capsys):
    def diagnose(*arguments):
        argv = ["doctor", "--config=configs/digits.py:method=kd,network=tiny", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections reads what is set
        doctor.command(argv)

    diagnose()
    assert "teachers:       1 x tiny, to be trained before the student" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="holds no run, train it with"):
        diagnose(f"--config.teachers.runs={tmp_path}")
    assert "teachers:       NOT USABLE: " in capsys.readouterr().out
    write_run(configuration("independent"), tmp_path, step=23)
    diagnose(f"--config.teachers.runs={tmp_path}")
    assert f"teachers:       found in {tmp_path}" in capsys.readouterr().out


def test_unfinished_runs_come_with_the_command_that_continues(monkeypatch, tmp_path):
    """Whatever was changed in them: FFL with another network, rule, weight decay and mean."""
    config = configuration("ffl", data__mean=(0.1, 0.2, 0.3), data__std=(0.4, 0.5, 0.6), log_every_steps=3)
    config.optimizer_rules = (("loss/fusion/.*", {"weight_decay": 0.5}),)
    config.subnetworks.num = 3
    write_run(config, tmp_path, step=10)
    with pytest.raises(CheckpointError, match="is at step 10 of 23, continue it with") as error:
        install(configuration(teachers__runs=(f"{tmp_path}:sub_2",)))
    ((command),) = commands_in(error.value)
    given, workdir = configuration_of(monkeypatch, command)
    assert workdir == str(tmp_path)
    assert given.to_dict() == config.to_dict()


def test_command_for_a_folder_of_images(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, name, number in np.ndindex(2, 2, 4):
        path = tmp_path / "my data" / ("train", "test")[split] / "ab"[name] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)
    config = configuration(
        module=folder,
        data__data_dir="my data",
        data__cache_dir="cache",
        data__image_size=8,
        batch_size=8,
        teachers__runs=("~/teacher",),
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        install(config)
    ((command),) = commands_in(error.value)
    assert "--config.data.data_dir=my data" in command
    given, workdir = configuration_of(monkeypatch, command)
    assert given.to_dict() == teachers.teacher_config(config, 0).to_dict()
    assert workdir == str(tmp_path / "teacher")  # a quoted ~ is no longer the home of a shell


def test_imported_weights_are_a_finished_run(tmp_path):
    """Weights of other programs are at step 0, where no training saves."""
    state = write_run(configuration("independent"), tmp_path, step=0)
    loaded = install(configuration(teachers__runs=(str(tmp_path),)))
    branch = jax.tree.map(lambda x: x[0], state.params["subnetworks"]["branches"])
    assert_equal(loaded.params["teachers"]["networks_0"], branch)


# -- refused -------------------------------------------------------------------------------------------------


def test_another_network(runs):
    with pytest.raises(CheckpointError, match=r"plain:sub_0 is not a tiny_wide, but of tiny: set config"):
        install(configuration(teachers="tiny_wide", teachers__runs=(str(runs["plain"][0]),)))


def test_a_prediction_that_is_no_network(runs):
    for name in ("fused", "ensemble", "sub_2"):
        with pytest.raises(
            CheckpointError, match=rf"'{name}' is not one plain network.* one of sub_0, sub_1"
        ):
            install(configuration(teachers__runs=(f"{runs['ffl'][0]}:{name}",)))


def test_another_normalisation(runs, monkeypatch):
    """Refused with the flags that set it; less than half a grey level is let pass."""
    path = str(runs["plain"][0])
    stored = checkpoint.load_run(runs["plain"][0] / "checkpoints", 23)["config"]["data"]
    mean, std = tuple(stored["mean"]), tuple(stored["std"])
    near = tuple(x + 0.4 / 255 for x in mean)
    install(configuration(teachers__runs=(path,), data__mean=near, data__std=std))
    for key, values in (("mean", (0.5, 0.5, 0.5)), ("std", (std[0], std[1], std[2] + 0.6 / 255))):
        other = {"mean": mean, "std": std} | {key: values}
        config = configuration(teachers__runs=(path,), data__mean=other["mean"], data__std=other["std"])
        with pytest.raises(CheckpointError, match=rf"config\.data\.{key} .* normalised alike, add ") as error:
            install(config)
        flags = shlex.split(str(error.value).split("alike, add ")[1].rstrip("."))
        given = parse(monkeypatch, "--config=configs/digits.py:method=kd", *flags).config
        assert (given.data.mean, given.data.std) == (mean, std)


def changed_dataset(class_names=None, side=None):
    whole = data.load(digits.get_config().data)

    def split(one):
        labels = one.labels if class_names is None else one.labels % len(class_names)
        images = one.images if side is None else np.repeat(np.repeat(one.images, 2, 1), 2, 2)[:, :side, :side]
        return Split(images, labels)

    names = class_names or whole.class_names
    return type(whole)(whole.name, split(whole.train), split(whole.test), names, "0" * 64)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"class_names": tuple("abcde")}, "has classes 10, but this run has 5: take a teacher of the same"),
        ({"class_names": (*"0123456798",)}, "has class 8 8, but this run has 9: take a teacher of the same"),
        ({"side": 16}, r"has images of \[8, 8, 3\], but this run has \[16, 16, 3\]: take a teacher"),
    ],
)
def test_another_dataset(runs, dataset, message):
    config = configuration(teachers__runs=(str(runs["plain"][0]),))
    with pytest.raises(CheckpointError, match=message):
        install(config, Experiment(config, changed_dataset(**dataset)))


def test_damaged_run(runs, tmp_path):
    shutil.copytree(runs["plain"][0], tmp_path, dirs_exist_ok=True)
    largest = max((tmp_path / "checkpoints/23").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*step 23"):
        install(configuration(teachers__runs=(str(tmp_path),)))


def test_methods_without_teachers():
    config = configuration("independent")
    experiment, workdir = make_experiment(config), pathlib.Path("unused")
    assert list(teachers.to_train(config, workdir)) == []
    state = draw(experiment.abstract_state(), 0)
    assert teachers.install(state, experiment, workdir) is state
