"""What every data source shares: the containers, the registry, decoding, digests."""

import abc
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterable, Sequence

import numpy as np

from ffl_jax.errors import DatasetError, FFLError, ResourceError
from ffl_jax.registry import Registry

SOURCES = Registry("dataset")  # of functions load(config) -> (train Split, test Split, class names)
_CHUNK = 256  # images per task: large enough that handing tasks to threads costs nothing
# Wrongly named files are common, so a few more formats than the extensions say; none that runs a program.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")


@dataclasses.dataclass(frozen=True)
class Split:
    """Attributes: images, uint8 [N, H, W, 3]; labels, int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of what networks see."""
        return self.images.shape[1:]

    def take(self, chosen: np.ndarray) -> "Split":
        """The examples that a boolean mask [N] chooses, in the same order."""
        return Split(self.images[chosen], self.labels[chosen])


class Records(abc.ABC):
    """Encoded images with their labels, read when they are asked for, from any thread and any process.

    Attributes:
      identity: changes with the files' names and sizes and with what says how they are labelled, but not with
        a file's content where its size stays.
      remedy: what to do about a damaged one, for errors.
    """

    identity: str
    remedy: str

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, positions: Sequence[int]) -> Iterable[tuple[str, bytes, int]]:
        """(where it comes from, its encoded bytes, its label) of each position, one after another.

        Raises:
          DatasetError: naming what is missing or damaged.
        """


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """A split of which nothing is in memory but the numbers of its records.

    Attributes:
      records: of the whole source split.
      positions: which of them belong to it, int32 [N].
      image_size: pixels, the sides of what networks see.
    """

    records: Records
    positions: np.ndarray
    image_size: int

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of what networks see."""
        return self.image_size, self.image_size, 3

    def take(self, chosen: np.ndarray) -> "StreamedSplit":
        """The examples that a boolean mask [N] chooses, in the same order."""
        return dataclasses.replace(self, positions=self.positions[chosen])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset; `fingerprint` changes with any pixel, label, class name or split.

    Where it is streamed, `fingerprint` changes with the names and sizes of its files, as `Records.identity`.
    """

    name: str
    train: Split | StreamedSplit
    test: Split | StreamedSplit
    class_names: tuple[str, ...]
    fingerprint: str
    validation: Split | StreamedSplit | None = None


def digest(*parts: str | np.ndarray) -> str:
    """SHA-256 over strings and arrays, with their types and shapes: 64 hexadecimal digits."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            part = np.frombuffer(part.encode("utf-8", "surrogateescape"), np.uint8)
            kind = "str"
        else:
            kind = part.dtype.str
        sha.update(f"{kind}{part.shape};".encode())
        sha.update(np.ascontiguousarray(part).data)
    return sha.hexdigest()


@contextlib.contextmanager
def damage_named(where: str, encoded: bytes, remedy: str):
    """Turns what goes wrong while an image is decoded inside into a DatasetError of one line."""
    try:
        yield
    except (FFLError, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen types, SyntaxError among them.
        reason = str(error) if encoded else "it has 0 bytes"
        if "cannot identify" in reason:
            reason = "it is not a PNG or JPEG image"
        raise DatasetError(f"{where} cannot be decoded: {reason}; {remedy}.") from error


def open_image(encoded: bytes):
    """A Pillow image of one file, not yet decoded; a context manager."""
    from PIL import Image

    return Image.open(io.BytesIO(encoded), formats=_FORMATS)


def orientation(image) -> int:
    """The EXIF orientation of a Pillow image, 1 .. 8; 1 is upright."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # Broken metadata, of whatever kind, does not make an image unusable.
        return 1


def to_rgb(image):
    """Decodes a Pillow image to RGB, upright as its EXIF orientation says.

    Grey becomes three equal channels, 16-bit grey is scaled by 1 / 257, transparent pixels become white.
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
        grey = np.rint(values / 257).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif plain_cmyk:
        image = ImageChops.invert(image)
    return image.convert("RGB")


def decode_image(encoded: bytes, image_size: int = 0) -> np.ndarray:
    """Decodes one image file to uint8 RGB [H, W, 3], as `to_rgb`.

    Args:
      encoded: the bytes of the file.
      image_size: if positive, the shorter side is resized to it and the centre square cut out, in pixels.
    """
    from PIL import Image

    with open_image(encoded) as opened:
        image = to_rgb(opened)
    shorter = min(image.size)
    if image_size and shorter != image_size:
        size = tuple(round(side * image_size / shorter) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    if image_size and image.size != (image_size, image_size):
        left, top = ((side - image_size) // 2 for side in image.size)
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image)


def decode_all(records: Records, image_size: int, title: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes all images in parallel, all to one size: uint8 [N, H, W, 3], and their labels, int64 [N].

    Args:
      records: at least one; read from many threads.
      image_size: as for `decode_image`; with 0 all images must have the size of the first.
      title: of the progress bar, which shows on terminals when decoding takes longer than a second.

    Raises:
      DatasetError: naming the first image, in order of position, that cannot be used. None is skipped.
    """
    import tqdm

    def decode(where: str, encoded: bytes) -> np.ndarray:
        with damage_named(where, encoded, records.remedy):
            return decode_image(encoded, image_size)

    count = len(records)
    ((first_where, first_encoded, _),) = records.read([0])
    first = decode(first_where, first_encoded)
    labels = np.empty(count, np.int64)
    try:
        images = np.empty((count, *first.shape), np.uint8)
    except MemoryError as error:
        gigabytes = count * first.nbytes / 1e9
        raise ResourceError(
            f"{title}: {count} images of {first.shape[1]}x{first.shape[0]} pixels need {gigabytes:.1f} GB of "
            f"memory; set a smaller config.data.image_size, or config.data.streaming=True."
        ) from error

    def fill(chunk: range) -> int:
        for position, (where, encoded, label) in zip(chunk, records.read(chunk), strict=True):
            image = decode(where, encoded)
            if image.shape != first.shape:
                raise DatasetError(
                    f"{where} is {image.shape[1]}x{image.shape[0]} pixels, but {first_where} is "
                    f"{first.shape[1]}x{first.shape[0]}: set config.data.image_size to bring all to one size."
                )
            images[position], labels[position] = image, label
        return len(chunk)

    # Threads pass the interpreter lock around more than they decode where images are tiny: few are faster.
    executor = concurrent.futures.ThreadPoolExecutor(4 if len(first_encoded) < 4096 else None)
    try:
        chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        futures = [executor.submit(fill, chunk) for chunk in chunks]
        with tqdm.tqdm(total=count, desc=title, unit="image", delay=1, leave=False, disable=None) as bar:
            for future in futures:
                bar.update(future.result())
    finally:  # An error or a signal ends the run at once, not after the images that are left.
        executor.shutdown(cancel_futures=True)
    return images, labels
