import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs import cinic10
from ffl_jax import data
from ffl_jax.errors import DatasetError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def config(tmp_path):
    """The published tree with one image in every class; its red says the split, its green the class."""
    root = tmp_path / "CINIC-10"
    for number, split in enumerate(("train", "valid", "test")):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (number, label, 0)).save(folder / f"cifar10-{split}-{label}.png")
    config = ml_collections.ConfigDict(cinic10.get_config().data)
    config.update(data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    return config


def test_trains_on_train_and_tests_on_test(config):
    dataset = data.load(config)
    assert dataset.class_names == CLASSES
    for number, split in ((0, dataset.train), (2, dataset.test)):
        assert split.images.shape == (10, 32, 32, 3)
        np.testing.assert_array_equal(split.images[:, 0, 0, 0], np.full(10, number))
        np.testing.assert_array_equal(split.images[:, 0, 0, 1], split.labels)
        np.testing.assert_array_equal(split.labels, np.arange(10))


def test_another_tree_is_refused(config, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "CINIC-10" / split / "truck").rename(tmp_path / "CINIC-10" / split / "lorry")
    with pytest.raises(DatasetError, match=r"not CINIC-10: its classes are .*lorry.*10\.7488/ds/2448"):
        data.load(config)


def test_folder_is_required(config):
    config.data_dir = ""
    with pytest.raises(DatasetError, match=r"data_dir is not set: give the folder of CINIC-10; .*tar\.gz"):
        data.load(config)
