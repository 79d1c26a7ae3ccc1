"""What every data source shares: the containers, the registry, parallel decoding, digests."""

import concurrent.futures
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable

import numpy as np
import tqdm

from ffl_jax.errors import DatasetError, ResourceError
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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of what networks see."""
        return self.images.shape[1:]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A whole dataset in memory; `fingerprint` changes with any pixel, label, class name or split."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str
    validation: Split | None = None


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


def decode_image(encoded: bytes, image_size: int = 0) -> np.ndarray:
    """Decodes one image file to uint8 RGB [H, W, 3], upright as its EXIF orientation says.

    Grey becomes three equal channels, 16-bit grey is scaled by 1 / 257, transparent pixels become white.

    Args:
      encoded: the bytes of the file.
      image_size: if positive, the shorter side is resized to it and the centre square cut out, in pixels.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(encoded), formats=_FORMATS) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit values at 255.
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    shorter = min(image.size)
    if image_size and shorter != image_size:
        size = tuple(round(side * image_size / shorter) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    if image_size and image.size != (image_size, image_size):
        left, top = ((side - image_size) // 2 for side in image.size)
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image)


def decode_all(
    read: Callable[[range], Iterable[tuple[str, bytes]]],
    count: int,
    image_size: int,
    title: str,
    remedy: str,
) -> np.ndarray:
    """Decodes images 0 .. count - 1 in parallel, all to one size: uint8 [count, H, W, 3].

    Args:
      read: a range of positions -> (where the image comes from, its encoded bytes), one after another; it is
        called from many threads.
      count: number of images, at least 1.
      image_size: as for `decode_image`; with 0 all images must have the size of the first.
      title: of the progress bar, which shows on terminals when decoding takes longer than a second.
      remedy: what to do about a damaged image, for the error.

    Raises:
      DatasetError: naming the first image, in order of position, that cannot be used. None is skipped.
    """

    def decode(where: str, encoded: bytes) -> np.ndarray:
        try:
            return decode_image(encoded, image_size)
        except Exception as error:  # Pillow raises a dozen types, SyntaxError among them.
            reason = str(error) if encoded else "it has 0 bytes"
            if "cannot identify" in reason:
                reason = "it is not a PNG or JPEG image"
            raise DatasetError(f"{where} cannot be decoded: {reason}; {remedy}.") from error

    (first_where, first_encoded), *_ = read(range(1))
    first = decode(first_where, first_encoded)
    try:
        images = np.empty((count, *first.shape), np.uint8)
    except MemoryError as error:
        gigabytes = count * first.nbytes / 1e9
        raise ResourceError(
            f"{title}: {count} images of {first.shape[1]}x{first.shape[0]} pixels need {gigabytes:.1f} GB of "
            f"memory; set a smaller config.data.image_size."
        ) from error

    def fill(chunk: range) -> int:
        for position, (where, encoded) in zip(chunk, read(chunk), strict=True):
            image = decode(where, encoded)
            if image.shape != first.shape:
                raise DatasetError(
                    f"{where} is {image.shape[1]}x{image.shape[0]} pixels, but {first_where} is "
                    f"{first.shape[1]}x{first.shape[0]}: set config.data.image_size to bring all to one size."
                )
            images[position] = image
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
    return images
