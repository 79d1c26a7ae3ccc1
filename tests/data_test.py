import dataclasses
import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import data_section

from ffl_jax import data, doctor
from ffl_jax.data import base, cache
from ffl_jax.errors import ConfigError, DatasetError


def make_config(**settings):
    return data_section(**{"name": "made"} | settings)


@pytest.fixture
def source(monkeypatch):
    """A registered source `made`: change its parts, then load it."""
    rng = np.random.default_rng(1)
    parts = {
        "train": base.Split(rng.integers(0, 256, (20, 4, 5, 3), np.uint8), np.arange(20) % 3),
        "test": base.Split(rng.integers(0, 256, (6, 4, 5, 3), np.uint8), np.arange(6) % 3),
        "class_names": ("ant", "bee", "cat"),
    }
    monkeypatch.setitem(base.SOURCES, "made", lambda config: tuple(parts.values()))
    return parts


def replace(source, split, **changes):
    source[split] = dataclasses.replace(source[split], **changes)


def test_load_keeps_images_and_labels(source):
    dataset = data.load(make_config())
    np.testing.assert_array_equal(dataset.train.images, source["train"].images)
    np.testing.assert_array_equal(dataset.test.labels, [0, 1, 2, 0, 1, 2])
    assert dataset.train.labels.dtype == np.int32
    assert (dataset.name, dataset.class_names) == ("made", ("ant", "bee", "cat"))
    assert dataset.validation is None


def test_validation_examples_are_carved_from_train_and_always_the_same(source):
    replace(
        source,
        "train",
        images=np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((4, 5, 3), np.uint8),
    )
    replace(source, "train", labels=np.arange(20) // 7)
    first, second = (data.load(make_config(validation_examples=6)) for _ in range(2))
    np.testing.assert_array_equal(first.validation.images, second.validation.images)
    train, validation = (split.images[:, 0, 0, 0] for split in (first.train, first.validation))
    assert len(validation) == 6
    assert sorted([*train, *validation]) == list(range(20))
    np.testing.assert_array_equal(first.validation.labels, validation // 7)
    np.testing.assert_array_equal(first.train.labels, train // 7)
    assert len(first.test.labels) == 6


def test_fingerprint_sees_every_change(source):
    seen = {data.load(make_config()).fingerprint}
    assert data.load(make_config()).fingerprint in seen
    seen.add(data.load(make_config(validation_examples=1)).fingerprint)
    for split in ("train", "test"):
        original = source[split]
        images, labels = original.images.copy(), original.labels.copy()
        images[-1, -1, -1, -1] ^= 1
        replace(source, split, images=images)
        seen.add(data.load(make_config()).fingerprint)
        labels[0] = 2
        source[split] = base.Split(original.images, labels)
        seen.add(data.load(make_config()).fingerprint)
        source[split] = original
    source["class_names"] = ("an", "tbee", "cat")
    seen.add(data.load(make_config()).fingerprint)
    assert len(seen) == 7
    assert all(len(fingerprint) == 64 for fingerprint in seen)


@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        ("train", {"labels": np.array([0] * 7 + [-1] + [0] * 12)}, r"label -1 at index 7 of train.*0 \.\. 2"),
        ("test", {"labels": np.array([0, 1, 2, 3, 3, 0])}, r"label 3 at index 3 of test.*2 such labels"),
        ("train", {"labels": np.zeros(20)}, "train labels must be integers.*float64"),
        ("train", {"labels": np.zeros(19, int)}, r"train labels.*\[19\]"),
        ("train", {"images": np.zeros((20, 4, 5), np.uint8)}, r"train images must be uint8.*\[20, 4, 5\]"),
        ("test", {"images": np.zeros((6, 4, 5, 3))}, "test images must be uint8.*float64"),
        ("test", {"images": np.zeros((6, 4, 4, 3), np.uint8)}, r"\(4, 5, 3\).*\(4, 4, 3\).*image_size"),
        (
            "test",
            {"images": np.zeros((0, 4, 5, 3), np.uint8), "labels": np.zeros(0, int)},
            "test split is empty",
        ),
    ],
)
def test_bad_arrays_are_dataset_errors(source, split, changes, message):
    replace(source, split, **changes)
    with pytest.raises(DatasetError, match=message):
        data.load(make_config())


def test_one_class_is_refused(source):
    source["class_names"] = ("ant",)
    with pytest.raises(DatasetError, match=r"has 1 class \(ant\)"):
        data.load(make_config())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"validation_examples": -1}, ConfigError, "validation_examples must be 0 or more, got -1"),
        ({"image_size": -8}, ConfigError, "image_size must be 0 or more, got -8"),
        ({"name": "digits", "image_size": 32}, ConfigError, "image_size=32 does not apply to digits"),
        ({"validation_examples": 20}, DatasetError, "leaves nothing of the 20 training examples"),
        ({"name": "cifar11"}, ConfigError, "'cifar11'.*digits, fashion_mnist, folder.*nearest are.*cifar10"),
        ({"name": "digitz"}, ConfigError, "nearest are digits"),
        ({"name": "fashion_mnist/blue"}, ConfigError, "fashion_mnist/blue.*not found"),
        ({"name": "fashion_mnist:9.9.9"}, ConfigError, r"9\.9\.9"),
        ({"name": "../cifar10"}, ConfigError, "'../cifar10' is not a dataset name"),
    ],
)
def test_bad_settings(source, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        data.load(make_config(data_dir=str(tmp_path), **settings))


class Counter:
    """Builds the same arrays and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"a": np.arange(1000, dtype=np.uint8).reshape(10, 100), "b": np.array([3, 4], np.int32)}


def test_cache_builds_once_for_each_source(tmp_path):
    build = Counter()
    built = cache.cached("set/config:1", "source", str(tmp_path), build)
    read = cache.cached("set/config:1", "source", str(tmp_path), build)
    assert build.calls == 1
    np.testing.assert_equal(read, built)
    cache.cached("set/config:1", "changed source", str(tmp_path), build)
    assert build.calls == 2
    assert len(list(tmp_path.iterdir())) == 2  # and no temporary file is left


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "text", "other source"])
def test_damaged_cache_is_built_again(tmp_path, damage, caplog):
    build = Counter()
    expected = cache.cached("set", "source", str(tmp_path), build)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[content.index(bytes(range(50, 60)))] ^= 1
    elif damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "other source":  # an intact file under the wrong name
        cache.cached("set", "other", str(tmp_path), lambda: {"a": np.zeros(3)})
        (other,) = set(tmp_path.iterdir()) - {path}
        content = other.read_bytes()
    else:
        content = {"empty": b"", "text": b"not an archive"}[damage]
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_equal(cache.cached("set", "source", str(tmp_path), build), expected)
    assert build.calls == 2
    assert f"{path} is damaged" in caplog.text
    cache.cached("set", "source", str(tmp_path), build)
    assert build.calls == 2


def test_cache_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        arrays = cache.cached("set", "source", str(tmp_path / "file" / "cache"), Counter())
    assert sorted(arrays) == ["a", "b"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "config.data.cache_dir" in caplog.text


def test_cache_on_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with caplog.at_level(logging.WARNING):
        cache.cached("set", "source", str(tmp_path), Counter())
    assert "No space left on device" in caplog.text
    assert not list(tmp_path.iterdir())


def fill(folder, *names, size=1000):
    """Cache files of so many bytes of pixels, the first used an hour before the second and so on."""
    paths = []
    for age, name in enumerate(reversed(names)):
        cache.cached(name, name, str(folder), lambda: {"a": np.zeros(size, np.uint8)})
        (path,) = folder.glob(f"{name}-*.npz")
        used = time.time() - 3600 * (age + 1)
        os.utime(path, (used, used))
        paths.insert(0, path)
    forget()
    return paths


def forget():
    """As at the end of a process that has used the cache."""
    while cache._in_use:
        cache._in_use.pop().close()


def test_the_cache_has_a_bound_and_what_is_used_least_goes(tmp_path):
    first, second, third = fill(tmp_path, "first", "second", "third")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "mine.npz").touch()
    each = first.stat().st_size / 1e9
    cache.cached("first", "first", str(tmp_path), Counter())  # read, and so used last
    forget()
    cache.cached("fourth", "fourth", str(tmp_path), lambda: {"a": np.zeros(1000, np.uint8)}, 3.1 * each)
    assert first.exists()
    assert not second.exists()
    assert third.exists()
    (fourth,) = tmp_path.glob("fourth-*.npz")
    assert [one.path for one in cache.entries(tmp_path)] == [fourth, first, third]
    assert {path.name for path in tmp_path.iterdir()} > {"downloads", "mine.npz"}


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path, caplog):
    (first,) = fill(tmp_path, "first")
    cache.cached("second", "second", str(tmp_path), Counter(), 1e-7)
    assert list(tmp_path.iterdir()) == [first]
    assert "config.data.cache_gigabytes=1e-07" in caplog.text
    caplog.clear()
    cache.cached("second", "second", str(tmp_path), Counter(), 0.0)
    assert not caplog.records


@pytest.mark.parametrize("read", [False, True])
def test_what_a_running_program_has_loaded_stays(tmp_path, read):
    """Another process, until it ends, however it does."""
    if read:
        fill(tmp_path, "first")
    script = (
        "import sys, numpy as np; from ffl_jax.data import cache; "
        f"cache.cached('first', 'first', {str(tmp_path)!r}, lambda: {{'a': np.zeros(1000, np.uint8)}}); "
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment) as process:
        process.stdout.readline()
        assert not cache.prune(tmp_path, 0.0)
        (entry,) = cache.entries(tmp_path)
        assert entry.in_use
        assert str(entry).endswith(", in use")
        process.kill()
    assert [one.path for one in cache.prune(tmp_path, 0.0)] == [entry.path]
    assert not list(tmp_path.iterdir())


def test_unfinished_files_go_once_nobody_writes_them(tmp_path):
    (path,) = fill(tmp_path, "first")
    old, new = (path.with_suffix(f".{character * 32}.tmp") for character in "ab")
    for one in (old, new):
        one.touch()
    os.utime(old, (0, 0))
    assert [one.path for one in cache.prune(tmp_path, 50.0)] == [old]


def test_the_doctor_lists_and_prunes_the_cache(tmp_path, capsys):
    first, second = fill(tmp_path, "first", "second", size=10**6)
    argv = ["doctor", f"--config.data.cache_dir={tmp_path}"]
    doctor.command([*argv, "--cache"])
    lines = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}: 2 files, 0.002 GB of at most 50" in lines[0]
    assert [line.split()[1] for line in lines[1:]] == [f"{second.name}:", f"{first.name}:"]
    doctor.command([*argv, "--prune_cache=0.0015"])
    assert "removed:" in (text := capsys.readouterr().out)
    assert first.name in text
    assert list(tmp_path.iterdir()) == [second]
