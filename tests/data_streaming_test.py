"""Streamed data: the same batches from anywhere with any number of workers, and real trainings on them."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest
from conftest import MAIN
from data_tfds_test import write_dataset
from PIL import Image

from configs import imagenet
from ffl_jax import data
from ffl_jax.data import resident, streaming
from ffl_jax.errors import ConfigError, DatasetError, ResourceError
from ffl_jax.training import loop, metrics
from ffl_jax.training.experiment import Experiment
from ffl_jax.workdir import checkpoint

TRAIN, TEST = 100, 33
BATCH = 40  # three steps an epoch, each of two pieces of 32 and 8 images; the last begins the order again


class Host:
    """In place of `Parallel`: batches stay on the host as they are."""

    def __init__(self, shares=1):
        self.shares = shares

    def place(self, tree, kind):
        return tree


def save_number(path, number, size=(24, 20)):
    """An image of one colour, (number, 255 - number, 7), so that any part of it says which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 255 - number, 7)).save(path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder tree of three classes; its images are numbered in the order in which they are listed."""
    root = tmp_path_factory.mktemp("tree")
    for split, count in (("train", TRAIN), ("val", TEST)):
        for number in range(count):
            name = f"{split}/{'abc'[3 * number // count]}/{number:03}.png"
            save_number(root / name, number, (20 + number % 7, 16 + number % 5))
    return root


def make_config(root, **settings):
    config = imagenet.get_config("method=independent")
    config.data.update(name="folder", data_dir=str(root), cache_dir=f"{root}_cache", image_size=8, workers=0)
    config.batch_size = BATCH
    for key, value in settings.items():
        (config.data if key in config.data else config)[key] = value
    return config


def train_batches(config, places, views=0, split=None):
    """The host's arrays of the batches (epoch, position) in `places`, consecutive ones from one stream."""
    inputs = data.train_input(split or data.load(config.data).train, config, Host(), views)
    batches, stream, following = [], None, None
    for place in places:
        if place != following or place[1] == 0:
            stream = inputs.batches(*place)
        batches.append(next(stream))
        epoch, position = place
        following = (epoch, position + 1) if position + 1 < inputs.steps_per_epoch else (epoch + 1, 0)
    inputs.close()
    return batches


TWO_EPOCHS = [(epoch, position) for epoch in range(2) for position in range(3)]


@pytest.fixture(scope="module")
def reference(tree):
    """Two epochs without workers."""
    return train_batches(make_config(tree), TWO_EPOCHS)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for array, other_array in zip(batch, other, strict=True):
            assert array.dtype == other_array.dtype
            np.testing.assert_array_equal(array, other_array)


def test_images_and_labels_belong_together(reference):
    """Any part of image i has the colour of i; of 100 images in three classes the first 34 are class 0."""
    for images, labels, indices in reference:
        assert images.shape == (BATCH, 8, 8, 3)
        assert (images.dtype, labels.dtype, indices.dtype) == (np.uint8, np.int32, np.int32)
        expected = np.stack([indices, 255 - indices, np.full(BATCH, 7)], axis=-1)
        np.testing.assert_array_equal(images, np.broadcast_to(expected[:, None, None], images.shape))
        np.testing.assert_array_equal(labels, 3 * indices // TRAIN)


def test_an_epoch_has_every_example_and_begins_again_to_fill_the_last_batch(reference):
    orders = [np.concatenate([batch[2] for batch in reference[first : first + 3]]) for first in (0, 3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order[:TRAIN]), np.arange(TRAIN))
        np.testing.assert_array_equal(order[TRAIN:], order[:20])
        # Ranks of independent permutations correlate by 1 / sqrt(99) = 0.1.
        assert abs(np.corrcoef(order[:TRAIN], np.arange(TRAIN))[0, 1]) < 0.4
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.4


@pytest.mark.parametrize("start", [1, 2, 3, 4, 5])
def test_starts_anywhere(tree, reference, start):
    assert_same(train_batches(make_config(tree), TWO_EPOCHS[start:]), reference[start:])


def test_workers_change_nothing_and_end(tree, reference):
    """The workers live on from epoch to epoch, are replaced where the place changes, and end with `close`."""
    config = make_config(tree, workers=2)
    inputs = data.train_input(data.load(config.data).train, config, Host())
    stream = inputs.batches(0, 1)
    first = [next(stream), next(stream)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    stream = inputs.batches(1, 0)
    assert_same([*first, *stream], reference[1:])
    assert multiprocessing.active_children() == workers
    assert_same([next(inputs.batches(0, 2))], reference[2:3])
    assert not set(multiprocessing.active_children()) & set(workers)
    inputs.close()
    inputs.close()  # again does no harm
    assert not multiprocessing.active_children()


def textured(root):
    """The same image of noise five times over: two crops are equal only where they are the same crop."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    for name in ("train/a/0", "train/b/1", "train/b/2", "test/a/0", "test/b/0"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


def test_crops_depend_on_seed_epoch_index_and_view_alone(tmp_path):
    config = make_config(textured(tmp_path), image_size=16, batch_size=3)

    def images(place, **settings):
        """{place in the split: its image} of an epoch's only batch."""
        config.update(settings)
        ((batch, _, indices),) = train_batches(config, [place])
        assert sorted(indices) == [0, 1, 2]
        return {index: batch[row].tobytes() for row, index in enumerate(indices)}

    epochs = [images((epoch, 0)) for epoch in range(3)] + [images((0, 0), seed=5)]
    assert len({one[index] for one in epochs for index in range(3)}) == 12
    config.seed = 0
    ((batch, _, indices),) = train_batches(config, [(0, 0)], views=3)
    assert batch.shape == (3, 3, 16, 16, 3)
    assert len({view.tobytes() for example in batch for view in example}) == 9
    # The first view is the crop that there is without views.
    assert {index: batch[row, 0].tobytes() for row, index in enumerate(indices)} == epochs[0]


def test_views_lead_in_the_step(tmp_path):
    """[B, K, …] from the host, where batches are split over devices, is [K, B, …] for the method."""
    config = make_config(textured(tmp_path), image_size=16, batch_size=3)
    inputs = data.train_input(data.load(config.data).train, config, Host(), 2)
    arrays = next(inputs.batches(0, 0))
    batch = inputs.batch(arrays, 0)
    mean, std = (np.array(config.data[key]) for key in ("mean", "std"))
    expected = (arrays[0].astype(np.float64).transpose(1, 0, 2, 3, 4) / 255 - mean) / std
    np.testing.assert_allclose(batch["image"], expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(batch["label"], arrays[1])


@pytest.mark.parametrize("views", [0, 2])
def test_padded_crops_are_those_of_data_in_memory(tmp_path, views):
    """Decoded by the workers, augmented on the device, with the same random numbers as there."""
    config = make_config(textured(tmp_path), image_size=16, batch_size=2, crop="pad", pad=3)
    inputs = data.train_input(data.load(config.data).train, config, Host(), views)
    stream = [*inputs.batches(0, 0), *inputs.batches(1, 0)]
    config.data.streaming = False
    split = data.load(config.data).train
    for step, (images, labels, indices) in enumerate(stream):
        assert images.shape == (2, 16, 16, 3)
        batch = inputs.batch((images, labels, indices), step)
        expected = resident.train_batch(
            split.images, split.labels, indices, config.seed, step // 2, config.data, views
        )
        jax.tree.map(np.testing.assert_array_equal, batch, expected)


def as_process(monkeypatch, index, count):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)


def test_processes_read_their_own_parts_of_the_same_batches(tree, reference, monkeypatch):
    config = make_config(tree)
    config.evaluation.batch_size = 8
    whole = list(data.eval_input(data.load(config.data).test, config, Host()).batches())
    trained, evaluated = [], []
    for index in range(2):
        as_process(monkeypatch, index, 2)
        trained.append(train_batches(config, TWO_EPOCHS[2:4]))
        evaluated.append(list(data.eval_input(data.load(config.data).test, config, Host()).batches()))
    for parts, expected in ((trained, reference[2:4]), (evaluated, whole)):
        joined = [
            tuple(map(np.concatenate, zip(first, second, strict=True)))
            for first, second in zip(*parts, strict=True)
        ]
        assert_same(joined, expected)
    as_process(monkeypatch, 0, 3)
    with pytest.raises(ConfigError, match="batch of 40 does not divide over 3 processes"):
        data.train_input(data.load(config.data).train, config, Host())


@pytest.mark.parametrize("devices", [1, 3])
def test_evaluation_counts_every_example_once(tree, devices):
    """All sizes of the split around a batch of 8, which 3 devices make 9."""
    config = make_config(tree)
    config.evaluation.batch_size = 8
    test = data.load(config.data).test
    for size in range(1, TEST + 1, 4 if devices > 1 else 1):
        split = test.take(np.arange(TEST) < size)
        inputs = data.eval_input(split, config, Host(devices))
        counts = np.zeros(size)
        for images, labels, weights in inputs.batches():
            assert len(images) % devices == 0
            numbers = images[weights == 1][:, 0, 0, 0]
            counts += np.bincount(numbers, minlength=size)
            np.testing.assert_array_equal(labels[weights == 1], 3 * numbers.astype(int) // TEST)
            assert not images[weights == 0].any()
        np.testing.assert_array_equal(counts, np.ones(size))


def test_evaluation_with_workers(tree):
    config = make_config(tree)
    config.evaluation.batch_size = 20
    inputs = data.eval_input(data.load(config.data).test, config, Host())
    expected = list(inputs.batches())
    config.data.workers = 5  # more than there are pieces
    assert_same(list(inputs.batches()), expected)
    assert not multiprocessing.active_children()
    normalized = inputs.batch(expected[0])
    mean, std = (np.array(config.data[key]) for key in ("mean", "std"))
    pixels = (expected[0][0].astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(normalized["image"], pixels, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(normalized["weight"], expected[0][2])


def test_validation_examples_are_those_of_data_in_memory(tree):
    config = make_config(tree, validation_examples=30)
    streamed = data.load(config.data)
    config.data.update(streaming=False, crop="pad")
    loaded = data.load(config.data)
    for split in ("train", "validation", "test"):
        numbers = getattr(loaded, split).images[:, 0, 0, 0]
        np.testing.assert_array_equal(getattr(streamed, split).positions, numbers)
    assert (len(streamed.train), len(streamed.validation)) == (70, 30)
    assert streamed.train.image_shape == loaded.train.image_shape == (8, 8, 3)
    assert streamed.class_names == loaded.class_names == ("a", "b", "c")


def test_fingerprint_sees_names_sizes_and_labels_but_no_pixels(tree, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(tree, root)

    def fingerprint(folder=root, **settings):
        return data.load(make_config(folder, **settings).data).fingerprint

    original = fingerprint(tree)
    assert fingerprint() == original  # a tree may be moved
    seen = {original, fingerprint(validation_examples=1)}
    image = root / "train/a/000.png"
    content = image.read_bytes()
    image.write_bytes(content[:-1] + b"x")
    assert fingerprint() == original  # what it cannot know without reading every file
    image.write_bytes(content + b"x")
    seen.add(fingerprint())
    image.write_bytes(content)
    assert fingerprint() == original
    image.rename(root / "train/a/0000.png")
    seen.add(fingerprint())
    (root / "train/a/0000.png").rename(root / "train/b/000.png")
    seen.add(fingerprint())
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"image_size": 0}, ConfigError, "set config.data.image_size"),
        ({"mean": (), "std": ()}, ConfigError, r"set config.data.mean and config.data.std"),
        ({"crop": "centre"}, ConfigError, "crop must be one of pad, resized, got 'centre'"),
        ({"streaming": False}, ConfigError, r"crop=resized .*streaming=True, or .*crop=pad"),
        ({"workers": -1}, ConfigError, "workers must be 0 or more, got -1"),
        ({"name": "digits"}, ConfigError, "digits is always held in memory"),
        ({"validation_examples": TRAIN}, DatasetError, "leaves nothing of the 100"),
    ],
)
def test_settings_that_do_not_go_together(tree, settings, error, message):
    with pytest.raises(error, match=message):
        data.load(make_config(tree, **settings).data)


def test_too_little_shared_memory_is_refused(tree, monkeypatch):
    """Seven pieces of 32 8x8 images, 6144 bytes each, for each of two workers: 86 kB."""
    config = make_config(tree, workers=2)
    inputs = data.train_input(data.load(config.data).train, config, Host())
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=80_000))
    with pytest.raises(ResourceError, match=r"2 workers need 0 MB.*config.data.workers to 1 "):
        next(inputs.batches(0, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_damaged_while_training_is_named(tree, tmp_path, workers):
    root = tmp_path / "copy"
    shutil.copytree(tree, root)
    config = make_config(root, workers=workers)
    split = data.load(config.data).train
    bad = root / "train/b/050.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(DatasetError, match=f"{bad} cannot be decoded: .*; replace or remove") as caught:
        train_batches(config, TWO_EPOCHS[:3], split=split)
    assert "\n" not in str(caught.value)
    if not workers:
        bad.unlink()
        with pytest.raises(DatasetError, match=f"Cannot read {bad}: No such file"):
            train_batches(config, TWO_EPOCHS[:3], split=split)


def test_a_killed_worker_ends_the_run(tree):
    config = make_config(tree, workers=1)
    inputs = data.train_input(data.load(config.data).train, config, Host())
    next(inputs.batches(0, 0))
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)  # a scheduler's, to every process: only the run itself may act on it
    os.kill(worker.pid, signal.SIGINT)
    list(inputs.batches(0, 1))
    assert multiprocessing.active_children() == [worker]
    os.kill(worker.pid, signal.SIGKILL)
    following = (batch for epoch in range(1, 100) for batch in inputs.batches(epoch, 0))
    with pytest.raises(ResourceError, match="was killed"):
        list(following)
    inputs.close()
    assert not multiprocessing.active_children()


def write_photographs(root):
    """A prepared TFDS dataset like imagenet2012: JPEGs of differing sizes, test records without labels."""
    rng = np.random.default_rng(0)

    def shard(count, labels):
        sizes = rng.integers(64, 120, (count, 2))
        return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes], labels

    splits = {
        "train": [shard(7, np.arange(7) % 3), shard(4, np.arange(4) % 3)],
        "validation": [shard(7, np.arange(7) % 3)],
        "test": [shard(2, np.full(2, -1))],
    }
    write_dataset(root / "made" / "1.0.0", splits, encoding="JPEG")


def test_imagenet_is_trained_and_continues_in_mid_epoch(tmp_path, monkeypatch):
    """Three steps of the real loop, and the last of them again from what a kill in it would have left."""
    write_photographs(tmp_path)
    config = imagenet.get_config("method=independent,epochs=1")
    config.data.update(name="made", data_dir=str(tmp_path), image_size=64, workers=0)
    config.subnetworks.num = 1
    config.update(batch_size=4, log_every_steps=1)
    config.checkpoint.update(every_steps=2, keep=2)
    config.evaluation.batch_size = 4
    assert config.subnetworks.network == "resnet18"
    config.subnetworks.network = "tiny"  # compiles in no time
    counts = []
    scores = metrics.classification_scores
    monkeypatch.setattr(
        metrics, "classification_scores", lambda sums: counts.append(float(sums["count"])) or scores(sums)
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    summary = loop.train(config, whole)
    assert summary["status"] == "completed"
    # Three lines of the log for 4 images each, then 7 of validation in two batches.
    assert counts == [4] * 3 + [7]

    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "3")
    assert checkpoint.whole_steps(killed / "checkpoints") == [2]
    again = loop.train(config, killed)
    assert counts[4:] == [4, 7]
    assert again["predictors"] == summary["predictors"]
    logs = [(workdir / "metrics.jsonl").read_text() for workdir in (whole, killed)]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [1, 2, 3, 3]
    experiment = Experiment(config, data.load(config.data))
    states = [
        checkpoint.restore(workdir / "checkpoints", 3, experiment.abstract_state())
        for workdir in (whole, killed)
    ]
    leaves, expected = (jax.tree.leaves(state.replace(rng=0)) for state in states)
    assert len(leaves) == len(expected) > 30
    for leaf, other in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(leaf, other)


def worker_ids(process):
    """Process ids of a run's children that are data workers."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rsplit(")", 1)[1].split()
            command = path.with_name("cmdline").read_text()
            if int(fields[1]) == process.pid and fields[0] != "Z" and "spawn_main" in command:
                found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_workers_of_a_command_end_with_it(tree, commands, tmp_path):
    """Stopped by a signal to every process, killed, and refused because of a damaged image."""
    root = tmp_path / "images"
    shutil.copytree(tree, root)
    arguments = (*MAIN, "--config=configs/imagenet.py:method=independent,network=tiny")
    arguments += (
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={root}",
        "--config.data.name=folder",
    )
    arguments += ("--config.data.image_size=8", "--config.data.workers=1", "--config.subnetworks.num=1")
    arguments += (f"--config.batch_size={BATCH}", "--config.epochs=1000", "--config.log_every_steps=1")
    arguments += ("--config.evaluation.every_epochs=1000",)
    log = tmp_path / "run" / "metrics.jsonl"

    def start():
        """A run that has trained, and its workers."""
        begun = log.stat().st_size if log.exists() else 0
        process = commands.start(*arguments)
        wait_until(lambda: process.poll() is not None or (log.exists() and log.stat().st_size > begun))
        assert process.poll() is None, process.communicate()
        return process, worker_ids(process)

    process, workers = start()
    assert len(workers) == 1
    for pid in (*workers, process.pid):
        os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: stopped by SIGTERM"), errors
    assert not [pid for pid in workers if pathlib.Path(f"/proc/{pid}").exists()]

    process, workers = start()
    process.kill()
    process.communicate()
    wait_until(lambda: not [pid for pid in workers if pathlib.Path(f"/proc/{pid}").exists()])

    bad = root / "train/b/050.png"
    bad.write_bytes(bytes(bad.stat().st_size))  # its size does not tell
    result = commands.run(*arguments, code=3)
    assert f"{bad} cannot be decoded" in result.stderr.splitlines()[-1]
