import importlib.util
import io
import json
import pickle
import resource
import shutil
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from conftest import data_section
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from ffl_jax import data
from ffl_jax.data import tfds as tfds_source
from ffl_jax.errors import ConfigError, DatasetError, ResourceError


def make_config(root, **settings):
    return data_section(**{"name": "made", "data_dir": str(root), "cache_dir": f"{root}/cache"} | settings)


def examples(count, channels=3, size=(5, 4), seed=0):
    """Random images [count, H, W, channels] and labels 0, 1, 2, 0, ..."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *size, channels), np.uint8), np.arange(count) % 3


def write_records(path, images, labels, encoding="PNG"):
    """One shard, as TFDS writes it, with features more than are read; `other` is another label."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for image, label in zip(images, labels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, encoding)
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(buffer.getvalue())
        example.features.feature["label"].int64_list.value.append(int(label))
        example.features.feature["other"].int64_list.value.append(int(label + 1) % 3)
        example.features.feature["id"].bytes_list.value.append(b"an id")
        writer.write(example.SerializeToString())
    writer.close()


FEATURES = {
    "image": tfds.features.Image(shape=(None, None, None)),
    "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
    "id": tfds.features.Text(),
}


def write_dataset(
    folder,
    splits,
    features=FEATURES,
    supervised=True,
    file_format="array_record",
    name="made",
    encoding="PNG",
):
    """Writes a prepared dataset; splits is {name: [(images, labels) of each shard]}."""
    folder.mkdir(parents=True)
    dictionary = tfds.features.FeaturesDict(features)
    (folder / "features.json").write_text(json.dumps(dictionary.to_json()))
    dictionary.save_metadata(folder, feature_name=None)
    info = {"name": name, "version": folder.name, "fileFormat": file_format, "splits": []}
    if supervised:
        info["supervisedKeys"] = {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}}
    for split, shards in splits.items():
        for i, (images, labels) in enumerate(shards):
            path = folder / f"{name}-{split}.{file_format}-{i:05}-of-{len(shards):05}"
            write_records(path, images, labels, encoding)
        info["splits"].append(
            {
                "name": split,
                "shardLengths": [str(len(labels)) for _, labels in shards],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1",
            }
        )
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def three_shards(test="test"):
    return {
        "train": [examples(300, seed=1), examples(7, seed=2)],
        test: [examples(5, seed=3)],
    }


def test_tfds_reads_back_exactly_what_was_written(tmp_path):
    splits = three_shards()
    write_dataset(tmp_path / "made/1.0.0", splits)
    dataset = data.load(make_config(tmp_path))
    np.testing.assert_array_equal(
        dataset.train.images, np.concatenate([images for images, _ in splits["train"]])
    )
    np.testing.assert_array_equal(
        dataset.train.labels, np.concatenate([labels for _, labels in splits["train"]])
    )
    np.testing.assert_array_equal(dataset.test.images, splits["test"][0][0])
    np.testing.assert_array_equal(dataset.test.labels, [0, 1, 2, 0, 1])
    assert dataset.class_names == ("ant", "bee", "cat")
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["made/small:1.2.0", "made/small", "made"])
def test_config_and_version_in_the_name(tmp_path, name):
    folder = "made/1.2.0" if name == "made" else "made/small/1.2.0"
    write_dataset(tmp_path / folder, three_shards())
    assert len(data.load(make_config(tmp_path, name=name)).train.labels) == 307


def test_grey_images_become_three_equal_channels(tmp_path):
    images, labels = examples(9, channels=1)
    write_dataset(tmp_path / "made/1.0.0", {"train": [(images, labels)], "test": [(images, labels)]})
    np.testing.assert_array_equal(data.load(make_config(tmp_path)).train.images, images.repeat(3, axis=-1))


def test_validation_stands_in_for_test_and_features_are_found_by_type(tmp_path):
    write_dataset(tmp_path / "made/1.0.0", three_shards(test="validation"), supervised=False)
    np.testing.assert_array_equal(data.load(make_config(tmp_path)).test.images, examples(5, seed=3)[0])


def test_val_stands_in_for_a_test_split_without_labels(tmp_path):
    """As in i_naturalist2021."""
    splits = three_shards(test="val") | {"test": [(examples(5, seed=4)[0], np.full(5, -1))]}
    write_dataset(tmp_path / "made/1.0.0", splits)
    np.testing.assert_array_equal(data.load(make_config(tmp_path)).test.images, examples(5, seed=3)[0])


def test_validation_beside_test_is_the_validation_split(tmp_path):
    splits = three_shards() | {"validation": [examples(6, seed=5)]}
    write_dataset(tmp_path / "made/1.0.0", splits)
    dataset = data.load(make_config(tmp_path))
    np.testing.assert_array_equal(dataset.validation.labels, examples(6, seed=5)[1])
    assert dataset.class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize("streamed", [False, True])
def test_training_images_alone_are_divided_when_asked_for(tmp_path, streamed):
    splits = three_shards()
    write_dataset(tmp_path / "made/1.0.0", splits)
    with pytest.raises(ConfigError, match=r"takes a test split .* but made has test: set it to 0"):
        data.load(make_config(tmp_path, test_fraction=0.2))
    shutil.rmtree(tmp_path / "made")
    del splits["test"]
    write_dataset(tmp_path / "made/1.0.0", splits)
    with pytest.raises(DatasetError, match=r"has only train; set config\.data\.test_fraction"):
        data.load(make_config(tmp_path))
    if streamed:
        settings = {"streaming": True, "image_size": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        with pytest.raises(ConfigError, match="needs the labels of made before it is read"):
            data.load(make_config(tmp_path, test_fraction=0.2, **settings))
        return
    dataset = data.load(make_config(tmp_path, test_fraction=0.2))
    whole = np.concatenate([labels for _, labels in splits["train"]])
    for label in range(3):
        count = (whole == label).sum()
        assert (dataset.test.labels == label).sum() == max(1, round(0.2 * count))
        assert (dataset.train.labels == label).sum() + (dataset.test.labels == label).sum() == count


def test_of_two_labels_a_key_chooses(tmp_path):
    """Also where TFDS prefers one; what is decoded of one is not taken for the other's."""
    features = FEATURES | {"other": tfds.features.ClassLabel(names=["x", "y", "z"])}
    write_dataset(tmp_path / "made/1.0.0", three_shards(), features)
    assert data.load(make_config(tmp_path)).class_names == ("ant", "bee", "cat")
    dataset = data.load(make_config(tmp_path, label_key="other"))
    assert dataset.class_names == ("x", "y", "z")
    np.testing.assert_array_equal(dataset.test.labels, [1, 2, 0, 1, 2])
    np.testing.assert_array_equal(
        data.load(make_config(tmp_path, label_key="label")).test.labels, [0, 1, 2, 0, 1]
    )
    with pytest.raises(DatasetError, match=r"as label, other: config\.data\.label_key=id is none of them"):
        data.load(make_config(tmp_path, label_key="id"))
    with pytest.raises(DatasetError, match=r"as image: config\.data\.image_key=id is none of them"):
        data.load(make_config(tmp_path, image_key="id"))


def test_validation_stands_in_for_a_test_split_without_labels(tmp_path):
    """As in imagenet2012, whose test labels are -1."""
    splits = three_shards(test="validation") | {"test": [(examples(5, seed=4)[0], np.full(5, -1))]}
    write_dataset(tmp_path / "made/1.0.0", splits)
    dataset = data.load(make_config(tmp_path))
    np.testing.assert_array_equal(dataset.test.images, examples(5, seed=3)[0])
    np.testing.assert_array_equal(dataset.test.labels, [0, 1, 2, 0, 1])


def make_streaming_config(root):
    return make_config(root, streaming=True, image_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_streamed_records_are_read_where_they_are(tmp_path, monkeypatch):
    """In any order, from another process too, and nothing is decoded or cached to know of them."""
    splits = three_shards()
    folder = write_dataset(tmp_path / "made/1.0.0", splits)
    monkeypatch.setattr(data.base, "decode_image", None)
    dataset = data.load(make_streaming_config(tmp_path))
    assert not (tmp_path / "cache").exists()
    assert (len(dataset.train), len(dataset.test)) == (307, 5)
    assert dataset.train.image_shape == (4, 4, 3)
    assert dataset.class_names == ("ant", "bee", "cat")
    images = np.concatenate([images for images, _ in splits["train"]])
    labels = np.concatenate([labels for _, labels in splits["train"]])
    records = pickle.loads(pickle.dumps(dataset.train.records))
    places = [306, 0, 299, 300, 5]
    for place, (where, encoded, label) in zip(places, records.read(places), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), images[place])
        assert label == labels[place]
        shard, record = divmod(place, 300)
        assert where == f"Record {record} of {folder}/made-train.array_record-{shard:05}-of-00002"


def test_streamed_fingerprint(tmp_path):
    """Files' names, sizes and numbers of records count, the folder that they are in does not."""
    folder = write_dataset(tmp_path / "made/1.0.0", three_shards())
    first = data.load(make_streaming_config(tmp_path)).fingerprint
    shutil.copytree(tmp_path / "made", tmp_path / "elsewhere/made")
    assert data.load(make_streaming_config(tmp_path / "elsewhere")).fingerprint == first
    write_records(folder / "made-test.array_record-00000-of-00001", *examples(5, size=(200, 200)))
    assert data.load(make_streaming_config(tmp_path)).fingerprint != first


@pytest.mark.parametrize("kind", ["byte", "records missing", "not an image", "label"])
def test_streamed_damage_is_named(tmp_path, kind):
    words = damage(write_dataset(tmp_path / "made/1.0.0", three_shards()), kind)

    def read():
        records = data.load(make_streaming_config(tmp_path)).train.records
        for where, encoded, _ in records.read(range(300)):
            with data.base.damage_named(where, encoded, records.remedy):
                data.base.decode_image(encoded)

    with pytest.raises(DatasetError) as caught:
        read()
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


def test_limit_of_open_files(monkeypatch):
    """As many shards as ImageNet has, and 512 for the rest: lifted where that is allowed."""
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))
    tfds_source._allow_open_files(500)
    assert not limits
    tfds_source._allow_open_files(1024)
    assert limits == [(1536, 4096)]
    with pytest.raises(ResourceError, match=r"4000 files must be open .* 4096: raise `ulimit -n`"):
        tfds_source._allow_open_files(4000)


def test_decoded_once(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "made/1.0.0", three_shards())
    first = data.load(make_config(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(data.base, "decode_all", None)
        assert data.load(make_config(tmp_path)).fingerprint == first.fingerprint
    write_records(folder / "made-test.array_record-00000-of-00001", *examples(5, seed=4))
    changed = data.load(make_config(tmp_path))
    np.testing.assert_array_equal(changed.test.images, examples(5, seed=4)[0])
    assert changed.fingerprint != first.fingerprint


def test_images_of_differing_sizes(tmp_path):
    splits = {"train": [examples(3), examples(3, size=(8, 9))], "test": [examples(3)]}
    write_dataset(tmp_path / "made/1.0.0", splits)
    with pytest.raises(DatasetError, match=r"Record 0 of .*00001-of-00002 is 9x8 pixels.*image_size"):
        data.load(make_config(tmp_path))
    for size in (4, 3):
        assert data.load(make_config(tmp_path, image_size=size)).train.images.shape == (6, size, size, 3)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    used = np.flatnonzero(np.frombuffer(content, np.uint8))
    content[used[len(used) // 2]] ^= 1
    path.write_bytes(content)


def damage(folder, kind):
    """Damages a prepared dataset in one way; returns the words that the error must have."""
    shard = folder / "made-train.array_record-00000-of-00002"
    if kind == "byte":
        flip_a_byte(shard)
        return ["Record", str(shard), "damaged", f"rm -r {folder}"]
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:65536])
        return [str(shard), f"rm -r {folder}"]
    if kind == "empty file":
        shard.write_bytes(b"")
        return [str(shard), f"rm -r {folder}"]
    if kind == "shard missing":
        shard.rename(folder / f"incomplete.{'0' * 32}.{shard.name}")
        return ["half-prepared", shard.name, f"rm -r {folder}"]
    if kind == "records missing":
        write_records(shard, *examples(200, seed=1))
        return [f"{shard} has 200 records, and 300 by dataset_info.json", f"rm -r {folder}"]
    if kind == "not an image":
        writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
        for _ in range(300):
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(b"text")
            example.features.feature["label"].int64_list.value.append(0)
            writer.write(example.SerializeToString())
        writer.close()
        return [f"Record 0 of {shard}", "not a PNG or JPEG image"]
    if kind == "description":
        (folder / "dataset_info.json").write_text("{")
        return ["made", str(folder.parent.parent), "damaged"]
    if kind == "label":
        write_records(shard, examples(300)[0], np.full(300, 3))
        return [f"Record 0 of {shard} has label 3", "0 .. 2"]
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "byte",
        "truncated",
        "empty file",
        "shard missing",
        "records missing",
        "not an image",
        "description",
        "label",
    ],
)
def test_damaged_datasets_are_dataset_errors(tmp_path, kind):
    words = damage(write_dataset(tmp_path / "made/1.0.0", three_shards()), kind)
    with pytest.raises(DatasetError) as caught:
        data.load(make_config(tmp_path))
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": {"train": [examples(3)]}}, "only train"),
        ({"splits": {"test": [examples(3)]}}, "only test"),
        ({"features": {"image": FEATURES["image"]}, "supervised": False}, "features are image"),
        (
            {"features": FEATURES | dict.fromkeys("edcba", FEATURES["label"]), "supervised": False},
            r"as a, b, c, d, e, label: set config\.data\.label_key to one of them",
        ),
        (
            {"features": FEATURES | {"image": tfds.features.Image(shape=(None, None, 1), dtype=np.float32)}},
            "float32",
        ),
        ({"file_format": "tfrecord"}, r"prepared as tfrecord.*rm -r .*made/1\.0\.0.*pip install tensorflow"),
    ],
)
def test_datasets_that_do_not_fit(tmp_path, settings, message):
    write_dataset(tmp_path / "made/1.0.0", **{"splits": three_shards(), **settings})
    with pytest.raises(DatasetError, match=message):
        data.load(make_config(tmp_path))


@pytest.fixture
def no_tensorflow(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name)
    )


def test_not_prepared_names_the_command(tmp_path, no_tensorflow):
    (tmp_path / "kmnist/incomplete.ABC_3.0.1").mkdir(parents=True)
    (tmp_path / "kmnist/incomplete.ABC_3.0.1/dataset_info.json").write_text("{}")
    with pytest.raises(DatasetError) as caught:
        data.load(make_config(tmp_path, name="kmnist"))
    message = str(caught.value)
    for words in (
        f"{tmp_path}/kmnist/3.0.1",
        "`pip install tensorflow`",
        "incomplete.ABC_3.0.1",
        "same command",
    ):
        assert words in message


def test_half_prepared_folder(tmp_path):
    folder = tmp_path / "kmnist/3.0.1"
    folder.mkdir(parents=True)
    with pytest.raises(DatasetError, match=f"half-prepared.*rm -r {folder}"):
        data.load(make_config(tmp_path, name="kmnist"))


def test_manual_folder_must_exist(tmp_path):
    config = make_config(tmp_path, name="kmnist", manual_dir=f"{tmp_path}/none")
    with pytest.raises(DatasetError, match=r"manual_dir .*none is not a folder.*train-images-idx3-ubyte\.gz"):
        data.load(config)


@pytest.fixture
def prepare(monkeypatch):
    """Stands in for TensorFlow and TFDS's preparation: put the function to call instead into the list."""
    steps = []
    config = types.SimpleNamespace(set_visible_devices=lambda devices, kind: None)
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=config))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorflow" or find_spec(name))
    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", lambda self, **settings: steps[0](self, **settings)
    )
    return steps


def test_prepares_from_the_manual_folder_then_reads(tmp_path, prepare):
    manual = tmp_path / "manual"
    manual.mkdir()
    images, labels = examples(6, channels=1, size=(28, 28))
    features = {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }

    def write(builder, download_config, file_format):
        assert (str(download_config.manual_dir), file_format) == (str(manual), "array_record")
        assert not download_config.try_download_gcs
        splits = {"train": [(images, labels)], "test": [(images, labels)]}
        write_dataset(tmp_path / "kmnist/3.0.1", splits, features, name="kmnist")

    prepare.append(write)
    dataset = data.load(make_config(tmp_path, name="kmnist", manual_dir=str(manual)))
    np.testing.assert_array_equal(dataset.train.images, images.repeat(3, axis=-1))
    assert len(dataset.class_names) == 10


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (ConnectionError("no\nroute"), DatasetError, r"no route\. .*train-labels-idx1-ubyte\.gz.*manual_dir"),
        (OSError(28, "No space left on device"), ResourceError, "No space left on device"),
    ],
)
def test_failed_preparation(tmp_path, prepare, failure, error, message):
    def fail(builder, **settings):
        raise failure

    prepare.append(fail)
    with pytest.raises(error, match=message):
        data.load(make_config(tmp_path, name="kmnist"))
