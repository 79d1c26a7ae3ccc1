"""Whatever becomes of a workdir but for one whole checkpoint: the run continues, and says what was lost."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import resource
import shutil
import textwrap
import types

import jax
import numpy as np
import pytest

from configs import digits
from ffl_jax.devices import start
from ffl_jax.errors import CheckpointError, ConfigError, ResourceError
from ffl_jax.training import experiment, loop, runs
from ffl_jax.workdir import checkpoint, files
from ffl_jax.workdir.log import read_metrics
from ffl_jax.workdir.run_folder import RunFolder

CONFIG = {"wandb": "", "epochs": 3}
LINES = [{"step": step, "epoch": step / 2, "split": "train", "loss": 1 / step} for step in (1, 2, 3, 4)]


def write_lines(folder, steps):
    for line in LINES:
        if line["step"] in steps:
            folder.log.write(line["step"], line["epoch"], line["split"], {"loss": line["loss"]})


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run of two steps, both saved, the last of them the best."""
    path = tmp_path_factory.mktemp("run")
    sizes = {}
    folder = RunFolder(path)
    with folder.open(CONFIG, 0, 0, 2, True, lambda: None):
        for step in (1, 2):
            write_lines(folder, [step])
            folder.log.sync()
            sizes[step] = folder.log.size
            folder.save(step, {"x": np.full(3, step)}, {"bytes": folder.log.size})
        folder.save_best(2, {"x": np.full(3, 2)}, {"bytes": folder.log.size})
    folder.write_summary({"status": "preempted"})
    (path / "curves.png").write_bytes(b"PNG")
    return path


@pytest.fixture
def run(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "run")


def write(name, data):
    return lambda run: (run / name).write_bytes(data)


def change(name, edit):
    return lambda run: (run / name).write_bytes(edit((run / name).read_bytes()))


def remove(name):
    def act(run):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def instead(name, make):
    def act(run):
        if os.path.lexists(run / name):
            remove(name)(run)
        make(run / name)

    return act


def folder(path):
    path.mkdir()
    (path / "file").touch()


def nowhere(path):
    path.symlink_to("nowhere")


def file(path):
    path.write_text("x")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# fault, {what of LINES is left: steps}, what the log says
FAULTS = {
    "nothing": (lambda run: None, (1, 2), ""),
    "metrics.jsonl has lost its end": (change("metrics.jsonl", lambda x: x[:-10]), (1,), "1 damaged line"),
    "metrics.jsonl has a line cut short": (change("metrics.jsonl", lambda x: x[9:]), (2,), "lost lines"),
    "metrics.jsonl has a flipped bit": (
        change("metrics.jsonl", lambda x: x.replace(b"{", b"[", 1)),
        (2,),
        "1 damaged line",
    ),
    "metrics.jsonl is binary": (write("metrics.jsonl", bytes(range(256)) * 9), (), "damaged line"),
    "metrics.jsonl holds an array": (write("metrics.jsonl", b"[1]\n" * 200), (), "damaged line"),
    "metrics.jsonl is empty": (write("metrics.jsonl", b""), (), "lost lines"),
    "metrics.jsonl has gone": (remove("metrics.jsonl"), (), "lost lines"),
    "metrics.jsonl is a folder": (instead("metrics.jsonl", folder), (), "metrics.jsonl.damaged"),
    "metrics.jsonl is a pipe": (instead("metrics.jsonl", os.mkfifo), (), "metrics.jsonl.damaged"),
    "metrics.jsonl leads nowhere": (instead("metrics.jsonl", nowhere), (), "metrics.jsonl.damaged"),
    "metrics.jsonl has more lines": (change("metrics.jsonl", lambda x: x + b'{"st'), (1, 2), ""),
    "config.json is binary": (write("config.json", b"\xff\x00"), (1, 2), ""),
    "config.json has gone": (remove("config.json"), (1, 2), ""),
    "config.json is a folder": (instead("config.json", folder), (1, 2), "config.json.damaged"),
    "config.json is a pipe": (instead("config.json", os.mkfifo), (1, 2), "config.json.damaged"),
    "config.json is begun by a folder": (instead(".config.json.tmp", folder), (1, 2), "tmp.damaged"),
    "summary.json holds []": (write("summary.json", b"[]"), (1, 2), ""),
    "summary.json is binary": (write("summary.json", b"\x80" * 99), (1, 2), ""),
    "summary.json is deep": (write("summary.json", b"[" * 10**5), (1, 2), ""),
    "summary.json is a folder": (instead("summary.json", folder), (1, 2), "summary.json.damaged"),
    "summary.json is a pipe": (instead("summary.json", os.mkfifo), (1, 2), "summary.json.damaged"),
    "summary.json has gone": (remove("summary.json"), (1, 2), ""),
    "tensorboard is a file": (instead("tensorboard", file), (1, 2), "tensorboard.damaged"),
    "tensorboard has gone": (remove("tensorboard"), (1, 2), ""),
    "the newest step has a flipped bit": (
        lambda run: flip(largest(run / "checkpoints/2")),
        (1,),
        "is damaged",
    ),
    "the newest step has gone": (remove("checkpoints/2"), (1,), ""),
    "the best step has a flipped bit": (
        lambda run: flip(largest(run / "checkpoints/best/2")),
        (1, 2),
        "damaged",
    ),
    "the best step has gone": (remove("checkpoints/best"), (1, 2), ""),
    "only the best step is whole": (
        lambda run: [flip(largest(run / f"checkpoints/{step}")) for step in (1, 2)],
        (1, 2),
        "which was kept as the best",
    ),
    "only the best step is there": (
        lambda run: [remove(f"checkpoints/{step}")(run) for step in (1, 2)],
        (1, 2),
        "which was kept as the best",
    ),
    "best is a file": (instead("checkpoints/best", file), (1, 2), "best.damaged"),
    "quarantine is a file": (
        lambda run: (file(run / "checkpoints/quarantine"), flip(largest(run / "checkpoints/2"))),
        (1,),
        "quarantine.damaged",
    ),
    "what was being saved is a file": (instead("checkpoints/.incoming", file), (1, 2), ".incoming.damaged"),
    "a step is a file": (instead("checkpoints/3", file), (1, 2), ""),
    ".lock is a folder": (instead(".lock", folder), (1, 2), ".lock.damaged"),
    ".lock is a pipe": (instead(".lock", os.mkfifo), (1, 2), ".lock.damaged"),
}


def largest(step):
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def continued(path):
    """Takes a run two steps further, as the loop does; returns the step that it continued from."""
    folder = RunFolder(path)
    with checkpoint.lock(path) as lock:
        step = folder.newest_step()
        record = checkpoint.load_run(folder.checkpoints, step)
        state = checkpoint.restore(folder.checkpoints, step, {"x": np.zeros(3, int)})
        assert (state["x"] == step).all()
        folder.mend_best(2)
        with folder.open(CONFIG, step, record["bytes"], 2, True, lock.check):
            assert [row["step"] for row in folder.log.rows] == [
                r["step"] for r in read_metrics(path / "metrics.jsonl")[0]
            ]
            write_lines(folder, [3])
            folder.log.sync()
            folder.save(3, {"x": np.full(3, 3)}, {"bytes": folder.log.size})
            write_lines(folder, [4])
        folder.write_summary({"status": "completed"})
    return step


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_continues(fault, run, caplog):
    act, kept, words = FAULTS[fault]
    caplog.set_level(logging.INFO)
    act(run)
    continued(run)
    assert words in caplog.text
    rows, damaged = read_metrics(run / "metrics.jsonl")
    assert (rows, damaged) == ([line for line in LINES if line["step"] in (*kept, 3, 4)], 0)
    assert files.read_json(run / "config.json") == CONFIG
    assert files.read_json(run / "summary.json") == {"status": "completed"}
    assert checkpoint.find(run / "checkpoints", 3) == 3
    assert checkpoint.whole_steps(run / "checkpoints/best") in ([2], [])
    assert any((run / "tensorboard").iterdir())
    if "metrics.jsonl" in fault and words:  # nothing is thrown away
        assert "has gone" in fault or "empty" in fault or os.path.lexists(run / "metrics.jsonl.damaged")


# what happens between two lines of the log while a run writes, what the log says
WHILE_RUNNING = {
    "metrics.jsonl has gone": (remove("metrics.jsonl"), "metrics.jsonl was removed"),
    "config.json has gone": (remove("config.json"), ""),
    "summary.json has gone": (remove("summary.json"), ""),
    "tensorboard has gone": (remove("tensorboard"), ""),
    "checkpoints have gone": (remove("checkpoints"), ""),
    "all has gone": (shutil.rmtree, ".lock is gone"),
    "it was renamed": (lambda run: run.rename(run.with_name("other")), ".lock is gone"),
    ".lock has gone": (remove(".lock"), ".lock is gone"),
    ".lock is another": (instead(".lock", file), ".lock is gone"),
}


@pytest.mark.parametrize("fault", WHILE_RUNNING)
def test_a_run_goes_on(fault, run, caplog):
    act, words = WHILE_RUNNING[fault]
    folder = RunFolder(run)
    with checkpoint.lock(run) as lock, folder.open(CONFIG, 2, 10**6, 2, True, lock.check):
        act(run)
        write_lines(folder, [3])
        folder.log.sync()
        folder.save(3, {"x": np.full(3, 3)}, {"bytes": folder.log.size})
        with pytest.raises(CheckpointError, match="another run is writing to"), checkpoint.lock(run):
            pass
        write_lines(folder, [4])
    folder.write_summary({"status": "completed"})
    assert words in caplog.text
    assert read_metrics(run / "metrics.jsonl") == (LINES, 0)
    assert files.read_json(run / "config.json") == CONFIG
    assert files.read_json(run / "summary.json") == {"status": "completed"}
    assert checkpoint.find(run / "checkpoints") == 3


@pytest.mark.parametrize("locks", [True, False])
def test_of_two_writers_the_first_stops(locks, run, monkeypatch, caplog):
    """Where `.lock` was removed, or there are no locks, as on some file systems of clusters."""
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    before = (run / "checkpoints/2/MANIFEST.json").read_bytes()
    first, rubbish = RunFolder(run), run / "checkpoints/.incoming/of-the-second"
    with checkpoint.lock(run) as lock, contextlib.ExitStack() as second:
        with first.open(CONFIG, 2, 10**6, 2, True, lock.check):
            if locks:
                (run / ".lock").unlink()
            other = second.enter_context(checkpoint.lock(run))
            for act in (
                lambda: write_lines(first, [3]),
                lambda: (first.save(3, {"x": np.full(3, 3)}, {}), first._newest.wait()),
            ):
                with pytest.raises(CheckpointError, match=r"another run is writing to .* \(process \d+ on"):
                    act()
            other.check()
            rubbish.mkdir()
        assert rubbish.exists()
    assert (run / "checkpoints/2/MANIFEST.json").read_bytes() == before
    assert read_metrics(run / "metrics.jsonl") == (LINES[:2], 0)
    assert ("has no locks" in caplog.text) is not locks


def refuse(number):
    def act(*_, **__):
        raise OSError(number, os.strerror(number))

    return act


def test_a_folder_whose_name_is_no_text(tmp_path):
    with pytest.raises(ConfigError, match=r"run\\xff is not UTF-8"), checkpoint.lock(tmp_path / "run\udcff"):
        pass


# damaged, the step that all seeds continue from; None: they are refused
SEEDS = [((), 2), (("0/2",), 1), (("0/2", "1/1"), None), (("0/1", "0/2", "1/1", "1/2"), 2)]


@pytest.mark.parametrize(("damaged", "step"), SEEDS)
def test_seeds_continue_from_the_newest_step_that_all_have(damaged, step, two_steps, tmp_path):
    for seed in ("0", "1"):
        shutil.copytree(two_steps, tmp_path / seed)
    for one in damaged:
        seed, number = one.split("/")
        flip(largest(tmp_path / seed / "checkpoints" / number))
        if len(damaged) == 2:  # with four, each seed has the best, which is step 2
            shutil.rmtree(tmp_path / seed / "checkpoints/best")
    all_seeds = object.__new__(runs.Runs)
    all_seeds.workdir = tmp_path
    all_seeds.each = [types.SimpleNamespace(folder=RunFolder(tmp_path / seed)) for seed in ("0", "1")]
    if step is None:
        with pytest.raises(CheckpointError, match="no step is whole in the checkpoints of all seeds"):
            all_seeds.newest_step()
    else:
        assert all_seeds.newest_step() == step


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks(number, run, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    continued(run)
    assert caplog.text.count("has no locks: of two runs there, the one that was started last goes on") == 1


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EPERM, 9999])
def test_what_the_system_refuses_is_one_line(number, run, monkeypatch):
    """While a step is put in place, whatever the number: those before are there, and the run continues."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse(number))
        with pytest.raises(ResourceError) as caught:
            continued(run)
    assert str(caught.value).startswith(f"cannot use {run}")
    assert os.strerror(number) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert checkpoint.find(run / "checkpoints") == 2
    continued(run)


def test_folders_that_cannot_be_synchronised_do(run, monkeypatch):
    """Some file systems know it of files alone."""
    fsync = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda file: refuse(errno.EINVAL)() if os.path.isdir(f"/proc/self/fd/{file}") else fsync(file),
    )
    continued(run)


def test_a_full_disk_leaves_one_line(commands, tmp_path):
    """With logs set up as the commands do, before Orbax is loaded; a limit on files stands for the disk."""
    program = """
        import logging, os, resource, signal, sys, threading
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("absl").setLevel(logging.WARNING)
        import numpy as np
        from ffl_jax import errors
        from ffl_jax.workdir import checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
        with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
            for step in range(3):
                checkpoints.save(step, {str(n): np.random.rand(300) for n in range(60)}, {})
                try:
                    checkpoints.wait()
                except errors.ResourceError as error:
                    print(error)
        """
    result = commands.run("-c", textwrap.dedent(program), tmp_path)
    assert result.stdout.count("File too large") == 3
    assert result.stderr == ""


def test_a_damaged_compiled_program_is_told_once_and_made_again(commands, tmp_path):
    program = """
        from ffl_jax.devices import compiled
        compiled.mend()
        import jax
        print(jax.jit(lambda x: x + 1)(1))
        """
    lines = []
    for size in (None, 50, None):
        for entry in tmp_path.glob("*-cache"):
            entry.write_bytes(entry.read_bytes()[:size])
        result = commands.run(
            "-c", textwrap.dedent(program), env={"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
        )
        assert result.stdout == "2\n"
        lines.append(result.stderr.count("\n"))
        assert ("damaged entries removed" in result.stderr) is bool(lines[-1])
    assert lines == [0, 1, 0]


@pytest.mark.parametrize(
    ("error", "limited", "kind", "words"),
    [
        (AssertionError(), False, ConfigError, "JAX_PLATFORMS=cuda: there is none here; set JAX_PLATFORMS"),
        (RuntimeError("no\nbackend"), False, ConfigError, "JAX_PLATFORMS=cuda: no backend; set"),
        (
            ImportError("x.so: failed to map"),
            True,
            ResourceError,
            "failed to map): raise the limit on memory",
        ),
    ],
)
def test_jax_does_not_start(error, limited, kind, words, monkeypatch):
    def none():
        raise error

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (10**9 if limited else resource.RLIM_INFINITY, 0)
    )
    refusal = start.problem(error)
    assert type(refusal) is kind
    assert words in str(refusal)
    monkeypatch.undo()
    assert start.problem(AssertionError("ours")) is None


def settings(epochs):
    config = digits.get_config("network=tiny,method=independent,epochs=1")
    config.epochs, config.batch_size = epochs, 240  # 6 steps an epoch
    config.log_every_steps, config.subnetworks.num = 2, 1
    config.optimizer.schedule = "constant"  # unlike cosine, it lets a run be prolonged
    config.data.validation_examples = 10
    config.evaluation.every_epochs, config.checkpoint.every_steps = 1, 3
    return config


def test_all_at_once_in_a_real_run(traced_once, tmp_path, monkeypatch, caplog):
    loop.train(settings(1), tmp_path)
    before = read_metrics(tmp_path / "metrics.jsonl")[0]
    for fault in (
        "metrics.jsonl has a flipped bit",
        "config.json is binary",
        "summary.json holds []",
        "tensorboard is a file",
        ".lock is a pipe",
    ):
        FAULTS[fault][0](tmp_path)
    flip(largest(tmp_path / "checkpoints/best/6"))
    folder(tmp_path / "curves.png")
    curves = []
    monkeypatch.setattr(loop.curves, "draw_curves", lambda *_: curves.append(1) or refuse(errno.ENOSPC)())
    monkeypatch.setattr(runs, "versions", lambda: experiment.versions() | {"jax": "99.0"})
    summary = loop.train(settings(2), tmp_path)
    assert summary["status"] == "completed"
    rows, damaged = read_metrics(tmp_path / "metrics.jsonl")
    assert damaged == 0
    assert rows[: len(before) - 1] == before[1:]
    assert {row["step"] for row in rows} == {4, 6, 8, 10, 12}
    words = f"under other versions, numbers may differ from here on: jax {jax.__version__} -> 99.0"
    assert f"Step 6 was written {words}" in caplog.text
    assert caplog.text.count("curves.png fails, and the run goes on without it") == len(curves) == 1
    assert checkpoint.find(tmp_path / "checkpoints/best") == summary["best"]["step"]

    wrong = {**summary, "predictors": []}
    for content in (b'{"status": "completed", "step": 12}', json.dumps(wrong).encode()):
        (tmp_path / "summary.json").write_bytes(content)
        (tmp_path / "config.json").write_bytes(content[:9])
        assert loop.train(settings(2), tmp_path)["predictors"] == summary["predictors"]
        assert files.read_json(tmp_path / "summary.json")["predictors"] == summary["predictors"]
        assert files.read_json(tmp_path / "config.json")["epochs"] == 2
