"""From encoded images to splits: decoded once into memory, or left where they are, to be streamed."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from ffl_jax.data import base, cache, images
from ffl_jax.errors import DatasetError


@dataclasses.dataclass(frozen=True)
class Listing:
    """Image files: their paths, sorted, and int64 [N, 3], their size, modification and change time (ns).

    `left_out` is {suffix: count} of the files that are no images by their names, `litter` {name: count} of
    what is hidden or the system's own; `refused` says which files cannot be read, and why.
    """

    paths: list[str]
    states: np.ndarray
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    litter: Mapping[str, int] = dataclasses.field(default_factory=dict)
    refused: Sequence[str] = ()


class Files(base.Records):
    """One image a file."""

    remedy = "replace or remove the file"

    def __init__(self, root: str | os.PathLike, listing: Listing, labels: Sequence[int]):
        """Args: root: a folder above all files; the identity does not know it. labels: of the files."""
        self._root, self.labels = os.fspath(root), np.asarray(labels, np.int32)
        names = [os.fsencode(os.path.relpath(path, root)) for path in listing.paths]
        # A million str objects would take 100 MB, in every worker process again.
        self._names = np.frombuffer(b"".join(names), np.uint8)
        self._ends = np.cumsum([0, *map(len, names)])
        self.identity = base.digest(self._names, self._ends, listing.states[:, 0], self.labels)
        # With the root, so that two trees whose files agree in size and time are never taken for one another.
        # The change time cannot be set by hand: a restored old time is seen, too.
        self.source = base.digest(self._root, self._names, self._ends, listing.states)

    def __len__(self):
        return len(self.labels)

    def read(self, positions):
        for position in positions:
            begin, end = self._ends[position : position + 2]
            path = os.path.join(self._root, os.fsdecode(self._names[begin:end].tobytes()))
            try:
                encoded = images.read_file(path)
            except OSError as error:
                raise DatasetError(f"Cannot read {path}: {error.strerror}; restore or remove it.") from error
            yield path, encoded, int(self.labels[position])


def splits(
    config, name: str, records: Mapping[str, base.Records]
) -> tuple[base.Split | base.StreamedSplit, ...]:
    """The splits of a source, in memory or to be streamed, as the configuration says.

    Args:
      config: the `data` section.
      name: a readable start for the cache files' names.
      records: of each split, by its name.
    """
    if config.streaming:
        return tuple(
            base.StreamedSplit(one, np.arange(len(one), dtype=np.int32), config.image_size, config.max_value)
            for one in records.values()
        )
    return tuple(_decoded(config, name, split, one) for split, one in records.items())


def _decoded(config, name: str, split: str, records: base.Records) -> base.Split:
    """One split in memory. Each has a cache file of its own, whatever it is used as and beside what."""

    def build() -> cache.Arrays:
        title = f"Decoding {name} {split}"
        pixels, labels = base.decode_all(records, config.image_size, title, config.max_value)
        return {"images": pixels, "labels": labels}

    source = f"{config.image_size}\0{config.max_value}\0{records.source}"
    arrays = cache.cached(name, source, config.cache_dir, build, config.cache_gigabytes)
    # Those of files are not part of the source: a table, say, may have been corrected.
    labels = arrays["labels"] if records.labels is None else records.labels
    return base.Split(arrays["images"], labels)
