"""One image file, from its path to RGB pixels: what is opened at all, and what is decoded from it."""

import contextlib
import functools
import io
import logging
import os
import stat
import struct
import warnings
import zlib

import numpy as np

from ffl_jax.data.limits import MAX_FILE_BYTES, MAX_GREY, MAX_PIXELS, MAX_TEXT_BYTES
from ffl_jax.errors import DatasetError, FFLError, ResourceError
from ffl_jax.workdir import files

# Likely ones first. None runs a program, as EPS does, or is a mere stub.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM", "JPEG2000", "QOI", "ICO", "DIB", "PCX"),
    *("SGI", "TGA"),
)
# Of the seven passes of an interlaced PNG: first column, first row, and the steps between (PNG, 8.2).
_ADAM7 = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)


@functools.cache
def _pillow():
    """Pillow and those of `_FORMATS` that it reads here."""
    from PIL import Image, PngImagePlugin

    Image.init()
    # Of odd metadata and large images, which are used or refused in words of our own.
    warnings.filterwarnings("ignore", module="PIL")
    PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES, 4 * MAX_TEXT_BYTES
    return Image, tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    """How names of files end that can be read here, in lower case with the dot."""
    image, formats = _pillow()
    known = (*formats, "MPO")  # JPEG files with several pictures
    return frozenset(suffix for suffix, name in image.registered_extensions().items() if name in known)


def check_regular(path: str | os.PathLike, state: os.stat_result, limit: int = MAX_FILE_BYTES):
    """Raises DatasetError, without advice, for what never ends or begins when it is read, or is too large."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(state.st_mode):
        kind = kinds.get(stat.S_IFMT(state.st_mode), "a device")
        raise DatasetError(f"{os.fspath(path)} is {kind}, not a file")
    if state.st_size > limit:
        raise DatasetError(
            f"{os.fspath(path)} has {state.st_size / 1e9:.1f} GB, and at most {limit / 1e9:.1f} GB are read"
        )


def read_file(path: str | os.PathLike, limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
      OSError: it cannot be read.
      DatasetError: it is no regular file, or too large.
    """
    check_regular(path, os.stat(path), limit)
    return files.read_bytes(path, limit)


@contextlib.contextmanager
def damage_named(where: str, encoded: bytes, remedy: str):
    """Turns what goes wrong while an image is decoded inside into one line that names the image."""
    try:
        yield
    except FFLError:
        raise
    except MemoryError as error:
        raise ResourceError(f"{where}: not enough memory to decode this image; {remedy}.") from error
    except Exception as error:  # Pillow raises a dozen types, SyntaxError among them.
        reason = str(error) if encoded else "it has 0 bytes"
        if "cannot identify" in reason:
            reason = "it is not a PNG or JPEG image, nor any other that Pillow reads here"
        raise DatasetError(f"{where} cannot be decoded: {reason}; {remedy}.") from error


def open_image(encoded: bytes, whole: bool = True):
    """A Pillow image of one file, not yet decoded; a context manager.

    Args: whole: checks first what Pillow does not.

    Raises:
      ValueError: it has no pixels or too many; it is a PNG that is not as it was written.
      Exception: it is no image; Pillow has a dozen types.
    """
    image, formats = _pillow()
    opened = image.open(io.BytesIO(encoded), formats=formats)
    check_size(*opened.size)
    if whole and opened.format == "PNG":
        _check_png(encoded)
    return opened


def check_size(width: int, height: int, image_size: int = 0):
    """Raises ValueError for an image that has no pixels, or more than are decoded or resized to.

    Args: image_size: what its shorter side will be resized to; 0 if it will not.
    """
    if not min(width, height):
        raise ValueError(f"it has {width}x{height} pixels")
    scale = image_size / min(width, height)
    for what, factor in (("it has", 1.0), (f"with a shorter side of {image_size} it would have", scale)):
        if width * height * factor**2 > MAX_PIXELS:
            size = f"{round(width * factor)}x{round(height * factor)}"
            raise ValueError(f"{what} {size} pixels, and at most {MAX_PIXELS / 1e6:.0f} million are allowed")


def _check_png(encoded: bytes):
    """Raises ValueError unless all checksums of a PNG hold, and it has all its rows.

    Pillow leaves the checksums of pixels alone, and what is missing of them black.
    """
    view, place, kind = memoryview(encoded), 8, b""
    inflate, found, expected = zlib.decompressobj(), 0, 0
    while kind != b"IEND":
        if len(view) < place + 12:
            raise ValueError("image file is truncated")
        length, kind = struct.unpack_from(">I4s", view, place)
        content = view[place + 8 : place + 8 + length]
        checksum = bytes(view[place + 8 + length : place + 12 + length])
        if zlib.crc32(content, zlib.crc32(kind)).to_bytes(4, "big") != checksum:
            raise ValueError(f"it is damaged, its part at byte {place} does not match its checksum")
        if kind == b"IHDR":
            expected = _png_bytes(*struct.unpack(">IIBBBBB", content))
        elif kind == b"IDAT":
            for start in range(0, length, 2**16):  # in parts, to take little memory
                found += len(inflate.decompress(content[start : start + 2**16]))
        place += 12 + length
    if found < expected:
        raise ValueError(f"it is damaged, {expected - found} of {expected} bytes of its pixels are missing")


def _png_bytes(width, height, depth, colour, _compression, _filter, interlace) -> int:
    """How many bytes the pixels of a PNG unpack to: of each row, one for its filter, and its pixels."""
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    total = 0
    for left, top, step_x, step_y in _ADAM7 if interlace else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // step_x), -((top - height) // step_y)
        total += rows * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    return total


def orientation(image) -> int:
    """The EXIF orientation of a Pillow image, 1 .. 8; 1 is upright."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # Broken metadata, of whatever kind, does not make an image unusable.
        return 1


def grey_levels(values: np.ndarray, max_value: int = MAX_GREY) -> np.ndarray:
    """Greys of more than 8 bits, 0..max_value, to uint8, 0..255 and rounded.

    Raises:
      ValueError: some are outside.
    """
    if values.min() < 0 or values.max() > max_value:
        found = f"from {values.min()} to {values.max()}"
        meant = f"config.data.max_value={max_value} is white"
        if max_value == MAX_GREY:
            meant = "8-bit or 16-bit ones are needed"
        raise ValueError(f"it holds values outside 0..{max_value}, {found}, and {meant}")
    return np.rint(values / (max_value / 255)).astype(np.uint8)


def to_rgb(image, max_value: int = MAX_GREY):
    """Decodes a Pillow image to RGB, upright as its EXIF orientation says; of several pictures the first.

    Grey becomes three equal channels, transparent pixels become white.

    Args:
      max_value: what is white in greys of more than 8 bits, see `grey_levels`.

    Raises:
      ValueError: it holds other numbers than 8-bit and 16-bit ones.
    """
    from PIL import Image, ImageChops

    turn = Image.Transpose
    turns = (turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_270)
    turns = dict(enumerate((*turns, turn.TRANSVERSE, turn.ROTATE_90), 2))
    # Pillow takes every CMYK JPEG for one of Adobe's, whose inks are stored inverted.
    plain_cmyk = image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info
    if (turned := orientation(image)) in turns:
        image = image.transpose(turns[turned])
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit values at 255.
        values = np.asarray(image)
        grey = grey_levels(values, max_value)
        grey[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey)
    elif image.mode == "F":
        raise ValueError("it holds numbers with fractions, and 8-bit or 16-bit ones are needed")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif plain_cmyk:
        image = ImageChops.invert(image)
    return image.convert("RGB")


def decode_image(encoded: bytes, image_size: int = 0, max_value: int = MAX_GREY) -> np.ndarray:
    """Decodes one image file to uint8 RGB [H, W, 3], as `to_rgb`.

    Args:
      encoded: the bytes of the file.
      image_size: as for `resize`, in pixels.
      max_value: as for `to_rgb`.
    """
    with open_image(encoded) as opened:
        check_size(*opened.size, image_size)
        image = to_rgb(opened, max_value)
    return np.asarray(resize(image, image_size))


def resize_all(images: np.ndarray, image_size: int, where: str) -> np.ndarray:
    """uint8 RGB [N, H, W, 3], each as `resize`; says so. Args: where: they are from."""
    height, width = images.shape[1:3]
    if not image_size or (height, width) == (image_size, image_size):
        return images

    from PIL import Image

    check_size(width, height, image_size)
    logging.info("%s is brought from %dx%d to %dx%d pixels.", where, width, height, image_size, image_size)
    result = np.empty((len(images), image_size, image_size, 3), np.uint8)
    for index, one in enumerate(images):
        result[index] = resize(Image.fromarray(one), image_size)
    return result


def resize(image, image_size: int):
    """Brings the shorter side of a Pillow image to so many pixels, and cuts the centre out; 0 leaves it."""
    from PIL import Image

    shorter = min(image.size)
    if image_size and shorter != image_size:
        size = tuple(round(side * image_size / shorter) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    if image_size and image.size != (image_size, image_size):
        left, top = ((side - image_size) // 2 for side in image.size)
        image = image.crop((left, top, left + image_size, top + image_size))
    return image
