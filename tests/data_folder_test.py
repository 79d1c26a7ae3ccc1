import io
import os
import shutil

import ml_collections
import numpy as np
import pytest
from PIL import Image

from ffl_jax import data
from ffl_jax.data import base
from ffl_jax.errors import DatasetError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def make_config(root, **settings):
    defaults = {"name": "folder", "data_dir": str(root), "manual_dir": "", "cache_dir": f"{root}_cache"}
    defaults |= {"validation_examples": 0, "image_size": 0, "streaming": False, "workers": 0}
    return ml_collections.ConfigDict(defaults | {"crop": "pad", "mean": (), "std": ()} | settings)


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


def grey_16_bit():
    return Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], np.uint16))


def palette(**options):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    image.putpalette([*RED, *GREEN, *BLUE])
    return encode(image, **options)


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (encode(Image.fromarray(np.array([[0, 9, 255]], np.uint8))), [(0,) * 3, (9,) * 3, (255,) * 3]),
        (encode(grey_16_bit()), [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]),
        (encode(Image.new("1", (1, 1), 1)), [(255,) * 3]),
        (palette(), [RED, GREEN, BLUE]),
        (palette(transparency=1), [RED, (255, 255, 255), BLUE]),
        (encode(Image.new("RGBA", (1, 1), (9, 8, 7, 255))), [(9, 8, 7)]),
        (encode(Image.new("RGBA", (1, 1), (9, 8, 7, 0))), [(255, 255, 255)]),
        (encode(Image.new("LA", (1, 1), (9, 255))), [(9, 9, 9)]),
    ],
    ids=["grey", "16-bit", "1-bit", "palette", "transparent-palette", "opaque", "transparent", "grey-alpha"],
)
def test_every_kind_of_png_becomes_rgb(encoded, expected):
    np.testing.assert_array_equal(base.decode_image(encoded), [expected])


def test_cmyk_jpeg_becomes_rgb():
    cyan = base.decode_image(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))
    np.testing.assert_allclose(cyan, np.broadcast_to((0, 255, 255), (8, 8, 3)), atol=3)


def test_exif_orientation_is_applied():
    """Orientation 6: the stored top row is shown as the right column (EXIF 2.3, tag 0x0112)."""
    stored = Image.new("RGB", (16, 32), BLUE)
    stored.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = base.decode_image(encode(stored, "JPEG", exif=exif, quality=100))
    assert shown.shape == (16, 32, 3)
    np.testing.assert_allclose(shown[8, 28].astype(int), RED, atol=5)
    np.testing.assert_allclose(shown[8, 4].astype(int), BLUE, atol=5)


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
