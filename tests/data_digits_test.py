import subprocess
import sys

import ml_collections
import numpy as np

from ffl_jax import data

CONFIG = ml_collections.ConfigDict(
    {
        "name": "digits",
        "data_dir": "",
        "manual_dir": "",
        "cache_dir": "",
        "validation_examples": 0,
        "validation_fraction": 0.0,
        "test_fraction": 0.0,
        "image_size": 0,
        "max_value": 65535,
        "streaming": False,
        "workers": 0,
        "crop": "pad",
        "mean": (),
    }
)


def test_digits():
    dataset = data.load(CONFIG)
    assert dataset.train.images.shape == (1437, 8, 8, 3)
    assert dataset.test.images.shape == (360, 8, 8, 3)
    assert dataset.class_names == tuple("0123456789")
    # Class counts of the 1797 UCI test digits; a fifth of each, to within one.
    totals = np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    test = np.bincount(dataset.test.labels)
    np.testing.assert_array_equal(np.bincount(dataset.train.labels) + test, totals)
    assert np.abs(test - totals / 5).max() < 1
    # By hand: the first image, the first 0 and so in the test split, starts 0 0 5 13 9 1 0 0 of 16.
    np.testing.assert_array_equal(dataset.test.images[0, 0, :, 0], [0, 0, 80, 207, 143, 16, 0, 0])
    np.testing.assert_array_equal(dataset.test.images[..., 0], dataset.test.images[..., 2])
    assert dataset.train.images.max() == 255


def test_digits_are_all_there_once():
    from sklearn import datasets  # here, for the test below

    dataset = data.load(CONFIG)
    images = np.concatenate([dataset.train.images, dataset.test.images])[..., 0].reshape(-1, 64)
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    raw = datasets.load_digits()
    expected = sorted(
        (*np.rint(x * 255 / 16).astype(int), y) for x, y in zip(raw.data, raw.target, strict=True)
    )
    assert sorted((*map(int, x), int(y)) for x, y in zip(images, labels, strict=True)) == expected


def test_data_is_loaded_without_what_is_slow_to_import():
    code = (
        "import sys, test_config; from ffl_jax import data; data.load(test_config.CONFIG); "
        "assert not {'jax', 'tensorflow', 'sklearn'} & set(sys.modules)"
    ).replace("test_config", "data_digits_test")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join([*sys.path])})
