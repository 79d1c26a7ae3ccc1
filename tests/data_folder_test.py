import contextlib
import io
import os
import pathlib
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
from conftest import data_section
from PIL import Image

from ffl_jax import data
from ffl_jax.data import base
from ffl_jax.data import folder as folder_lib
from ffl_jax.errors import DatasetError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def make_config(root, **settings):
    return data_section(**{"name": "folder", "data_dir": str(root), "cache_dir": f"{root}_cache"} | settings)


def save(path, colour, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, compress_level=0)  # so that size does not depend on colour


@pytest.fixture
def root(tmp_path):
    """Two classes with 2 + 1 training and 1 + 1 test images, and files that do not count."""
    root = tmp_path / "images"
    save(root / "train/bee/b.png", RED)
    save(root / "train/bee/deep/er/a.PNG", GREEN)
    save(root / "train/ant/x.png", BLUE)
    save(root / "test/bee/z.png", BLUE)
    save(root / "test/ant/y.png", RED)
    (root / "train/bee/notes.txt").write_text("not an image")
    (root / "train/bee/.hidden.png").write_text("not an image")
    (root / "train/.cache").mkdir()
    (root / "train/loose.png").write_text("not an image")
    return root


def test_folder(root):
    dataset = data.load(make_config(root))
    assert dataset.class_names == ("ant", "bee")
    assert dataset.train.images.shape == (3, 4, 6, 3)
    np.testing.assert_array_equal(dataset.train.images[:, 2, 3], [BLUE, RED, GREEN])
    np.testing.assert_array_equal(dataset.train.labels, [0, 1, 1])
    np.testing.assert_array_equal(dataset.test.images[:, 0, 0], [RED, BLUE])
    np.testing.assert_array_equal(dataset.test.labels, [0, 1])


def test_val_is_the_test_split_where_there_is_no_test(root):
    expected = data.load(make_config(root)).test
    (root / "test").rename(root / "val")
    actual = data.load(make_config(root)).test
    np.testing.assert_array_equal(actual.images, expected.images)
    np.testing.assert_array_equal(actual.labels, expected.labels)
    save(root / "test/ant/other.png", GREEN)
    save(root / "test/bee/other.png", GREEN)
    np.testing.assert_array_equal(data.load(make_config(root)).test.images[:, 0, 0], [GREEN, GREEN])


def test_streamed_files_are_those_in_memory(root):
    loaded = data.load(make_config(root))
    streamed = data.load(make_config(root, streaming=True, image_size=4, mean=(0.5,) * 3, std=(0.5,) * 3))
    for split in ("train", "test"):
        records, expected = getattr(streamed, split).records, getattr(loaded, split)
        again = pickle.loads(pickle.dumps(records))  # as it comes to a worker
        read = list(again.read(np.arange(len(records))[::-1]))[::-1]
        images = [base.decode_image(encoded) for _, encoded, _ in read]
        np.testing.assert_array_equal(images, expected.images)
        np.testing.assert_array_equal([label for _, _, label in read], expected.labels)
        assert all(where.startswith(f"{root}/{split}/") and os.path.isfile(where) for where, _, _ in read)


def test_names_of_any_bytes_are_read(root):
    """As Linux allows them: not UTF-8, and beyond ASCII."""
    for name in (b"\xff.png", "ä.png".encode()):
        os.rename(root / "train/ant/x.png", os.fsencode(root / "train/ant") + b"/" + name)
        records = data.load(
            make_config(root, streaming=True, image_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
        ).train.records
        ((where, encoded, label),) = records.read([0])
        assert os.fsencode(where).endswith(name)
        assert (label, encoded) == (0, pathlib.Path(where).read_bytes())
        os.rename(where, root / "train/ant/x.png")


def test_many_images_keep_their_order(tmp_path):
    root = tmp_path / "images"
    for i in range(600):
        save(root / f"train/{'ab'[i % 2]}/{i:03}.png", (i % 256, i // 256, 7), (2, 2))
    save(root / "test/a/0.png", RED, (2, 2))
    save(root / "test/b/0.png", RED, (2, 2))
    images = data.load(make_config(root)).train.images[:, 0, 0].astype(int)
    assert (images[:, 0] + 256 * images[:, 1]).tolist() == [*range(0, 600, 2), *range(1, 600, 2)]


def test_decoded_once_and_again_when_a_file_changes(root, monkeypatch):
    first = data.load(make_config(root))
    decoded = []
    decode_image = base.decode_image
    monkeypatch.setattr(base, "decode_image", lambda *args: decoded.append(args) or decode_image(*args))
    assert data.load(make_config(root)).fingerprint == first.fingerprint
    assert not decoded
    path = root / "test/bee/z.png"
    before = path.stat()
    save(path, GREEN)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    changed = data.load(make_config(root))
    np.testing.assert_array_equal(changed.test.images[1, 0, 0], GREEN)
    assert changed.fingerprint != first.fingerprint
    assert decoded


def test_decoded_images_are_shared(root, monkeypatch):
    """Whatever is set aside, whatever a split is used as, and whatever it is called."""
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            for number in range(3):
                save(root / split / name / f"more{number}.png", GREEN)
    data.load(make_config(root))
    monkeypatch.setattr(base, "decode_image", None)
    for settings in (
        {"validation_examples": 2},
        {"validation_fraction": 0.3},
        {"title": "other"},
        {"pad": 1},
    ):
        data.load(make_config(root, **settings))
    (root / "test").rename(root / "elsewhere")
    assert len(data.load(make_config(root)).test) == 6
    (root / "val").rename(root / "away")
    data.load(make_config(root, test_fraction=0.3))


def test_image_size_resizes_the_shorter_side_and_cuts_the_centre(tmp_path):
    """Left third red, middle green, right blue: the centre square of 30x10 pixels is green."""
    root = tmp_path / "images"
    stripes = np.repeat(np.array([RED, GREEN, BLUE], np.uint8), 10, axis=0)[None].repeat(10, axis=0)
    for split in ("train", "test"):
        for name, array in (("wide", stripes), ("tall", stripes.swapaxes(0, 1))):
            save(root / split / name / "0.png", RED)
            Image.fromarray(array).save(root / split / name / "0.png")
    for size in (10, 5, 20):
        images = data.load(make_config(root, image_size=size)).train.images
        assert images.shape == (2, size, size, 3)
        inside = images[:, size // 4 : -size // 4, size // 4 : -size // 4]
        np.testing.assert_array_equal(inside, np.broadcast_to(GREEN, inside.shape))
    exact = data.load(make_config(root, image_size=10)).train.images
    np.testing.assert_array_equal(exact, np.broadcast_to(GREEN, exact.shape))


def encode(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def test_downscaling_is_antialiased():
    """A one-pixel chequerboard shrinks to even grey, not to stripes."""
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    inside = base.decode_image(encode(Image.fromarray(board)), 4)[1:-1, 1:-1]
    assert np.abs(inside.astype(int) - 127).max() <= 2


def png(bit_depth, colour_type, rows, *chunks):
    """A PNG file put together by hand (PNG specification, 11.2 and 11.3): Pillow does not write all kinds."""

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    pixels = 8 * len(rows[0]) // (bit_depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type])
    header = struct.pack(">IIBBBBB", pixels, len(rows), bit_depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    middle = b"".join(chunk(kind, content) for kind, content in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", data) + chunk(b"IEND", b"")


GREY, WHITE, BLACK = (127,) * 3, (255,) * 3, (0,) * 3
PALETTE = (b"PLTE", bytes([*RED, *GREEN, *BLUE]))


def on_white(colour, alpha):
    """alpha * colour + (1 - alpha) * white, rounded."""
    return tuple(round((value * alpha + 255 * (255 - alpha)) / 255) for value in colour)


PNGS = {
    "grey": (png(8, 0, [bytes([0, 9, 255])]), [BLACK, (9,) * 3, WHITE]),
    "1-bit": (png(1, 0, [b"\xa0"]), [WHITE, BLACK, WHITE, BLACK, BLACK, BLACK, BLACK, BLACK]),
    # 0 .. 3 of 3: thirds of 255.
    "2-bit": (png(2, 0, [b"\x1b"]), [BLACK, (85,) * 3, (170,) * 3, WHITE]),
    # value / 257, for 65535 / 257 = 255.
    "16-bit": (
        png(16, 0, [struct.pack(">4H", 0, 257, 128 * 257, 65535)]),
        [BLACK, (1,) * 3, (128,) * 3, WHITE],
    ),
    "16-bit-transparent": (
        png(16, 0, [struct.pack(">2H", 128 * 257, 5 * 257)], (b"tRNS", struct.pack(">H", 128 * 257))),
        [WHITE, (5,) * 3],
    ),
    "16-bit-colour": (png(16, 2, [struct.pack(">3H", 0, 257 * 9, 65535)]), [(0, 9, 255)]),
    "colour": (png(8, 2, [bytes([9, 8, 7])]), [(9, 8, 7)]),
    "transparent-colour": (
        png(8, 2, [bytes([9, 8, 7, 1, 2, 3])], (b"tRNS", struct.pack(">3H", 9, 8, 7))),
        [WHITE, (1, 2, 3)],
    ),
    "transparent-grey": (
        png(8, 0, [bytes([0, 9])], (b"tRNS", struct.pack(">H", 9))),
        [BLACK, WHITE],
    ),
    "palette": (png(8, 3, [bytes([0, 1, 2])], PALETTE), [RED, GREEN, BLUE]),
    "transparent-palette": (
        png(8, 3, [bytes([0, 1, 2])], PALETTE, (b"tRNS", bytes([255, 0, 100]))),
        [RED, WHITE, on_white(BLUE, 100)],
    ),
    "grey-alpha": (
        png(8, 4, [bytes([9, 255, 9, 0, 9, 51])]),
        [(9,) * 3, WHITE, on_white((9,) * 3, 51)],
    ),
    "alpha": (
        png(8, 6, [bytes([9, 8, 7, 255, 9, 8, 7, 0, 200, 100, 50, 51])]),
        [(9, 8, 7), WHITE, on_white((200, 100, 50), 51)],
    ),
}


@pytest.mark.parametrize("kind", PNGS)
def test_every_kind_of_png_becomes_rgb(kind):
    encoded, expected = PNGS[kind]
    np.testing.assert_array_equal(base.decode_image(encoded), [expected])


def jpeg_without_adobe(encoded):
    """A JPEG file without its APP14 segment, by which Adobe says that the inks are inverted."""
    start = encoded.index(b"\xff\xee")
    length = struct.unpack(">H", encoded[start + 2 : start + 4])[0]
    assert encoded[start + 4 :].startswith(b"Adobe")
    return encoded[:start] + encoded[start + 2 + length :]


@pytest.mark.parametrize(
    ("inks", "expected"),
    [
        # (1 - ink) * (1 - black) of 255: without red, half as bright, and mixed.
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 128), (127, 127, 127)),
        ((51, 102, 0, 51), (163, 122, 204)),
        ((0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_cmyk_jpeg_becomes_rgb(inks, expected):
    """Adobe's inks are stored inverted, as Pillow writes them; without the mark they mean themselves."""
    adobe = encode(Image.new("CMYK", (8, 8), inks), "JPEG", quality=100)
    inverted = encode(Image.new("CMYK", (8, 8), tuple(255 - ink for ink in inks)), "JPEG", quality=100)
    for encoded in (adobe, jpeg_without_adobe(inverted)):
        decoded = base.decode_image(encoded).astype(int)
        # A grey level of 255, by which JPEG rounds.
        np.testing.assert_allclose(decoded, np.broadcast_to(expected, (8, 8, 3)), atol=1)


def test_other_formats_under_a_wrong_name_become_rgb():
    image = Image.new("RGB", (2, 2), (9, 8, 7))
    for file_format, options in (("BMP", {}), ("WEBP", {"lossless": True}), ("GIF", {})):
        np.testing.assert_array_equal(
            base.decode_image(encode(image, file_format, **options))[0, 0], (9, 8, 7)
        )


# What is seen at the top left, top right, bottom left and bottom right of an image whose stored corners, in
# that order, are 0, 1, 2, 3 (EXIF 2.3, tag 0x0112: where the stored row 0 and column 0 are shown).
ORIENTATIONS = {
    1: (0, 1, 2, 3),
    2: (1, 0, 3, 2),
    3: (3, 2, 1, 0),
    4: (2, 3, 0, 1),
    5: (0, 2, 1, 3),
    6: (2, 0, 3, 1),
    7: (3, 1, 2, 0),
    8: (1, 3, 0, 2),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_applied(orientation):
    colours = [RED, GREEN, BLUE, WHITE]
    stored = Image.new("RGB", (32, 16))
    for corner, colour in enumerate(colours):
        left, top = 16 * (corner % 2), 8 * (corner // 2)
        stored.paste(colour, (left, top, left + 16, top + 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = base.decode_image(encode(stored, "JPEG", exif=exif, quality=100, subsampling=0)).astype(int)
    assert shown.shape == ((32, 16, 3) if orientation >= 5 else (16, 32, 3))
    seen = [shown[row, column] for row in (3, -4) for column in (3, -4)]
    np.testing.assert_allclose(seen, [colours[corner] for corner in ORIENTATIONS[orientation]], atol=1)


@pytest.mark.parametrize("exif", [b"no TIFF header", b"II*\0"])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_does_not_matter(file_format, exif):
    encoded = encode(Image.new("RGB", (8, 8), GREY), file_format, exif=b"Exif\0\0" + exif)
    lossy = file_format != "PNG"  # by a grey level of 255
    np.testing.assert_allclose(base.decode_image(encoded)[4, 4].astype(int), GREY, atol=1 * lossy)


def damage(root, kind):
    """Damages the tree in one way; returns the words that the error must have."""
    train_bee = root / "train/bee/b.png"
    if kind == "missing root":
        shutil.rmtree(root)
        return [str(root), "does not exist"]
    if kind == "root is a file":
        shutil.rmtree(root)
        root.touch()
        return [str(root), "is a file"]
    if kind == "empty root":
        shutil.rmtree(root)
        root.mkdir()
        return [str(root), "is empty", "train/<class>"]
    if kind == "no test":
        (root / "test").rename(root / "testing")
        return [str(root), "no folder test", "testing"]
    if kind == "no classes":
        shutil.rmtree(root / "test")
        (root / "test").mkdir()
        return [f"{root}/test", "no class folders"]
    if kind == "empty classes":
        (root / "train/cat").mkdir()
        (root / "test/ant/y.png").unlink()
        return ["train/cat", "test/ant"]
    if kind == "other classes":
        (root / "test/bee").rename(root / "test/wasp")
        return ["only in train: bee", "only in test: wasp"]
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
        encoded = encode(Image.fromarray(noise))
        train_bee.write_bytes(encoded[: len(encoded) // 2])
        return [str(train_bee), "cannot be decoded", "replace or remove"]
    if kind == "truncated jpeg":
        encoded = encode(Image.new("RGB", (6, 4), RED), "JPEG")
        train_bee.with_suffix(".jpg").write_bytes(encoded[: len(encoded) - 20])
        return [str(train_bee.with_suffix(".jpg")), "cannot be decoded"]
    if kind == "0 bytes":
        train_bee.write_bytes(b"")
        return [str(train_bee), "0 bytes"]
    if kind == "text":
        train_bee.write_text("hello")
        return [str(train_bee), "not a PNG or JPEG image"]
    if kind == "size":
        save(train_bee, RED, (5, 4))
        return [f"{train_bee} is 5x4 pixels", "6x4", "config.data.image_size"]
    if kind == "size in test":
        save(root / "test/ant/y.png", RED, (7, 7))
        save(root / "test/bee/z.png", RED, (7, 7))
        return ["(4, 6, 3)", "(7, 7, 3)", "config.data.image_size"]
    if kind == "dangling link":
        train_bee.unlink()
        train_bee.symlink_to(root / "nowhere.png")
        return [str(train_bee)]
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "missing root",
        "root is a file",
        "empty root",
        "no test",
        "no classes",
        "empty classes",
        "other classes",
        "truncated",
        "truncated jpeg",
        "0 bytes",
        "text",
        "size",
        "size in test",
        "dangling link",
    ],
)
def test_bad_folders_are_dataset_errors(root, kind):
    words = damage(root, kind)
    with pytest.raises(DatasetError) as caught:
        data.load(make_config(root))
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


def test_folder_is_required():
    with pytest.raises(DatasetError, match=r"config\.data\.data_dir is not set"):
        data.load(make_config("", cache_dir=""))


def test_a_file_that_vanishes_while_decoding_is_named(root, monkeypatch):
    decode_image = base.decode_image

    def vanish(*args):
        (root / "train/bee/b.png").unlink(missing_ok=True)
        return decode_image(*args)

    monkeypatch.setattr(base, "decode_image", vanish)
    with pytest.raises(DatasetError, match=r"Cannot read .*b\.png"):
        data.load(make_config(root))


def test_linked_folders_are_followed_once(root):
    (root / "train/bee/loop").symlink_to(root / "train/bee")
    shutil.move(root / "train/ant", root.parent / "elsewhere")
    (root / "train/ant").symlink_to(root.parent / "elsewhere")
    np.testing.assert_array_equal(data.load(make_config(root)).train.labels, [0, 1, 1])


def test_of_two_links_the_same_is_followed_on_any_disk(root, monkeypatch):
    """Disks list a folder in orders of their own; what is read, and under which name, must not."""
    for name in ("once", "twice"):
        (root / f"train/bee/{name}").symlink_to(root / "train/bee/deep")
    listed, scandir = [], os.scandir
    for reverse in (False, True):

        @contextlib.contextmanager
        def ordered(path, reverse=reverse):
            with scandir(path) as entries:
                yield sorted(entries, key=lambda entry: entry.name, reverse=reverse)

        monkeypatch.setattr(os, "scandir", ordered)
        listed.append(folder_lib._walk(root / "train/bee")[0])
    assert listed[0] == listed[1]
    assert len(listed[0]) == 2
