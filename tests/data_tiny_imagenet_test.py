import shutil

import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs import tiny_imagenet
from ffl_jax import data
from ffl_jax.errors import DatasetError

# As published, wnids.txt is not sorted, words.txt names many more classes, and some have the same words.
WNIDS = ("n02012849", "n01443537", "n03126707")
WORDS = {
    "n01443537": "goldfish, Carassius auratus",
    "n02012849": "crane",
    "n03126707": "crane",
    "n1": "other",
}


def save(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (64, 64), grey).save(path, quality=100)


@pytest.fixture
def root(tmp_path):
    """Two training images of each class and four of val, which are not in the order of their classes."""
    root = tmp_path / "tiny-imagenet-200"
    for number, wnid in enumerate(WNIDS):
        for index in range(2):
            save(root / f"train/{wnid}/images/{wnid}_{index}.JPEG", 100 * number + index)
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    (root / "words.txt").write_text("".join(f"{wnid}\t{words}\n" for wnid, words in WORDS.items()))
    lines = []
    for index, number in enumerate((2, 0, 1, 2)):
        save(root / f"val/images/val_{index}.JPEG", 60 + number)
        lines.append(f"val_{index}.JPEG\t{WNIDS[number]}\t0\t0\t62\t62\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    save(root / "test/images/test_0.JPEG", 0)
    return root


@pytest.fixture
def config(root, tmp_path):
    config = ml_collections.ConfigDict(tiny_imagenet.get_config().data)
    config.update(data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    return config


def test_tiny_imagenet(config):
    """Classes are n01443537 (the second of wnids.txt), n02012849 (the first), n03126707 (the third)."""
    dataset = data.load(config)
    assert dataset.class_names == ("goldfish, Carassius auratus", "crane (n02012849)", "crane (n03126707)")
    assert dataset.train.image_shape == dataset.test.image_shape == (64, 64, 3)
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(dataset.train.images[:, 32, 32, 0], [100, 101, 0, 1, 200, 201])
    np.testing.assert_array_equal(dataset.test.labels, [2, 1, 0, 2])
    np.testing.assert_array_equal(dataset.test.images[:, 32, 32, 1], [62, 60, 61, 62])


@pytest.mark.parametrize("inside", ["", "images"])
@pytest.mark.parametrize("published", ["gone", "empty", "kept"])
def test_val_sorted_into_classes(root, config, inside, published):
    """As many scripts do; the labels are the same, in the order of the classes."""
    for index, number in enumerate((2, 0, 1, 2)):
        folder = root / "val" / WNIDS[number] / inside
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / f"val/images/val_{index}.JPEG", folder)
    if published != "kept":
        (root / "val/val_annotations.txt").unlink()
        shutil.rmtree(root / "val/images")
    if published == "empty":
        (root / "val/images").mkdir()
    dataset = data.load(config)
    np.testing.assert_array_equal(dataset.test.labels, [0, 1, 2, 2])
    np.testing.assert_array_equal(dataset.test.images[:, 32, 32, 1], [61, 60, 62, 62])


def test_streamed(config):
    config.update(streaming=True, image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    records = data.load(config).test.records
    assert [label for _, _, label in records.read(range(4))] == [2, 1, 0, 2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no wnids.txt", r"has no .*wnids\.txt; it must hold what tiny-imagenet-200\.zip"),
        ("val in class folders", r"has no .*val_annotations\.txt.*config\.data\.name=folder"),
        ("no annotation", r"val_annotations\.txt gives no class of wnids\.txt to val_3\.JPEG; unpack"),
        ("unknown class", r"gives no class of wnids\.txt to val_0\.JPEG, val_3\.JPEG"),
        ("no class folder", r"Cannot read .*n03126707/images: No such file or directory"),
        ("not text", r"Cannot read .*words\.txt"),
    ],
)
def test_damaged_trees(root, config, damage, message):
    annotations = root / "val/val_annotations.txt"
    if damage == "no wnids.txt":
        (root / "wnids.txt").unlink()
    elif damage == "val in class folders":
        annotations.unlink()
    elif damage == "no annotation":
        annotations.write_text("".join(annotations.read_text().splitlines(keepends=True)[:-1]))
    elif damage == "unknown class":
        annotations.write_text(annotations.read_text().replace("n03126707", "n9"))
    elif damage == "no class folder":
        (root / "train/n03126707/images").rename(root / "train/n03126707/pictures")
    else:
        (root / "words.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match=message) as caught:
        data.load(config)
    assert "\n" not in str(caught.value)
