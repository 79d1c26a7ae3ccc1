"""Whole runs as users start them: killed, stopped and moved ones must end like one that was left alone.

What needs no process of its own, to be killed in, runs in this one, by the same command.
"""

import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest
from conftest import MAIN, UNDRAWN

from configs import digits
from ffl_jax import data, errors, evaluate, main
from ffl_jax.data import resident
from ffl_jax.devices import preemption
from ffl_jax.training import config, loop, metrics, runs
from ffl_jax.training.experiment import Experiment
from ffl_jax.workdir import checkpoint
from ffl_jax.workdir.log import MetricsLog

# 2 epochs of 45 steps on the digits, saved and logged at odd places.
SETTINGS = (
    "--config.epochs=2",
    "--config.batch_size=32",
    "--config.data.validation_examples=10",
    "--config.evaluation.every_epochs=1",
    "--config.checkpoint.every_steps=5",
    "--config.log_every_steps=7",
    "--config.optimizer.schedule=constant",  # unlike cosine, it lets a run be prolonged
)
STEPS = 2 * 45  # ceil(1427 / 32) = 45
SMALL = "configs/digits.py:network=tiny,method=independent"  # where the method does not matter

pytestmark = pytest.mark.usefixtures("traced_once")


def arguments(workdir, main=UNDRAWN):
    return (*main, "--config=configs/digits.py:network=tiny", f"--workdir={workdir}", *SETTINGS)


@pytest.fixture
def start(caplog):
    """Runs the command on a workdir in this process; returns what it said."""

    def command(workdir, *more):
        caplog.clear()
        main.command([*arguments(workdir, ("main",)), *more])
        return caplog.text

    caplog.set_level("INFO")
    return command


@pytest.fixture(autouse=True, scope="module")
def uncounted():
    """Not here: whole summaries are compared."""


@pytest.fixture(scope="module")
def reference(commands, tmp_path_factory):
    """The run that was never stopped."""
    workdir = tmp_path_factory.mktemp("reference")
    commands.run(*arguments(workdir, MAIN))
    return workdir


def final_state(workdir: pathlib.Path):
    directory = workdir / "checkpoints"
    step = checkpoint.find(directory)
    run = checkpoint.load_run(directory, step)
    settings = config.from_json(run["config"])
    experiment = Experiment(settings, data.load(settings.data))
    return step, run, checkpoint.restore(directory, step, experiment.abstract_state())


def assert_same_run(actual, expected):
    """Every array, every line of the log, every number of the summary but the speed: bit for bit."""
    assert (actual / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    (step, run, state), (expected_step, expected_run, expected_state) = map(final_state, (actual, expected))
    assert step == expected_step == STEPS
    assert run.pop("seconds") > 0 < expected_run.pop("seconds")
    assert run == expected_run
    state, expected_state = (
        jax.tree.map(np.asarray, s.replace(rng=jax.random.key_data(s.rng))) for s in (state, expected_state)
    )
    leaves, expected_leaves = (jax.tree_util.tree_leaves_with_path(s) for s in (state, expected_state))
    assert {path[0].name for path, _ in leaves} == {
        *("step", "params", "model_state", "opt_state", "rng", "record"),
    }
    for (path, leaf), (_, expected_leaf) in zip(leaves, expected_leaves, strict=True):
        np.testing.assert_array_equal(leaf, expected_leaf, err_msg=jax.tree_util.keystr(path))
    summary, expected_summary = (json.loads((w / "summary.json").read_text()) for w in (actual, expected))
    for one in (summary, expected_summary):
        del one["images_per_second"], one["training"]["seconds"], one["training"]["start_seconds"]
    assert summary == expected_summary
    assert summary["status"] == "completed"


def wait_for_step(workdir, step, process):
    """Until the log has come to `step`."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def test_files_of_a_run(reference):
    names = {path.name for path in reference.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "tensorboard",
        "curves.png",
    }
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert (summary["step"], summary["epoch"], summary["seed"]) == (STEPS, 2.0, 0)
    assert summary["networks"] == ["tiny", "tiny"]
    assert (summary["method"], summary["dataset"], summary["deploy"]) == ("ffl", "digits", "sub_0")
    assert summary["predictors"].keys() == {"sub_0", "sub_1", "ensemble", "fused"}
    for scores in summary["predictors"].values():
        assert scores.keys() == {"top1", "top5", "nll", "ece", "parameters", "flops"}
        assert scores["top1"] > 0.6
    assert summary["images_per_second"] > 0
    assert summary["training"]["seconds"] > 0
    # Backward passes take twice as much as forward passes; the fusion module is all that is not a network.
    forward = summary["predictors"]["fused"]["flops"]
    assert 2.8 < summary["training"]["flops"] / (STEPS * 32 * forward) < 3.2
    assert sum(summary["reliability"]["sub_0"]["count"]) == 360
    assert 0 < summary["diversity"]["disagreement"] < 0.5
    rows = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    trained = [row["step"] for row in rows if row["split"] == "train"]
    assert trained == sorted({*range(7, STEPS + 1, 7), 45, STEPS})
    for split in ("validation", "test"):
        assert [row["step"] for row in rows if row["split"] == split] == [45, STEPS]
        assert {"fused/top1", "fused/top5", "sub_1/nll", "ensemble/ece", "diversity/cka"} <= rows[-1].keys()
    terms = ("cross_entropy/sub_0", "distillation/fused", "distillation_weight", "loss")
    assert all(term in rows[0] for term in terms)
    # The best epoch is that of the validation split, the first one among equals.
    validation = {row["step"]: row["sub_0/top1"] for row in rows if row["split"] == "validation"}
    assert summary["best"]["step"] == max(validation, key=lambda step: (validation[step], -step))
    assert checkpoint.whole_steps(reference / "checkpoints" / "best") == [summary["best"]["step"]]
    assert checkpoint.whole_steps(reference / "checkpoints") == [STEPS - 5, STEPS]
    events = next((reference / "tensorboard").iterdir())
    assert b"train/cross_entropy/sub_0" in events.read_bytes()
    assert b"train/batch" in events.read_bytes()
    assert (reference / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_second_start_says_complete_and_writes_nothing(start, reference):
    def snapshot():
        return {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.name != ".lock"}

    before = snapshot()
    assert "is complete: 2 epochs. Nothing to do." in start(reference)
    assert snapshot() == before


def stop(process, workdir, number):
    """Sends a signal, after which the process must end with 75, its step saved."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert "run the same command again" in errors.splitlines()[-1]
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["status"] == "preempted"
    assert checkpoint.whole_steps(workdir / "checkpoints")[-1] == summary["step"] < STEPS
    return summary["step"]


@pytest.mark.parametrize("seed", range(67 if "FFL_LONG_FAULTS" in os.environ else 1))
def test_killed_and_stopped_at_random_moments(commands, start, reference, tmp_path, seed):
    """SIGTERM, SIGKILL, SIGINT and SIGKILL, while training at random steps, or anywhere from the start on."""
    random_numbers = random.Random(seed)
    steps = sorted(random_numbers.sample(range(8, STEPS - 20), 3))
    for number, step in zip(
        (signal.SIGTERM, signal.SIGKILL, None, signal.SIGINT), (*steps[:2], None, steps[2]), strict=True
    ):
        process = commands.start(*arguments(tmp_path))
        if number is None:
            time.sleep(random_numbers.uniform(0, 2))
        else:
            wait_for_step(tmp_path, step, process)
            time.sleep(random_numbers.uniform(0, 0.2))  # into a save, a step or an evaluation
        assert process.poll() is None
        if number in (signal.SIGTERM, signal.SIGINT):
            # Not a step was lost: the signal's own step is saved.
            assert stop(process, tmp_path, number) >= step
        else:
            process.kill()
            process.communicate()
    assert "Continuing from step" in start(tmp_path)
    assert_same_run(tmp_path, reference)


@pytest.mark.parametrize(
    ("seconds", "number"),
    [(0.3, signal.SIGTERM), (1.0, signal.SIGHUP), (2.0, signal.SIGTERM), (3.0, signal.SIGTERM)],
)
def test_signal_before_training(commands, tmp_path, seconds, number):
    """While importing, loading data or compiling; what was compiling is saved at its first steps."""
    process = commands.start(*arguments(tmp_path))
    time.sleep(seconds)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (75, -number), errors  # the latter before our first line ran
    assert "Traceback" not in errors
    if process.returncode == 75:
        assert errors.splitlines()[-1].startswith(f"error: stopped by {number.name}")


def test_continues_on_another_number_of_devices(commands, tmp_path):
    flags = (*UNDRAWN, f"--config={SMALL}", "--config.subnetworks.num=1", f"--workdir={tmp_path}")
    flags += ("--config.optimizer.schedule=constant",)
    commands.run(*flags, "--config.epochs=1", devices=4)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    result = commands.run(*flags, "--config.epochs=3", devices=2)
    assert "Continuing from step 23 of 69" in result.stderr
    run = checkpoint.load_run(tmp_path / "checkpoints", 69)
    assert run["devices"] == 2
    after = (tmp_path / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    losses = [json.loads(line).get("loss") for line in after.splitlines()]
    first, _, last = [loss for loss in losses if loss]
    assert last < 0.6 * first  # it went on from there


def test_another_run_is_refused(start, reference):
    before = (reference / "metrics.jsonl").read_bytes()
    other = ("--config.seed=7", "--config.optimizer.learning_rate=0.05", "--config.subnetworks.num=3")
    with pytest.raises(errors.CheckpointError) as refused:
        start(reference, *other)
    for text in (
        "config.seed: 0 in the checkpoint, 7 now",
        "config.optimizer.learning_rate: 0.1 in the checkpoint, 0.05 now",
        "config.subnetworks.num: 2 in the checkpoint, 3 now",
    ):
        assert text in str(refused.value)
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_two_runs_in_one_folder_are_refused(start, tmp_path, monkeypatch):
    """The second one, while the first takes its steps, which it does to the end."""
    advance, refused = loop.Progress.advance, []

    def start_second(*args):
        if not refused:
            with pytest.raises(errors.CheckpointError, match="another") as second:
                start(tmp_path, "--config.epochs=9999")
            refused.append(second)
        advance(*args)

    monkeypatch.setattr(loop.Progress, "advance", start_second)
    start(tmp_path)
    assert len(refused) == 1
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"


def test_damaged_checkpoint_is_set_aside(start, reference, tmp_path):
    """The newest step with one flipped bit: the run falls back to the one before, and still ends the same."""
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    largest = max((tmp_path / f"checkpoints/{STEPS}").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    said = start(tmp_path)
    assert "damaged" in said
    assert f"Continuing from step {STEPS - 5}" in said
    assert_same_run(tmp_path, reference)
    assert (tmp_path / f"checkpoints/quarantine/{STEPS}").is_dir()


def test_divergence_ends_with_5(tmp_path):
    """The last good step stays, and no state that is not finite is ever saved."""
    flags = (f"--config={SMALL}", "--config.subnetworks.num=1", "--config.optimizer.learning_rate=1e30")
    with pytest.raises(errors.NonFiniteError) as diverged:
        main.command(["main", f"--workdir={tmp_path}", *SETTINGS, *flags])
    assert diverged.value.exit_code == 5
    for text in ("at step 2", "logits of sub_0", "cross_entropy/"):
        assert text in str(diverged.value)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "diverged"
    assert not checkpoint.whole_steps(tmp_path / "checkpoints")


def test_evaluate_repeats_the_summary(reference, capsys):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    evaluate.command(["evaluate", f"--workdir={reference}"])
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before
    predictors = json.loads((reference / "summary.json").read_text())["predictors"]
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = rows[2 : 2 + len(predictors)]  # of the first table
    assert {row[1].strip(): row[2].strip() for row in rows} == {
        name: f"{100 * scores['top1']:.2f}" for name, scores in predictors.items()
    }
    best = json.loads((reference / "summary.json").read_text())["best"]["step"]
    evaluate.command(["evaluate", f"--workdir={reference}", f"--step={best}", "--split=train"])
    assert f"step {best}, train split" in capsys.readouterr().out
    for given, error in (
        ((f"--workdir={reference}", "--step=1"), errors.CheckpointError),
        ((f"--workdir={reference / 'nothing'}",), errors.CheckpointError),
        ((), errors.ConfigError),
    ):
        with pytest.raises(error):
            evaluate.command(["evaluate", *given])


def test_nothing_is_compiled_after_the_first_evaluation(tmp_path, monkeypatch):
    """Counted by JAX itself, from the second step to the third epoch's evaluation."""
    compiled, at_line = [], []
    listen = lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    write = MetricsLog.write

    def counted(log, step, epoch, split, *numbers):
        at_line.append((step, split, len(compiled)))
        return write(log, step, epoch, split, *numbers)

    monkeypatch.setattr(MetricsLog, "write", counted)
    settings = digits.get_config("epochs=3,network=tiny,method=independent")
    settings.subnetworks.num = 1
    settings.log_every_steps = 2
    settings.evaluation.every_epochs = 1
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        loop.train(settings, tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    counts = {(step, split): count for step, split, count in at_line}
    assert counts[2, "train"] > 0
    assert counts[22, "train"] == counts[4, "train"], "compiled again within an epoch"
    # The first evaluation and the first save come with programs of their own, and nothing after them.
    assert counts[69, "test"] == counts[26, "train"]


@pytest.mark.parametrize("asked", [0, 2])
def test_stopped_before_or_within_the_last_evaluation(tmp_path, monkeypatch, asked):
    """A signal at the last step saves it unevaluated; the next start evaluates, then the run is complete."""
    settings = digits.get_config("epochs=1,network=tiny,method=independent")
    settings.subnetworks.num = 1
    settings.evaluation.batch_size = 100  # asked before the first batch and each of the others
    answers = itertools.chain([False] * asked, itertools.repeat(True))
    log = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(preemption, "requested", lambda: log.stat().st_size > 0 and next(answers))
    with pytest.raises(errors.Preempted):
        loop.train(settings, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "preempted"
    assert checkpoint.load_run(tmp_path / "checkpoints", 23)["evaluated_step"] == -1
    monkeypatch.undo()
    summary = loop.train(settings, tmp_path)
    assert summary["status"] == "completed"
    assert checkpoint.load_run(tmp_path / "checkpoints", 23)["evaluated_step"] == 23
    content = log.read_bytes()
    assert loop.train(settings, tmp_path) == summary
    assert log.read_bytes() == content


def test_augmented_images_and_alarms_are_shown(tmp_path, monkeypatch, caplog):
    """The views of KDCL's networks, said to be identical to see the alarm, once; histograms on request."""
    shown, histograms = {}, []
    monkeypatch.setattr(
        MetricsLog, "write_images", lambda log, step, name, images: shown.update({name: images})
    )
    monkeypatch.setattr(
        MetricsLog, "write_histograms", lambda log, step, tree: histograms.append((step, tree))
    )
    one = {name: np.full((2, 2), value) for name, value in (("disagreement", 0), ("kl", 1e-9), ("cka", 1))}
    monkeypatch.setattr(metrics, "diversity_scores", lambda sums: one)
    settings = digits.get_config("epochs=2,network=tiny,method=kdcl")
    settings.evaluation.every_epochs = 1
    settings.log_histograms = True
    loop.train(settings, tmp_path)
    assert caplog.text.count("sub_0 and sub_1 have become identical") == 1
    assert [step for step, _ in histograms] == [23, 46]
    assert "branches" in histograms[0][1]["params"]["subnetworks"]

    assert shown.keys() == {"train/batch/view_0", "train/batch/view_1"}
    first, second = shown.values()
    assert first.shape == second.shape == (32, 8, 8, 3)
    assert (first != second).mean() > 0.1
    images = data.load(settings.data).train.images
    order = resident.epoch_order(0, 0, len(images), settings.batch_size)[0]
    centres = {tuple(image[3:5, 3:5].ravel()) for image in first}  # not beyond any padding
    windows = np.lib.stride_tricks.sliding_window_view(images[order[:32]], (2, 2), (1, 2))
    windows = np.moveaxis(windows, 3, -1).reshape(-1, 12)
    assert centres <= {tuple(window) for window in windows} | {
        tuple(window.reshape(2, 2, 3)[:, ::-1].ravel()) for window in windows
    }


def test_no_room_for_checkpoints(tmp_path, monkeypatch):
    """Refused before a step is compiled or a file of the run is written."""
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**4))
    with pytest.raises(errors.ResourceError, match=r"0\.0 MB free, but 2 checkpoints and the next one need"):
        loop.train(digits.get_config("network=tiny"), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
