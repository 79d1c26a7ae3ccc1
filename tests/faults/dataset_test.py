"""What can be wrong with a dataset and its settings: the fault, and the words of the one line about it."""

import contextlib
import os
import shutil
import socket
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from conftest import ROOT
from data_folder_test import BLUE, GREEN, RED, encode, make_config, png, save
from data_tfds_test import make_config as tfds_config
from data_tfds_test import three_shards, write_dataset
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from configs import folder as config_folder
from ffl_jax import data, doctor, main
from ffl_jax.data import cache, images, limits, pieces
from ffl_jax.errors import CheckpointError, ConfigError, DatasetError, FFLError
from ffl_jax.training.experiment import Experiment, check_belongs, run_record

FLIPS = 500 if os.environ.get("FFL_LONG_FAULTS") else 15
STREAMED = {"streaming": True, "image_size": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def root(tmp_path):
    """Two classes with four training and two test images each, of 6x4 pixels."""
    root = tmp_path / "images"
    for split, count in (("train", 4), ("test", 2)):
        for name, colour in (("ant", RED), ("bee", BLUE)):
            for number in range(count):
                save(root / split / name / f"{number}.png", colour)
    return root


def write(content):
    return lambda path: path.write_bytes(content)


def picture(image, **options):
    return lambda path: image.save(path, **options)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(limits.MAX_FILE_BYTES + 1)


def bind(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


def header(width, height):
    """A PNG file that says that it has so many pixels."""
    made = bytearray(png(8, 0, [b"\0"]))
    made[12:29] = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    made[29:33] = struct.pack(">I", zlib.crc32(made[12:29]))
    return bytes(made)


def missing_rows():
    """A PNG file of 2x4 pixels with the rows of 2x2, and all checksums right."""
    made = png(8, 0, [b"\1\2"] * 2)
    return made[:12] + header(2, 4)[12:33] + made[33:]


# A file train/ant/bad.SUFFIX: what it is, and the words of the line that names it.
FILES = {
    "named pipe": ("png", os.mkfifo, "is a named pipe, not a file"),
    "socket": ("png", bind, "is a socket, not a file"),
    "device": ("png", lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "folder": ("jpg", os.mkdir, "is a folder, not a file"),
    "dangling link": ("png", lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "link to itself": ("png", lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "never-ending file": ("png", lambda path: path.symlink_to("/proc/kmsg"), "it has 0 bytes"),
    "1 GiB and a byte": ("png", sparse, "at most 1.1 GB are read"),
    "text": ("webp", write(b"hello"), "not a PNG or JPEG image, nor any other"),
    "no pixels": ("png", write(header(0, 5)), "cannot be decoded"),
    "10 gigapixels": ("png", write(header(100_000, 100_000)), "exceeds limit"),
    "150 megapixels": ("png", write(header(15_000, 10_000)), "it has 15000x10000 pixels, and at most 134"),
    "ten million by one": (
        "png",
        write(png(1, 0, [bytes(1_250_000)])),
        "of 6 it would have 60000000x6 pixels",
    ),
    "rows missing": ("png", write(missing_rows()), "6 of 12 bytes of its pixels are missing"),
    "no end": ("png", write(png(8, 0, [bytes(6)] * 4)[:-12]), "truncated"),
    "32-bit values": ("tif", picture(Image.fromarray(np.full((4, 6), 70_000, np.int32))), "outside 0..65535"),
    "fractions": ("tif", picture(Image.fromarray(np.ones((4, 6), np.float32))), "numbers with fractions"),
}


def load(root):
    data.load(make_config(root, image_size=6))


def examine(root):
    doctor.command(["doctor", *flags(root, image_size=6)])


@pytest.mark.parametrize("use", [load, examine])
@pytest.mark.parametrize("fault", FILES)
def test_bad_files_are_named(root, fault, use, monkeypatch):
    """By loading, before training, and by the doctor, who looks at all of them."""
    suffix, make, words = FILES[fault]
    bad = root / f"train/ant/bad.{suffix}"
    monkeypatch.chdir(bad.parent)
    make(bad)
    with pytest.raises(DatasetError) as caught:
        use(root)
    message = str(caught.value)
    assert [word for word in (words, str(bad)) if word not in message] == [], message
    assert "\n" not in message


def flags(root, **settings):
    settings = {"data_dir": root, "cache_dir": f"{root}_cache"} | settings
    file = ROOT / "configs/folder.py"
    preset = "method=independent,network=tiny"
    return (
        f"--config={file}:{preset}",
        "--config.batch_size=4",
        *(f"--config.data.{key}={value}" for key, value in settings.items()),
    )


def test_the_doctor_names_all_bad_images_in_one_pass(root, capsys):
    bad = [root / name for name in ("train/ant/0.png", "train/bee/3.png", "test/bee/1.png")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="3 of 12 images cannot be used, see above"):
        examine(root)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(f"{path} cannot be decoded" in line for line in lines) for path in bad)


def test_the_doctor_says_what_is_in_the_images(root, capsys):
    Image.new("L", (7, 5)).save(root / "train/ant/grey.png")
    examine(root)
    text = capsys.readouterr().out
    assert "train: 9 images of 6 to 7 x 4 to 5 pixels (RGB 8, L 1)" in text
    assert "train: ant 5, bee 4" in text


@pytest.mark.parametrize(
    ("fault", "do", "settings", "words"),
    [
        (
            "two classes that look alike",
            lambda root: [
                shutil.copytree(root / "train/ant", root / "train" / unicodedata.normalize(form, "é"))
                for form in ("NFC", "NFD")
            ],
            {},
            "two folders each that look alike",
        ),
        ("a class linked to itself", lambda root: (root / "train/c").symlink_to("c"), {}, "Too many levels"),
        (
            "a class without images",
            lambda root: (root / "train/cat").mkdir(),
            {},
            "without an image: train/cat",
        ),
        (
            "val has other classes",
            lambda root: shutil.copytree(root / "test/ant", root / "val/ant"),
            {},
            "only in train: bee",
        ),
        (
            "validation takes a class",
            lambda root: [save(root / split / "cat/0.png", GREEN) for split in ("train", "test")],
            {"validation_examples": 8},
            "takes all training images of",
        ),
        (
            "validation takes a streamed class",
            lambda root: [save(root / split / "cat/0.png", GREEN) for split in ("train", "test")],
            STREAMED | {"validation_examples": 8},
            "takes all training images of",
        ),
    ],
)
def test_bad_trees_are_refused(root, fault, do, settings, words):
    do(root)
    with pytest.raises(DatasetError, match=words) as caught:
        data.load(make_config(root, **settings))
    assert "\n" not in str(caught.value)


def test_limits_on_classes_and_files(root, monkeypatch):
    monkeypatch.setattr(limits, "MAX_CLASSES", 1)
    with pytest.raises(DatasetError, match="train has 2 folders, and at most 1 classes"):
        data.load(make_config(root))
    monkeypatch.undo()
    monkeypatch.setattr(limits, "MAX_FILES", 3)
    with pytest.raises(DatasetError, match="ant has over 3 files"):
        data.load(make_config(root))


def test_a_prepared_dataset_has_a_limit_on_classes(tmp_path):
    """Names for so many would take all memory."""
    path = write_dataset(tmp_path / "made/1.0.0", three_shards()) / "features.json"
    (path.parent / "label.labels.txt").unlink()
    assert '"3"' in path.read_text()
    path.write_text(path.read_text().replace('"3"', '"30000000000"'))
    with pytest.raises(DatasetError, match="30000000000 classes, and at most 500000"):
        data.load(tfds_config(tmp_path))


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("mean=(125,123,114)", r"pixels from 0 to 1.*set \(0.4902,0.4824,0.4471\)"),
        ("std=(58,57,57)", r"pixels from 0 to 1.*set \(0.2275,0.2235,0.2235\)"),
        ("std=(0.001,0.001,0.001)", "each std is in 0.0039..1"),
        ("mean=('a','b','c')", "mean takes three numbers"),
        ("mean=(0.5,0.5)", "mean takes three numbers"),
        ("mean=(nan,0.5,0.5)", "config.data.mean"),
        ("image_size=100000", "counts the pixels of one side"),
    ],
)
def test_settings_in_another_unit_are_refused(flag, words, root, monkeypatch):
    monkeypatch.chdir(root)
    both = {"mean": "(0.5,0.5,0.5)", "std": "(0.2,0.2,0.2)"} | dict([flag.split("=")])
    with pytest.raises(Exception, match=words) as caught:
        main.command(["main", *flags(root, **both), f"--workdir={root}/run"])
    assert getattr(caught.value, "exit_code", 2) == 2


def test_what_is_left_out_is_said(root, caplog):
    caplog.set_level("INFO")
    (root / "train/ant/a.txt").touch()
    (root / "train/bee/README").touch()
    (root / "train/loose.png").touch()
    (root / "test/missing").symlink_to("nowhere")
    (root / "extra").mkdir()
    save(root / "train/ant/@eaDir/0.png", GREEN)
    save(root / "train/__MACOSX/0.png", GREEN)
    (root / "train/ant/Thumbs.db").touch()
    assert len(data.load(make_config(root)).train) == 8
    assert sorted(caplog.messages) == [
        f"Folders of {root} that are not used: extra.",
        f"Left out of {root}/test, beside its class folders: missing.",
        f"Left out of {root}/train, as hidden or as what a system left behind: '@eaDir' 1, 'Thumbs.db' 1.",
        f"Left out of {root}/train, as hidden or as what a system left behind: '__MACOSX' 1.",
        f"Left out of {root}/train, beside its class folders: loose.png.",
        f"Left out of {root}/train: 2 files that are no images by their suffixes: .txt 1, none 1.",
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("@eaDir", "@Recycle", "@Recently-Snapshot", "@__thumb", "#recycle", "#snapshot", "~snapshot"),
        *("$RECYCLE.BIN", "RECYCLER", "System Volume Information", "FOUND.000", "lost+found", ".AppleDouble"),
        *(
            "__MACOSX",
            ".thumbnails",
            ".@__thumb",
            ".ipynb_checkpoints",
            "Network Trash Folder",
            "__pycache__",
        ),
        *("Thumbs.db", "THUMBS.DB", "Desktop.ini", "Icon\r", "._0.png", ".DS_Store"),
    ],
)
def test_what_systems_leave_behind_is_no_image_and_no_class(root, name, caplog):
    caplog.set_level("INFO")
    for place in ("", "train", "train/ant", "test", "test/bee"):
        save(root / place / name / "0.png", GREEN)
    dataset = data.load(make_config(root))
    assert (len(dataset.train), len(dataset.test), dataset.class_names) == (8, 4, ("ant", "bee"))
    told = [message for message in caplog.messages if f"left behind: {name!r} 1." in message]
    assert len(told) == len(caplog.messages) == 5


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("streamed", [False, True])
def test_val_beside_test_is_the_validation_split(root, name, streamed, caplog):
    caplog.set_level("INFO")
    settings = STREAMED if streamed else {}
    before = data.load(make_config(root, **settings))
    save(root / name / "ant/0.png", GREEN)
    save(root / name / "bee/0.png", GREEN)
    dataset = data.load(make_config(root, **settings))
    assert (len(dataset.train), len(dataset.test), len(dataset.validation)) == (8, 4, 2)
    assert dataset.fingerprint != before.fingerprint
    assert f"The validation split is {root}/{name}." in caplog.text
    carved = data.load(make_config(root, validation_examples=2, **settings))
    assert (len(carved.train), len(carved.validation)) == (6, 2)
    assert f"not used: {name}. To use {name}, set config.data.validation_examples=0." in caplog.text


def test_val_beside_an_unlabelled_test_is_the_test_split(root, caplog):
    """As ImageNet is unpacked."""
    caplog.set_level("INFO")
    (root / "test").rename(root / "val")
    save(root / "test/images/0.png", GREEN)
    assert len(data.load(make_config(root)).test) == 4
    assert f"The test split is {root}/val" in caplog.text
    assert "not used: test." in caplog.text


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_classes_that_nobody_has_divided(root, flat, streamed, caplog):
    """A fourth of each class, the same at every start; no image is in both splits."""
    shutil.rmtree(root / "test")
    for name in ("ant", "bee") if flat else ():
        (root / "train" / name).rename(root / name)
    if flat:
        (root / "train").rmdir()
    settings = {"test_fraction": 0.25} | (STREAMED if streamed else {})
    first, second = (data.load(make_config(root, **settings)) for _ in range(2))
    assert (len(first.train), len(first.test), first.class_names) == (6, 2, ("ant", "bee"))
    assert sorted(first.test.labels) == [0, 1]
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != data.load(make_config(root, **settings | {"test_fraction": 0.5})).fingerprint
    if streamed:
        assert sorted([*first.train.positions, *first.test.positions]) == list(range(8))
    with pytest.raises(DatasetError, match="leaves no training image of ant, bee"):
        data.load(make_config(root, **settings | {"test_fraction": 0.9}))


def test_a_test_split_is_not_taken_where_there_is_one(root):
    with pytest.raises(ConfigError, match=r"takes a test split .* has test: set it to 0"):
        data.load(make_config(root, test_fraction=0.25))
    with pytest.raises(ConfigError, match="digits has a test split"):
        data.load(make_config(root, name="digits", test_fraction=0.25))
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\), got 20"):
        data.load(make_config(root, test_fraction=20.0))


@pytest.mark.parametrize("streamed", [False, True])
def test_classes_without_test_images_are_allowed_when_asked_for(root, streamed, caplog):
    """As a folder that is not there, and as one that is empty."""
    settings = STREAMED if streamed else {}
    for split, name in (("train", "cat"), ("train", "dog"), ("test", "dog"), ("val", "bee")):
        (root / split / name).mkdir(parents=True, exist_ok=True)
    for place in ("train/cat", "train/dog", "val/bee"):
        save(root / place / "0.png", GREEN)
    with pytest.raises(DatasetError, match="without an image: test/dog"):
        data.load(make_config(root, **settings))
    (root / "test/dog").rmdir()
    with pytest.raises(
        DatasetError, match=r"only in train: cat, dog; .*set config\.data\.missing_classes=True"
    ):
        data.load(make_config(root, **settings))
    (root / "test/dog").mkdir()
    dataset = data.load(make_config(root, missing_classes=True, **settings))
    assert dataset.class_names == ("ant", "bee", "cat", "dog")
    np.testing.assert_array_equal(dataset.test.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(dataset.validation.labels, [1])
    assert f"Classes of {root} without an image in test: cat, dog." in caplog.text
    assert f"Classes of {root} without an image in val: ant, cat, dog." in caplog.text
    (root / "test/other").mkdir()
    save(root / "test/other/0.png", GREEN)
    with pytest.raises(DatasetError, match="only in test: other"):
        data.load(make_config(root, missing_classes=True, **settings))


@pytest.mark.parametrize("key", ["image_key", "label_key", "split_key"])
def test_columns_of_what_has_none_are_refused(root, key):
    np.savez(root / "a.npz", train_images=1)
    for place in (root, root / "a.npz"):
        with pytest.raises(ConfigError, match=f"{key}=x names a column of a table"):
            data.load(make_config(place, **{key: "x"}))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_validation_fraction_is_of_each_class(root, streamed):
    settings = {"validation_fraction": 0.25} | (STREAMED if streamed else {})
    first, second = (data.load(make_config(root, **settings)) for _ in range(2))
    np.testing.assert_array_equal(np.bincount(first.validation.labels), [1, 1])
    np.testing.assert_array_equal(np.bincount(first.train.labels), [3, 3])
    assert len(first.test) == 4
    assert first.fingerprint == second.fingerprint != data.load(make_config(root)).fingerprint
    with pytest.raises(DatasetError, match=r"validation_fraction=0\.9 leaves no training image of ant, bee"):
        data.load(make_config(root, **settings | {"validation_fraction": 0.9}))
    with pytest.raises(ConfigError, match="both set images aside"):
        data.load(make_config(root, validation_examples=2, **settings))
    with pytest.raises(ConfigError, match=r"validation_fraction must be in \[0, 1\), got 10"):
        data.load(make_config(root, validation_fraction=10.0))


@pytest.mark.parametrize("streamed", [False, True])
def test_greys_of_12_bits(root, streamed):
    """White is what is said to be; what is decoded for one is not taken for the other."""
    grey = np.full((4, 6), 2048, np.uint16)
    grey[0, 0] = 4095
    for kind in ("png", "tif"):
        Image.fromarray(grey).save(root / f"train/ant/00.{kind}")

    def corner(**settings):
        dataset = data.load(make_config(root, **(STREAMED if streamed else {}), **settings))
        if not streamed:
            return dataset.train.images[1:3, :, :, 0]
        made = pieces.EvalPieces(dataset.train, 4, (0, 1), "pad")[0][0][1:3, :, :, 0]
        return made[:, 1:, 1:]

    # value * 255 / 65535 and / 4095, rounded by hand
    for settings, white, middle in (
        ({}, 16, 8),
        ({"max_value": 4095}, 255, 128),
        ({"max_value": 5000}, 209, 104),
    ):
        found = corner(**settings)
        assert (found[:, 1:, 1:] == middle).all()
        assert streamed or (found[:, 0, 0] == white).all()
    with pytest.raises(
        DatasetError, match=r"00\.png cannot be decoded.*0\.\.4000.*config\.data\.max_value=4000"
    ):
        corner(max_value=4000)
    with pytest.raises(ConfigError, match="max_value must be at least 1, got 0"):
        corner(max_value=0)


def test_a_class_that_loses_over_half_is_named(root, caplog):
    data.load(make_config(root, validation_examples=6))
    assert "takes over half of the training images of: ant, bee." in caplog.text


def test_classes_that_look_alike_are_one(root):
    for split, form in (("train", "NFD"), ("test", "NFC")):
        (root / split / "ant").rename(root / split / unicodedata.normalize(form, "améise"))
    assert data.load(make_config(root)).class_names == ("améise", "bee")


def large_text(path):
    info = PngInfo()
    info.add_text("text", "x" * 3_000_000, zip=True)
    info.add_itxt("XML:com.adobe.xmp", "y" * 3_000_000, zip=True)
    Image.new("RGB", (6, 4), GREEN).save(path, pnginfo=info, icc_profile=bytes(3_000_000))


@pytest.mark.parametrize(
    ("suffix", "make"),
    [
        ("webp", picture(Image.new("RGB", (6, 4), GREEN), lossless=True)),
        *((suffix, picture(Image.new("RGB", (6, 4), GREEN))) for suffix in ("bmp", "gif", "tif", "ppm")),
        *((suffix, picture(Image.new("RGB", (6, 4), GREEN))) for suffix in ("tga", "pcx", "sgi", "TIFF")),
        *(
            (
                suffix,
                picture(
                    Image.new("RGB", (6, 4), GREEN), save_all=True, append_images=[Image.new("RGB", (6, 4))]
                ),
            )
            for suffix in ("gif", "png", "tiff")
        ),
        ("png", large_text),
        ("png", picture(Image.fromarray(np.full((4, 6), 128 * 257, np.uint16)))),
        ("tif", picture(Image.new("CMYK", (6, 4), (255, 0, 255, 0)))),
    ],
)
def test_unusual_images_are_read(root, suffix, make):
    """The first of several pictures; grey as grey."""
    make(root / f"train/ant/00.{suffix}")
    image = data.load(make_config(root)).train.images[1]
    expected = (128,) * 3 if image[0, 0, 0] else GREEN
    np.testing.assert_array_equal(image, np.broadcast_to(expected, (4, 6, 3)))


def interlaced(pixels, bit_depth):
    """A PNG of grey or RGB pixels in seven passes, as figure 8.2 of the PNG specification draws them."""
    odd = "77777777"
    pattern = ("16462646", odd, "56565656", odd, "36463646", odd, "56565656", odd)
    grid = np.array([[int(number) for number in row] for row in pattern])
    height, width = pixels.shape[:2]
    numbers = np.tile(grid, (-(-height // 8), -(-width // 8)))[:height, :width]
    data = b""
    for number in range(1, 8):
        for row in range(height):
            chosen = pixels[row][numbers[row] == number]
            if chosen.size:
                data += b"\0" + (np.packbits(chosen).tobytes() if bit_depth == 1 else chosen.tobytes())

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    colour = 2 if pixels.ndim == 3 else 0
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 1))
    parts = [chunk(b"IDAT", part) for part in (zlib.compress(data), b"")]  # in several parts, one empty
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2), (3, 9), (9, 3), (16, 17)])
def test_interlaced_pngs_are_whole(size):
    rng = np.random.default_rng(0)
    for bit_depth, shape in ((8, (*size, 3)), (1, size)):
        pixels = rng.integers(0, 2**bit_depth, shape, np.uint8)
        expected = pixels if bit_depth == 8 else 255 * pixels[..., None].repeat(3, -1)
        np.testing.assert_array_equal(images.decode_image(interlaced(pixels, bit_depth)), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "interlaced"])
def test_flipped_bits_of_a_png_are_seen(mode):
    """No flip changes a pixel without a word."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 16, 4), np.uint8)
    encoded = (
        interlaced(noise[..., :3], 8)
        if mode == "interlaced"
        else encode(Image.fromarray(noise).convert(mode))
    )
    expected = images.decode_image(encoded)
    for position, bit in zip(
        rng.integers(len(encoded), size=FLIPS), rng.integers(8, size=FLIPS), strict=True
    ):
        flipped = bytearray(encoded)
        flipped[position] ^= 1 << bit
        try:
            decoded = images.decode_image(bytes(flipped))
        except Exception:
            continue
        np.testing.assert_array_equal(decoded, expected, f"byte {position}, bit {bit}")


def flip_used_bytes(path, rng):
    """Flips a bit where there is something: ArrayRecord fills its files up with zeros."""
    content = bytearray(path.read_bytes())
    used = np.flatnonzero(np.frombuffer(content, np.uint8))
    content[rng.choice(used)] ^= 1 << rng.integers(8)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["made-train.array_record-00001-of-00002", "features.json", "dataset_info.json"]
)
def test_flipped_bits_of_a_prepared_dataset_are_seen(tmp_path, name):
    """Each is refused in one line, or nothing has changed."""
    path = write_dataset(tmp_path / "made/1.0.0", three_shards()) / name
    config, whole = tfds_config(tmp_path, cache_dir="/dev/null"), path.read_bytes()
    expected, rng = data.load(config).fingerprint, np.random.default_rng(0)
    found = []
    for _ in range(FLIPS):
        flip_used_bytes(path, rng)
        with contextlib.suppress(FFLError):
            found.append(data.load(config).fingerprint)
        path.write_bytes(whole)
    assert set(found) <= {expected}


@pytest.mark.parametrize("fault", ["names missing", "names emptied", "pipe for names", "pipe for records"])
def test_prepared_datasets_lose_no_names_and_are_not_waited_for(tmp_path, fault):
    folder = write_dataset(tmp_path / "made/1.0.0", three_shards())
    path = folder / ("made-test.array_record-00000-of-00001" if "records" in fault else "label.labels.txt")
    path.unlink()
    if "pipe" in fault:
        os.mkfifo(path)
    elif "emptied" in fault:
        path.touch()
    with pytest.raises(DatasetError) as caught:
        data.load(tfds_config(tmp_path))
    assert str(path if "emptied" not in fault else tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_tfds_never_had_are_numbers(tmp_path):
    """As those of Fashion-MNIST, of which TFDS has code."""
    folder = write_dataset(tmp_path / "fashion_mnist/3.0.1", three_shards(), name="fashion_mnist")
    (folder / "label.labels.txt").unlink()
    assert data.load(tfds_config(tmp_path, name="fashion_mnist:3.0.1")).class_names == ("0", "1", "2")


def test_flipped_bits_of_the_cache_are_seen(tmp_path):
    made = {"a": np.arange(300, dtype=np.uint8).reshape(3, 100), "b": np.array([3, 4], np.int32)}
    rng = np.random.default_rng(0)
    for _ in range(FLIPS):
        cache.cached("set", "source", str(tmp_path), lambda: made)
        (path,) = tmp_path.iterdir()
        flip_used_bytes(path, rng)
        np.testing.assert_equal(cache.cached("set", "source", str(tmp_path), lambda: made), made)
    path.unlink()
    os.mkfifo(path)
    np.testing.assert_equal(cache.cached("set", "source", str(tmp_path), lambda: made), made)


@pytest.mark.parametrize(
    ("change", "accepted", "refusal"),
    [
        ("repaired", False, r"8 training examples\) in the checkpoint, \w+ \(8\) now .*accept_changes=True"),
        ("removed", False, r"8 training examples\) in the checkpoint, \w+ \(7\) now .*accept_changes=True"),
        ("repaired", True, None),
        ("removed", True, None),
        ("class renamed", True, "with other classes"),
    ],
)
def test_a_run_goes_on_with_a_repaired_dataset(root, change, accepted, refusal, caplog):
    def experiment():
        config = config_folder.get_config("method=independent,network=tiny")
        config.batch_size, config.data.accept_changes = 4, accepted
        config.data.update(data_dir=str(root), crop="pad", pad=1, **STREAMED)
        return Experiment(config, data.load(config.data))

    record, path = run_record(experiment()), root / "train/ant/0.png"
    if change == "repaired":
        save(path, GREEN, (7, 7))
    elif change == "removed":
        path.unlink()
    else:
        for split in ("train", "test"):
            (root / split / "bee").rename(root / split / "wasp")
    if refusal:
        with pytest.raises(CheckpointError, match=refusal):
            check_belongs(record, experiment(), root)
    else:
        check_belongs(record, experiment(), root)
        assert "Going on with it as it is now" in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
def test_the_doctor_tells_copies_and_what_is_done_to_images(root, streamed, capsys):
    """Within a split, across splits, and of two classes; sizes by hand."""
    for split in ("train", "test"):
        for number, path in enumerate(sorted((root / split).rglob("*.png"))):
            size = (8, 6) if path.name == "3.png" else (6, 4)
            save(path, (number, 100 * (split == "test"), 7), size)
    shutil.copy(root / "train/ant/0.png", root / "train/ant/4.png")
    shutil.copy(root / "train/ant/1.png", root / "test/bee/2.png")
    settings = {"image_size": 6} | (
        {"streaming": True, "workers": 0, "mean": "(0.5,0.5,0.5)", "std": "(0.5,0.5,0.5)"} if streamed else {}
    )
    doctor.command(["doctor", *flags(root, **settings)])
    lines = [line.partition(":")[2].strip() for line in capsys.readouterr().out.splitlines()]
    text = "\n".join(lines)
    assert f"copies within train: 1: {root}/train/ant/4.png = {root}/train/ant/0.png" in lines
    pair = f"{root}/test/bee/2.png = {root}/train/ant/1.png"
    assert f"warning: images of test that are in train too: 1, 1 of them with another class: {pair}" in lines
    assert "brought to 6x6 pixels: of 14 images, 12 smaller ones enlarged, 14 cut to a square" in lines
    assert "train: ant 5, bee 4" in text
    assert "warning: the learning rate never falls" not in text


def test_the_doctor_decodes_once(root, monkeypatch, capsys):
    decoded, to_rgb = [], images.to_rgb
    monkeypatch.setattr(images, "to_rgb", lambda *given: decoded.append(given) or to_rgb(*given))
    examine(root)
    assert len(decoded) == 12 + 2  # of each split the first, too, whose size counts
    examine(root)  # from the cache
    assert len(decoded) == 14
    assert "train: 8 images of 6 x 4 pixels (RGB 8)" in capsys.readouterr().out


def test_the_doctor_warns_of_dark_greys_and_a_constant_learning_rate(root, capsys):
    Image.fromarray(np.full((4, 6), 4000, np.uint16)).save(root / "train/ant/grey.png")
    rate = ("--config.optimizer.schedule=constant",)
    doctor.command(["doctor", *flags(root, image_size=6), *rate])
    text = capsys.readouterr().out
    assert "greys of more than 8 bits up to 4000; 65535 becomes white, so that they are dark" in text
    assert "set config.data.max_value=4095 perhaps" in text
    assert "warning: the learning rate never falls in 300 epochs" in text
    doctor.command(["doctor", *flags(root, image_size=6, max_value=4095)])
    text = capsys.readouterr().out
    assert "up to 4000; 4095 becomes white" in text
    assert "they are dark" not in text


def test_the_doctor_names_small_classes_of_many(root, capsys):
    for number in range(20):
        for split, count in (("train", 12 if number else 1), ("test", 1)):
            for image in range(count):
                save(root / split / f"class{number:02}" / f"{image}.png", (number, image, 9))
    examine(root)
    text = capsys.readouterr().out
    assert "train: from class00 1 to class19 12; below a tenth of the usual: class00 1" in text


def test_the_doctor_looks_at_arrays_and_tables(root, capsys):
    shape = (6, 8, 8, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.savez(
        root / "a.npz",
        train_images=pixels,
        train_labels=np.arange(6) % 2,
        test_images=pixels[:2],
        test_labels=np.arange(2),
    )
    (root / "a.csv").write_text(
        "path,label,split\n"
        + "".join(
            f"{path.relative_to(root)},{path.parent.name},{path.parent.parent.name}\n"
            for path in root.rglob("*.png")
        )
    )
    doctor.command(["doctor", *flags(root / "a.npz", image_size=0, cache_dir=f"{root}_cache")])
    text = capsys.readouterr().out
    assert "train: 6 images of 8 x 8 pixels (RGB 6)" in text
    assert "warning: images of test that are in train too: 2: image 0 = image 0, image 1 = image 1" in text
    doctor.command(["doctor", *flags(root / "a.csv", image_size=6, cache_dir=f"{root}_cache")])
    text = capsys.readouterr().out
    assert "train: 8 images of 6 x 4 pixels (RGB 8)" in text
    assert "a: train 8, test 4 images of 6x6, 2 classes" in text


def test_the_doctor_counts_the_classes_of_streamed_records(tmp_path, capsys):
    """Whose labels nobody knows before they are read."""
    write_dataset(tmp_path / "made/1.0.0", three_shards())
    given = {"name": "made", "data_dir": tmp_path, "streaming": True, "workers": 0, "image_size": 4}
    given |= {"mean": "(0.5,0.5,0.5)", "std": "(0.5,0.5,0.5)", "cache_dir": tmp_path / "cache"}
    doctor.command(["doctor", *flags(tmp_path, **given), "--config.data.pad=1"])
    assert "train: ant 103, bee 102, cat 102" in capsys.readouterr().out
