import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
from conftest import data_section
from PIL import Image

from ffl_jax import data
from ffl_jax.data import base, limits
from ffl_jax.errors import ConfigError, DatasetError, ResourceError
from ffl_jax.training import config as config_lib
from ffl_jax.training.defaults import every_key

RNG = np.random.default_rng(0)


def pixels(count, *shape, dtype=np.uint8):
    return RNG.integers(0, 256, (count, *shape), dtype)


def medmnist(labels=lambda count: (np.arange(count) % 3)[:, None].astype(np.uint8), shape=(8, 8)):
    """As MedMNIST's files: labels [N, 1]."""
    counts = {"train": 9, "val": 6, "test": 3}
    return {f"{split}_images": pixels(count, *shape) for split, count in counts.items()} | {
        f"{split}_labels": labels(count) for split, count in counts.items()
    }


def write(path, arrays):
    np.savez_compressed(path, **arrays)
    return path


def load(path, **settings):
    return data.load(data_section(name="folder", data_dir=str(path), **settings))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (6, 9)])
def test_medmnist(tmp_path, shape, caplog):
    caplog.set_level("INFO")
    arrays = medmnist(shape=shape)
    dataset = load(write(tmp_path / "path.npz", arrays))
    assert dataset.class_names == ("0", "1", "2")
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        found = getattr(dataset, split)
        expected = arrays[f"{name}_images"]
        expected = expected if shape[2:] == (3,) else expected.reshape(-1, *shape[:2], 1).repeat(3, -1)
        np.testing.assert_array_equal(found.images, expected)
        np.testing.assert_array_equal(found.labels, arrays[f"{name}_labels"][:, 0])
    assert f"The validation split is {tmp_path}/path.npz/val." in caplog.text


def test_keras_names_and_labels_of_any_numbers_or_texts(tmp_path):
    """Numbers are sorted by value, texts by their characters; 2 has no image."""
    for labels, names in (
        ([10, 1, 3, 1], ("1", "3", "10")),
        (["b", "B", "ä", "B"], ("B", "b", "ä")),
        ([True, False, True, True], ("False", "True")),
    ):
        known = sorted(set(labels))
        arrays = {"X_train": pixels(4, 8, 8, 3), "y_train": np.array(labels)}
        arrays |= {"x_test": pixels(len(known), 8, 8, 3), "y_test": np.array(known)}
        dataset = load(write(tmp_path / "keras.npz", arrays))
        assert dataset.class_names == names
        np.testing.assert_array_equal(dataset.train.labels, [known.index(label) for label in labels])


def test_image_size_and_max_value(tmp_path, caplog):
    caplog.set_level("INFO")
    grey = np.uint16([[[0, 4095], [2048, 16]]] * 4)  # of 12 bits
    arrays = {"train_images": grey, "train_labels": [0, 1, 0, 1]}
    arrays |= {"test_images": grey, "test_labels": [0, 1, 0, 1]}
    path = write(tmp_path / "grey.npz", arrays)
    # value * 255 / 4095 and / 65535, rounded by hand
    for settings, expected in (({"max_value": 4095}, [[0, 255], [128, 1]]), ({}, [[0, 16], [8, 0]])):
        np.testing.assert_array_equal(load(path, **settings).train.images[0, ..., 1], expected)
    with pytest.raises(DatasetError, match=r"outside 0\.\.4094, from 0 to 4095, and config\.data\.max_value"):
        load(path, max_value=4094)
    arrays = medmnist(shape=(8, 8, 3))
    resized = load(write(tmp_path / "path.npz", arrays), image_size=4).train.images
    expected = Image.fromarray(arrays["train_images"][1]).resize((4, 4), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized[1], np.asarray(expected))
    assert "is brought from 8x8 to 4x4 pixels" in caplog.text


def test_splits_of_training_images_alone(tmp_path):
    arrays = {"train_images": pixels(30, 8, 8), "train_labels": np.arange(30) % 3}
    path = write(tmp_path / "alone.npz", arrays)
    with pytest.raises(DatasetError, match=r"set config\.data\.test_fraction to split train"):
        load(path)
    dataset = load(path, test_fraction=0.2, validation_fraction=0.25)
    for split, each in (("train", 6), ("validation", 2), ("test", 2)):
        np.testing.assert_array_equal(np.bincount(getattr(dataset, split).labels), [each] * 3)
    assert dataset.fingerprint != load(path, test_fraction=0.2).fingerprint
    with pytest.raises(
        ConfigError, match=r"test_fraction=0\.2 takes a test split .* has test, val: set it to 0"
    ):
        load(write(tmp_path / "path.npz", medmnist()), test_fraction=0.2)


def test_val_stands_in_for_test_images_without_labels(tmp_path, caplog):
    caplog.set_level("INFO")
    arrays = medmnist()
    del arrays["test_labels"]
    path = write(tmp_path / "path.npz", arrays)
    np.testing.assert_array_equal(load(path).test.labels, arrays["val_labels"][:, 0])
    assert f"Arrays of {path} that are not used: test_images." in caplog.text
    assert f"The test split is {path}/val" in caplog.text


def test_title_is_the_files_name(tmp_path):
    config = every_key("independent")
    for place, title in (("pathmnist.npz", "pathmnist"), ("photos.v2", "photos.v2"), ("a/b.csv", "b")):
        config.data.update(name="folder", data_dir=str(tmp_path / place))
        assert config_lib.dataset_title(config) == title


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('it was run')",)


def objects(path):
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|O", "fortran_order": False, "shape": (3,)})
    np.savez(path, **medmnist())
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    content["test_labels.npy"] = array.getvalue() + pickle.dumps(Malicious())
    members(path, content)


def members(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in content.items():
            file.writestr(name, data)


def claiming(path, shape=(10**9, 10**9), rest=b"\0" * 1000):
    """A file whose training images say that they are as large as they are not."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    np.savez(path, **medmnist())
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    members(path, content | {"train_images.npy": head.getvalue() + rest})


def long_header(path):
    head = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b" " * 100
    members(
        path, {f"{split}_{kind}.npy": head for split in ("train", "test") for kind in ("images", "labels")}
    )


def flipped(path):
    np.savez(path, **medmnist())
    content = bytearray(path.read_bytes())
    content[content.index(b"train_images") + 200] ^= 1
    path.write_bytes(content)


def change(**arrays):
    return lambda path: np.savez(path, **(medmnist() | arrays))


FAULTS = {
    "pickled": (objects, r"test_labels of .* holds pickled objects, which could run anything"),
    "too large by its header": (claiming, "train_images of .* is not as large as it says"),
    "negative": (lambda path: claiming(path, (-1, 8)), "not as large|must be uint8|cannot be read"),
    "long header": (long_header, "cannot be read"),
    "flipped bit": (flipped, r"cannot be read: .*CRC"),
    "no archive": (lambda path: path.write_bytes(b"hello"), "cannot be read: File is not a zip file"),
    "empty": (lambda path: path.touch(), "cannot be read"),
    "no file": (lambda path: None, "does not exist"),
    "other names": (
        lambda path: np.savez(path, data=pixels(3, 8, 8)),
        r"has no train_images and train_labels or x_train and y_train: it has data",
    ),
    "no labels": (
        lambda path: np.savez(path, train_images=pixels(3, 8, 8)),
        "has train_images, but of train_images and train_labels both are needed",
    ),
    "several labels": (
        change(train_labels=np.eye(14, dtype=np.uint8)[:9]),
        r"train_labels of .* has 14 values for each image \(several labels, or one-hot\): one",
    ),
    "fractions": (change(train_images=np.ones((9, 8, 8))), r"float64 \[9, 8, 8\]: images must be uint8"),
    "channels first": (change(test_images=pixels(3, 3, 8, 8)), r"Channels come last: array.transpose"),
    "flat": (change(test_images=pixels(3, 64)), r"uint8 \[3, 64\]: images must be"),
    "volumes": (change(test_images=pixels(3, 8, 8, 8)), r"uint8 \[3, 8, 8, 8\]: images must be"),
    "no pixels": (change(test_images=pixels(3, 0, 8)), "has 8x0 pixels"),
    "labels with fractions": (change(test_labels=np.ones(3)), "float64.*must be whole numbers or texts"),
    "too few labels": (change(test_labels=np.arange(2)), "one for each of the 3 images"),
    "other labels": (change(test_labels=np.array(["0", "1", "x"])), "only in train: 2; only in test: x"),
    "unknown class": (change(test_labels=np.arange(3) + 1), "only in train: 0; only in test: 3"),
    "no image": (change(train_images=pixels(0, 8, 8), train_labels=np.arange(0)), "0 class|only in test"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line(tmp_path, fault):
    make, words = FAULTS[fault]
    path = tmp_path / "made.npz"
    make(path)
    with pytest.raises(DatasetError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_come_before_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "path.npz", medmnist())
    monkeypatch.setattr(base.os, "sysconf", lambda name: 10)
    with pytest.raises(ResourceError, match=r"needs 0\.0 GB of memory, and this machine has 0\.0 GB"):
        load(path)
    monkeypatch.undo()
    monkeypatch.setattr(limits, "MAX_ARRAY_BYTES", 100)
    with pytest.raises(DatasetError, match=r"has 0\.0 GB, and at most 0\.0 GB are read"):
        load(path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"path\.npz is always held in memory"):
        load(path, streaming=True, image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_classes_without_test_images(tmp_path, caplog):
    path = tmp_path / "made.npz"
    change(test_labels=np.zeros(3, int))(path)
    with pytest.raises(DatasetError, match=r"only in train: 1, 2; .* set config\.data\.missing_classes=True"):
        load(path)
    assert load(path, missing_classes=True).class_names == ("0", "1", "2")
    assert "without an image in test: 1, 2." in caplog.text
