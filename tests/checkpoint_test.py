"""What comes back is bitwise what went in, or it is refused, whatever happens to process, disk and files."""

import json
import logging
import os
import random
import re
import shutil
import signal
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1

from ffl_jax.errors import CheckpointError, ResourceError
from ffl_jax.workdir import checkpoint, contents, manifest


def _state(number):
    params = {"conv": {"kernel": jnp.full((3, 4), number, jnp.bfloat16)}, "head": jnp.arange(5.0) * number}
    return {
        "step": jnp.int32(number),
        "params": params,
        "opt_state": {"loss": optax.sgd(0.1, momentum=0.9).init(params)},  # named tuples, one of them empty
        "pair": (np.arange(3) + number, np.full((2, 2), number, np.uint8)),
        "rng": jax.random.key(number),
        "slow_rng": jax.random.key(number, impl="rbg"),
    }


def _bits(tree):
    """Dtype, shape and bytes of every leaf, and the tree's structure."""

    def leaf_bits(leaf):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return str(leaf.dtype), leaf.shape, np.asarray(data).tobytes()

    leaves, structure = jax.tree.flatten(tree)
    return [leaf_bits(leaf) for leaf in leaves], structure


def _save(directory, *numbers, keep=2):
    with checkpoint.Checkpoints(directory, keep) as checkpoints:
        for number in numbers:
            checkpoints.save(number, _state(number), {"number": number})


def _usable(directory, **options):
    """What `find` chooses, after checking that it holds what was saved under that number."""
    step = checkpoint.find(directory, **options)
    assert _bits(checkpoint.restore(directory, step, _state(0))) == _bits(_state(step))
    assert checkpoint.load_run(directory, step) == {"number": step}
    return step


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _program(code):
    """For `commands`, which gives it its arguments."""
    return "-c", "import sys, checkpoint_test\nfrom ffl_jax import checkpoint\n" + textwrap.dedent(code)


@pytest.fixture
def two_steps(tmp_path):
    directory = tmp_path / "checkpoints"
    _save(directory, 10, 20)
    return directory


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_round_trip(two_steps):
    assert checkpoint.whole_steps(two_steps) == [10, 20]
    assert _usable(two_steps) == 20
    assert _usable(two_steps, step=10) == 10
    abstract = jax.eval_shape(lambda: _state(0))  # shapes only: NumPy's int64 is not among them
    state = {name: abstract[name] for name in abstract if name != "pair"} | {"pair": _state(0)["pair"]}
    assert _bits(checkpoint.restore(two_steps, 20, state)) == _bits(_state(20))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_reads_it_and_names_are_kept(two_steps):
    (two_steps / "best").mkdir()
    with v1.training.Checkpointer(two_steps) as checkpointer:
        assert checkpointer.latest.step == 20
    state = v1.load_checkpointables(two_steps / "20", {"state": None})["state"]
    np.testing.assert_array_equal(state["params"]["head"], np.arange(5.0) * 20)


def test_steps_of_the_version_before(tmp_path):
    """It saved with the newer of Orbax's interfaces."""
    context = v1.Context()
    context.checkpointables.registry = registry = v1.handlers.local_registry()
    for name in ("run", "arrays"):
        registry.add(v1.handlers.JsonHandler, checkpointable_name=name)
    state = _state(7)
    items = {"state": contents.copies(state), "run": {"number": 7}, "arrays": contents.describe(state)}
    with context:
        v1.save_checkpointables(tmp_path / "7", items)
    manifest.seal(tmp_path / "7", 7)
    assert _usable(tmp_path) == 7


def test_buffers_may_be_overwritten_at_once(tmp_path):
    # Large, so that the write is still going on when the buffers change.
    host, device = np.arange(2_000_000.0), jnp.arange(2_000_000.0) + 0
    expected = _bits({"host": host.copy(), "device": np.arange(2_000_000, dtype=np.float32)})
    run = {"list": [1, 2]}
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"host": host, "device": device}, run)
        host[:] = -1
        run["list"].append(3)
        overwrite(device).block_until_ready()
    like = {"host": host, "device": jax.ShapeDtypeStruct((2_000_000,), jnp.float32)}
    assert _bits(checkpoint.restore(tmp_path, 1, like)) == expected
    assert checkpoint.load_run(tmp_path, 1) == {"list": [1, 2]}


def test_flipped_bits_are_never_used(two_steps, warnings):
    generator = random.Random(0)
    files = [path for path in _files(two_steps / "20") if path.stat().st_size]
    assert len(files) > 8
    for trial in range(500 if "FFL_LONG_FAULTS" in os.environ else 40):
        path = files[trial % len(files)]
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[generator.randrange(len(sound))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        assert _usable(two_steps) == 10, path
        named = "." if path.name == manifest.NAME else path.name  # a flipped hash accuses the file it is of
        assert re.search(named, warnings[-1])
        with pytest.raises(CheckpointError, match=named):
            checkpoint.find(two_steps, step=20)
        path.write_bytes(sound)
    assert _usable(two_steps) == 20


def _truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def _link(path):
    """To a file of the very same contents."""
    elsewhere = Path(str(path).replace("/20/", "/copy/"))
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "deleted": Path.unlink,
    "emptied": lambda path: os.truncate(path, 0),
    "halved": _truncate,
    "linked": _link,
    "piped": _pipe,
    "added": lambda path: path.with_name("stray").write_text("x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_damage_is_never_used(two_steps, warnings, damage):
    for path in _files(two_steps / "20"):
        sound, stray = path.read_bytes(), path.with_name("stray")
        if not sound and damage in ("emptied", "halved"):
            continue
        DAMAGES[damage](path)
        assert _usable(two_steps) == 10, path
        assert (stray if damage == "added" else path).name in warnings[-1]
        for left in (stray, path):
            left.unlink(missing_ok=True)
        path.write_bytes(sound)
    assert _usable(two_steps) == 20


def test_linked_folders_are_refused(two_steps, tmp_path):
    (two_steps / "20" / "state").rename(tmp_path / "state")
    (two_steps / "20" / "state").symlink_to(tmp_path / "state")
    (two_steps / "30").symlink_to(two_steps / "10")
    shutil.copytree(two_steps / "10", two_steps / "40")  # sound files, but not of step 40
    _save(tmp_path / "other", 50)
    (two_steps / "50").symlink_to(tmp_path / "other" / "50")
    assert _usable(two_steps) == 10
    (two_steps / "10" / "more").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="more is a link"):
        checkpoint.find(two_steps)


def test_nothing_usable(two_steps, tmp_path):
    for step in (10, 20):
        os.truncate(two_steps / str(step) / "state" / "_METADATA", 5)
    with pytest.raises(CheckpointError, match="_METADATA") as caught:
        checkpoint.find(two_steps)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert checkpoint.whole_steps(tmp_path / "missing") == []
    for empty in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="no usable checkpoint"):
            checkpoint.find(empty)


def test_step_asked_for_is_missing(two_steps):
    with pytest.raises(CheckpointError, match=r"step 15 .* 10, 20"):
        checkpoint.find(two_steps, step=15)
    with pytest.raises(CheckpointError, match="not there"):
        checkpoint.load_run(two_steps, 15)
    with pytest.raises(CheckpointError, match="not there"):
        checkpoint.restore(two_steps, 15, _state(0))


def test_one_of_two_copies_is_enough(two_steps, warnings):
    """Steps lie among the newest, as the best, or in both."""
    best = two_steps / "best"
    checkpoint.copy(two_steps, best, 20)
    assert checkpoint.locate(two_steps, 20) == (two_steps, 20)
    for folder, place in ((best, two_steps), (two_steps, best)):
        _truncate(folder / "20" / "_CHECKPOINT_METADATA")
        assert checkpoint.locate(two_steps, 20, quarantine=True) == (place, 20)
        assert _usable(place, step=20) == 20
        if place == two_steps:
            shutil.rmtree(best / "20")
            checkpoint.copy(two_steps, best, 20)
    assert "which was kept as the best" in warnings[-1]
    assert checkpoint.locate(two_steps) == (two_steps, 10)
    with pytest.raises(CheckpointError, match=r"step 15 .* 10"):
        checkpoint.locate(two_steps, 15)


def test_quarantine_makes_room_to_save_again(two_steps):
    for count in range(2):
        _truncate(two_steps / "20" / "_CHECKPOINT_METADATA")
        assert checkpoint.find(two_steps, quarantine=True) == 10
        assert not (two_steps / "20").exists()
        assert len(list((two_steps / "quarantine").iterdir())) == count + 1
        _save(two_steps, 20)
        assert _usable(two_steps) == 20


def test_damaged_step_is_replaced_and_whole_one_left_alone(two_steps):
    _truncate(two_steps / "20" / "_CHECKPOINT_METADATA")
    before = (two_steps / "10" / manifest.NAME).stat().st_mtime_ns
    _save(two_steps, 10, 20)
    assert _usable(two_steps) == 20
    assert (two_steps / "10" / manifest.NAME).stat().st_mtime_ns == before


def test_every_difference_is_listed(two_steps):
    wanted = _state(0)
    wanted["params"]["conv"] = {"kernel": jnp.zeros((3, 4), jnp.float32), "bias": jnp.zeros(4)}
    wanted["params"]["head"] = jnp.zeros(6)
    wanted["rng"] = jnp.zeros(2, jnp.uint32)
    del wanted["step"]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(two_steps, 20, wanted)
    message = str(caught.value)
    for line in (
        "params/conv/kernel: bfloat16[3,4] in the checkpoint, float32[3,4] now",
        "params/conv/bias: absent in the checkpoint, float32[4] now",
        "params/head: float32[5] in the checkpoint, float32[6] now",
        "rng: key<fry>[] in the checkpoint, uint32[2] now",
        "step: int32[] in the checkpoint, absent now",
    ):
        assert line in message
    assert "\n" not in message
    with pytest.raises(CheckpointError, match="and 5 more"):  # 12 leaves absent, 13 not asked for
        checkpoint.restore(two_steps, 20, {str(i): np.zeros(1) for i in range(25 - len(_bits(_state(0))[0]))})


def test_disk_growth_and_strays(tmp_path):
    directory = tmp_path / "checkpoints"
    (directory / "9").mkdir(parents=True)
    (directory / "007").mkdir()
    (directory / "3").write_text("not a step")
    most, done = 0, threading.Event()

    def watch():
        nonlocal most
        while not done.is_set():
            try:
                found = [*directory.glob("*/state"), *directory.glob(".incoming/*/state")]
                most = max(most, len({path.stat().st_ino for path in found}))  # one may have moved meanwhile
            except FileNotFoundError:
                continue

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with (
        checkpoint.Checkpoints(directory) as checkpoints,
        checkpoint.Checkpoints(directory / "best", 1) as best,
    ):
        threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for number in range(12):
            checkpoints.save(number, _state(number), {"number": number})
            best.save(number, _state(number), {"number": number})
        checkpoints.wait()
        best.wait()
        assert checkpoint.whole_steps(directory) == [10, 11]
        assert threading.active_count() <= threads + 4  # two workers, and Orbax's last ones on their way out
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    done.set()
    watcher.join()
    assert 2 <= most <= 3
    assert checkpoint.whole_steps(directory / "best") == [11]
    assert sorted(os.listdir(directory)) == ["007", "10", "11", "best"]  # steps 3 and 9 took over
    assert os.listdir(directory / "best") == ["11"]
    assert _usable(directory) == 11


def test_old_step_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    _save(tmp_path, 1, keep=1)
    seen = []
    seal = manifest.seal

    def spy(folder, step):
        seen.append(checkpoint.whole_steps(tmp_path))
        seal(folder, step)
        seen.append(checkpoint.whole_steps(tmp_path))

    monkeypatch.setattr(manifest, "seal", spy)
    _save(tmp_path, 2, keep=1)
    assert seen == [[1], [1]]
    assert checkpoint.whole_steps(tmp_path) == [2]
    _save(tmp_path, 1, keep=1)  # back to an older step: the newest save counts, not the highest number
    assert checkpoint.whole_steps(tmp_path) == [1]


def test_error_of_a_save_is_raised_once_and_masks_nothing(tmp_path, monkeypatch):
    def full(folder, step):
        raise OSError(28, "No space left on device")

    def train():
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, _state(1), {})
            with pytest.raises(ResourceError, match="No space left on device") as caught:
                checkpoints.wait()
            assert caught.value.exit_code == 6
            assert str(tmp_path) in str(caught.value)
            checkpoints.wait()
            checkpoints.save(2, _state(2), {})
            raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "seal", full)
        with pytest.raises(KeyError):
            train()
    assert checkpoint.whole_steps(tmp_path) == []
    _save(tmp_path, 3)
    assert _usable(tmp_path) == 3


def test_interrupted_wait_loses_nothing(tmp_path, monkeypatch):
    """Ctrl-C, or another signal's handler that raises, while a save is waited for."""
    seal = manifest.seal
    monkeypatch.setattr(manifest, "seal", lambda *where: (time.sleep(1), seal(*where)))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, _state(1), {"number": 1})
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert _usable(tmp_path) == 1


def test_closing_twice_leaves_the_next_writer_alone(tmp_path):
    first = checkpoint.Checkpoints(tmp_path)
    first.close()
    with checkpoint.Checkpoints(tmp_path):
        first.close()
        assert (tmp_path / ".incoming").exists()


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    for start in (checkpoint.Checkpoints, lambda path: checkpoint.lock(path).__enter__()):
        with pytest.raises(ResourceError, match="Not a directory"):
            start(tmp_path / "file" / "below")


def test_reading_writes_nothing(two_steps):
    _truncate(two_steps / "20" / "_CHECKPOINT_METADATA")

    def listing():
        found = [two_steps, *sorted(two_steps.rglob("*"))]
        return [(path, path.lstat().st_mtime_ns, path.lstat().st_size) for path in found]

    before = listing()
    assert checkpoint.whole_steps(two_steps) == [10]
    assert _usable(two_steps) == 10
    assert listing() == before


def test_reading_while_another_run_saves(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, _state(1), {"number": 1})
        checkpoints.wait()
        for number in range(2, 12):
            checkpoints.save(number, _state(number), {"number": number})
            assert checkpoint.find(tmp_path) in (number - 1, number)


def test_step_superseded_while_it_is_read(two_steps, tmp_path, monkeypatch, warnings):
    _save(tmp_path / "other", 30)
    problem = manifest.problem

    def supersede(folder, contents=True):
        if folder.name == "20":
            shutil.move(tmp_path / "other" / "30", two_steps / "30")
            for old in ("10", "20"):
                shutil.rmtree(two_steps / old)
        return problem(folder, contents)

    monkeypatch.setattr(manifest, "problem", supersede)
    assert _usable(two_steps) == 30
    assert warnings == []


def test_two_writers(commands, tmp_path, monkeypatch):
    program = _program("""
        with checkpoint.lock(sys.argv[1]):
            print("held", flush=True)
            checkpoint_test.time.sleep(60)
        """)
    holder = commands.start(*program, tmp_path / "run")
    try:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.chdir(tmp_path)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match="another run is writing to"), checkpoint.lock("run"):
            pass
        assert time.monotonic() - start < 2
    finally:
        holder.kill()
        holder.wait()
    with checkpoint.lock("run"), pytest.raises(CheckpointError), checkpoint.lock(tmp_path / "run"):
        pass
    with checkpoint.lock("run"):
        pass


SAVE_FOREVER = _program("""
with checkpoint.lock(sys.argv[1]), checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
    number = int(sys.argv[2])
    while True:
        number += 1
        checkpoints.save(number, checkpoint_test._state(number), {"number": number})
        print(number, flush=True)
""")


def test_killed_at_any_moment(commands, tmp_path, warnings):
    generator = random.Random(1)
    last = 0
    for _ in range(3):
        saver = commands.start(*SAVE_FOREVER, tmp_path, last)
        for line in saver.stdout:
            if int(line) >= last + 3:
                break
        time.sleep(generator.uniform(0, 0.15))
        saver.send_signal(signal.SIGKILL)
        started = max(map(int, [line, *saver.stdout.read().split()]))  # what it started to save last
        saver.wait()
        found = _usable(tmp_path)
        assert last < started - 2 <= found <= started + 1
        assert warnings == []  # no half step anywhere, not even in the way
        assert len(checkpoint.whole_steps(tmp_path)) in (2, 3)
        last = found
    with checkpoint.Checkpoints(tmp_path):
        pass
    assert not (tmp_path / ".incoming").exists()


def test_other_number_of_devices(commands, tmp_path):
    """Each restores what one with another number saved, on its first device, and saves from its last."""
    program = _program("""
        import jax, jax.numpy as jnp
        def state(step):
            return jax.tree.map(jnp.asarray, checkpoint_test._state(step))
        before, now = map(int, sys.argv[2:])
        assert jax.device_count() == now
        if before:
            restored = checkpoint.restore(sys.argv[1], before, state(0))
            assert checkpoint_test._bits(restored) == checkpoint_test._bits(state(before))
            assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(restored))
        with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(now, jax.device_put(state(now), jax.devices()[-1]), {})
        """)
    for before, now in ((0, 4), (4, 1), (1, 8)):
        commands.run(*program, tmp_path, before, now, devices=now)


def test_no_room_for_a_file(commands, tmp_path):
    """The limit on file size stands in for a full disk: the same path through Orbax, another number."""
    program = _program("""
        import resource, signal, numpy as np
        from ffl_jax import errors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        def save(step, wait=True):
            try:
                checkpoints.save(step, {"x": np.random.default_rng(step).random(300_000)}, {})
                checkpoints.wait() if wait else checkpoints.close()
            except errors.ResourceError as error:
                print(error)
        with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
            save(1)
            limit(1_000_000)
            save(2)
            save(3)
            print(checkpoint.find(sys.argv[1]))
            limit(resource.RLIM_INFINITY)
            save(4)
            limit(1_000_000)
            save(5, wait=False)
        print(checkpoint.whole_steps(sys.argv[1]))
        """)
    lines = commands.run(*program, tmp_path).stdout.splitlines()  # and no traceback of Orbax's threads
    assert len(lines) == 5
    for line in (lines[0], lines[1], lines[3]):
        assert str(tmp_path) in line
        assert "File too large" in line
    assert lines[2] == "1"
    assert lines[4] == "[1, 4]"
    restored = checkpoint.restore(tmp_path, checkpoint.find(tmp_path), {"x": np.zeros(300_000)})
    np.testing.assert_array_equal(restored["x"], np.random.default_rng(4).random(300_000))
    assert sorted(os.listdir(tmp_path)) == ["1", "4"]


def test_forgotten_close_saves_or_says_so(commands, tmp_path):
    program = _program("""
        checkpoints = checkpoint.Checkpoints(sys.argv[1])
        for number in (1, 2):
            checkpoints.save(number, checkpoint_test._state(number), {"number": number})
        """)
    _, errors = commands.start(*program, tmp_path).communicate(timeout=30)
    assert _usable(tmp_path) == (1 if "Checkpoints.close" in errors else 2)


def test_differences():
    same = {"seed": 1, "bad": float("nan")}
    stored = {"optimizer": {"learning_rate": 0.1, "steps": [1, 2]}, "old": {"a": 1}, **same}
    current = {"optimizer": {"learning_rate": 0.01, "steps": (1, 2)}, "new": None, **same}
    assert checkpoint.differences(stored, current) == [
        "new: absent in the checkpoint, null now",
        "old.a: 1 in the checkpoint, absent now",
        "optimizer.learning_rate: 0.1 in the checkpoint, 0.01 now",
    ]
    assert checkpoint.differences(stored, json.loads(json.dumps(stored))) == []
    assert checkpoint.differences({"x": {}}, {"x": {"y": "z"}}) == ['x.y: absent in the checkpoint, "z" now']
    assert checkpoint.differences({"x": {"y": 1}}, {"x": 2}) == ['x: {"y": 1} in the checkpoint, 2 now']
