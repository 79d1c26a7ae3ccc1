"""What every data source shares: the containers, the registry, decoding of whole splits, digests."""

import abc
import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ffl_jax.data import limits
from ffl_jax.data.images import damage_named, decode_image
from ffl_jax.errors import DatasetError, ResourceError
from ffl_jax.registry import Registry

SOURCES = Registry("dataset")  # of functions load(config) -> (train Split, test Split, class names)
FILES = Registry("kind of file")  # suffix of a file that `config.data_dir` may name -> such a function
_CHUNK = 256  # images per task: large enough that handing tasks to threads costs nothing


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
      source: the same, and with the places of files and when they were changed: what is kept of decoded
        images is known by it.
      labels: integers [N], where they are known before anything is read.
      remedy: what to do about a damaged one, for errors.
    """

    identity: str
    source: str
    labels: np.ndarray | None = None
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
      max_value: what is white in greys of more than 8 bits.
    """

    records: Records
    positions: np.ndarray
    image_size: int
    max_value: int = limits.MAX_GREY

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def labels(self) -> np.ndarray | None:
        """Integers [N], or None where they are not known before anything is read."""
        return None if self.records.labels is None else self.records.labels[self.positions]

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


def check_memory(needed: int, title: str) -> None:
    """Raises ResourceError where so many bytes are more than the machine has, which else kills who asks."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # some systems do not tell
        return
    if needed > there:
        raise ResourceError(
            f"{title} needs {needed / 1e9:.1f} GB of memory, and this machine has {there / 1e9:.1f} GB: take "
            "fewer images, or, of files, set config.data.image_size lower, or config.data.streaming=True."
        )


def decode_all(
    records: Records, image_size: int, title: str, max_value: int = limits.MAX_GREY
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes all images in parallel, all to one size: uint8 [N, H, W, 3], and their labels, int64 [N].

    Args:
      records: at least one; read from many threads.
      image_size: as for `decode_image`; with 0 all images must have the size of the first.
      title: of the progress bar, which shows on terminals when decoding takes longer than a second.
      max_value: as for `decode_image`.

    Raises:
      DatasetError: naming the first image, in order of position, that cannot be used. None is skipped.
    """

    def decode(where: str, encoded: bytes) -> np.ndarray:
        with damage_named(where, encoded, records.remedy):
            return decode_image(encoded, image_size, max_value)

    count = len(records)
    ((first_where, first_encoded, _),) = records.read([0])
    first = decode(first_where, first_encoded)
    labels = np.empty(count, np.int64)
    check_memory(count * first.nbytes, title)
    try:
        images = np.empty((count, *first.shape), np.uint8)
    except MemoryError as error:
        gigabytes = count * first.nbytes / 1e9
        raise ResourceError(
            f"{title}: {count} images of {first.shape[1]}x{first.shape[0]} pixels need {gigabytes:.1f} GB of "
            f"memory; set a smaller config.data.image_size, or config.data.streaming=True."
        ) from error

    def fill(chunk: range) -> None:
        for position, (where, encoded, label) in zip(chunk, records.read(chunk), strict=True):
            image = decode(where, encoded)
            if image.shape != first.shape:
                raise DatasetError(
                    f"{where} is {image.shape[1]}x{image.shape[0]} pixels, but {first_where} is "
                    f"{first.shape[1]}x{first.shape[0]}: set config.data.image_size to bring all to one size."
                )
            images[position], labels[position] = image, label

    # Threads pass the interpreter lock around more than they decode where images are tiny: few are faster.
    for _ in in_threads(fill, count, title, 4 if len(first_encoded) < 4096 else None):
        pass
    return images, labels


def in_threads(work: Callable[[range], Any], count: int, title: str, threads: int | None = None) -> Iterator:
    """What `work` gives for each of the consecutive parts of range(count), in order, behind a progress bar.

    An error or a signal ends it at once, not after the parts that are left.
    """
    import tqdm

    executor = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        futures = [executor.submit(work, chunk) for chunk in chunks]
        with tqdm.tqdm(total=count, desc=title, unit="image", delay=1, leave=False, disable=None) as bar:
            for chunk, future in zip(chunks, futures, strict=True):
                yield future.result()
                bar.update(len(chunk))
    finally:
        executor.shutdown(cancel_futures=True)
