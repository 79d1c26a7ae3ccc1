"""The command's refusals: one line, the right exit code, and nothing touched; help and doctor."""

import importlib
import json
import shlex
import subprocess

import numpy as np
import pytest
from absl import flags
from conftest import UNDRAWN
from PIL import Image

from configs import digits
from ffl_jax import main
from ffl_jax.errors import CheckpointError, ConfigError, DatasetError
from ffl_jax.training import loop


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """Calls `main` in this process and returns the message of the error that it must raise."""
    monkeypatch.chdir(tmp_path)

    def run(error, *arguments):
        argv = ["main", *arguments]
        with pytest.raises(error) as raised:
            main.command(argv)
        return str(raised.value)

    return run


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--config.epohs=3"], "config.epohs: did you mean epochs?"),
        (["--config.optimizer.learning_rat=1"], "did you mean optimizer.learning_rate"),
        (["--config.temperature=1"], "did you mean method.temperature?"),  # the right key of another section
        (["--config.epochs=2.5"], "config.epochs=2.5: invalid literal for int()"),
        (["--config.optimizer.learning_rate=abc"], "could not convert string to float"),
        (["--config.optimizer.learning_rate=nan"], "must be finite and not negative, got nan"),
        (["--config.optimizer.learning_rate=-1"], "must be finite and not negative, got -1.0"),
        (["--config.method.temperature=0"], "config.method.temperature must be > 0"),
        (["--config.method.kd_mode=both"], "mkd, ens2fused, fused2sub, none"),
        (["--config.method.smoothing=1.5"], "added to probabilities: it must be below 1"),
        (["--config.batch_size=0"], "config.batch_size must be at least 1"),
        (["--config.subnetworks.num=1"], "FFL takes at least 2 sub-network(s), got 1"),
        (["--config.subnetworks.num=0"], "subnetworks.num must be at least 1, got 0"),
        (["--config.data.pad_mode=edge"], "config.data.pad_mode must be one of reflect, zero"),
        (
            ["--config.teacher_smoothing=0.1"],
            "config.teacher_smoothing: known: accumulate, batch_size",
        ),  # no typing error
        (["--config=configs/digits.py:recipe=mine"], "known: common, finetune, modern, published"),
        (["--config.subnetworks.shared_stages=3"], "must be 0..2"),
        (["--config.parallel.mode=pjit"], "pmap, shard_map"),
        (["--config.data.pad=8"], "config.data.pad=8"),
        (["--config.optimizer_rules=(('loss/head', {}),)"], "matches no parameter"),
        (["--config=configs/cifar.py"], "did you mean configs/cifar10.py or"),
        (["--config=/some/where/far/away/configs/cifar.py"], "did you mean configs/cifar10.py or"),
        (["--config=configs/digits.py:method=fll"], "did you mean ffl?"),
        (["--config=configs/digits.py:network=resnet21"], "unknown network 'resnet21'"),
        (["--config=configs/digits.py:net=resnet20"], "did you mean network?"),
        (["--epochs=10"], "unknown flag --epochs: did you mean --config.epochs?"),
        (["--lr=0.1"], "Unknown command line flag 'lr'"),
        (["--learning_rat", "0.1"], "did you mean --config.optimizer.learning_rate?"),
        (["--nostreaming"], "did you mean --config.data.streaming?"),
        (["--workdr=x"], "Did you mean: workdir"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_configuration_errors(refused, tmp_path, arguments, text):
    assert text in refused((ConfigError, flags.Error), *arguments)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_broken_config_file(refused, tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(arg=None):\n    return 1 / 0\n")
    assert "broken.py:2" in refused(ConfigError, f"--config={tmp_path}/broken.py")


def test_refusals_are_one_line_with_an_exit_code(commands, tmp_path):
    """What the tests above raise, as a user sees it."""
    result = commands.run("-m", "ffl_jax.main", "--config.epohs=3", code=2, cwd=tmp_path)
    (line,) = result.stderr.splitlines()
    assert line == "error: unknown configuration key config.epohs: did you mean epochs?"
    data = f"--config.data.data_dir={tmp_path}/nowhere"
    result = commands.run(*("-m", "ffl_jax.main"), *FOLDER, data, code=3, cwd=tmp_path)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: config.data.data_dir {tmp_path}/nowhere does not exist; ")


def test_batch_must_divide_by_devices(commands, tmp_path):
    flags = (f"--workdir={tmp_path}/run", "--config.batch_size=10")
    result = commands.run("-m", "ffl_jax.main", *flags, devices=4, code=2)
    assert "set config.batch_size to 8 or 12" in result.stderr
    assert not (tmp_path / "run").exists()


def make_tree(root, train=("cat", "dog"), test=("cat", "dog"), count=4):
    rng = np.random.default_rng(0)
    for split, classes in (("train", train), ("test", test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(40, 36, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


FOLDER = ("--config=configs/folder.py:network=resnet8",)


def test_dataset_errors(refused, tmp_path):
    """The sources' own tests have the many cases; here the way from a bad folder."""

    def run(root):
        return refused(DatasetError, *FOLDER, f"--config.data.data_dir={root}", f"--workdir={tmp_path}/run")

    make_tree(tmp_path / "differ", test=("cat", "dgo"))
    assert "dgo" in run(tmp_path / "differ")
    make_tree(tmp_path / "small")
    assert "8 training examples are fewer than one batch" in run(tmp_path / "small")
    broken = tmp_path / "small/train/dog/2.png"
    broken.write_bytes(broken.read_bytes()[:50])
    assert str(broken) in run(tmp_path / "small")


def test_own_folder_end_to_end(commands, refused, tmp_path):
    """Trains, then changed data is refused."""
    make_tree(tmp_path / "data")
    arguments = ("--config=configs/folder.py:network=tiny,epochs=1", "--config.batch_size=4")
    arguments += (f"--config.data.data_dir={tmp_path}/data", f"--workdir={tmp_path}/run")
    commands.run(*UNDRAWN, *arguments)
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "completed"
    Image.new("RGB", (36, 40)).save(tmp_path / "data/train/cat/0.png")
    assert "dataset: fingerprint" in refused(CheckpointError, *arguments)


def test_different_networks_side_by_side(tmp_path):
    loop.train(digits.get_config("network=tiny+tiny_wide,epochs=1"), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["networks"] == ["tiny", "tiny_wide"]
    sizes = {name: scores["parameters"] for name, scores in summary["predictors"].items()}
    assert sizes["sub_0"] < sizes["sub_1"] < sizes["ensemble"] == sizes["sub_0"] + sizes["sub_1"]


def test_unwritable_workdir(commands, tmp_path):
    (tmp_path / "file").write_text("")
    commands.run("-m", "ffl_jax.main", f"--workdir={tmp_path}/file/run", code=6)


def test_full_disk(commands, tmp_path):
    """A disk that cannot hold the checkpoints is seen before anything is compiled."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        result = commands.run("-m", "ffl_jax.main", f"--workdir={tmp_path}/run", code=6)
        assert "MB free" in result.stderr
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("module", ["main", "evaluate", "doctor"])
def test_help(module, capsys):
    command = importlib.import_module(f"ffl_jax.{module}").command
    with pytest.raises(SystemExit) as ended:
        command([module, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m ffl_jax.{module}" in text
    assert "--workdir" in text


def test_doctor(commands, tmp_path):
    """From a folder without `configs/`, which is looked for beside the package."""
    given = ("--config=configs/digits.py:network=resnet14", "--config.optimizer.decay_epochs=(3, 4)")
    result = commands.run("-m", "ffl_jax.doctor", *given, "--workdir=here", cwd=tmp_path, devices=2)
    assert "2 x cpu" in result.stdout
    assert "train 1437, test 360 images of 8x8, 10 classes, 23 steps" in result.stdout
    command = shlex.split(result.stdout.splitlines()[-1].removeprefix("run next:"))
    assert command == ["python", "-m", "ffl_jax.main", *given, "--workdir=here"]
    assert not list(tmp_path.iterdir())
    flags = ("--config=configs/cifar10.py", f"--config.data.data_dir={tmp_path}")
    result = commands.run("-m", "ffl_jax.doctor", *flags, code=3)
    assert "NOT USABLE" in result.stdout
