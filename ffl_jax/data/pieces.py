"""Pieces of batches of streamed data: each a pure function of the configuration and its number.

A worker process makes one at a time, whichever it is asked for.
"""

import dataclasses
import functools
import sys

import numpy as np

from ffl_jax.data import base, crops, resident, sampling
from ffl_jax.data import images as images_lib

# Images of a piece: few enough that all workers begin with the first batch and that one stops within half a
# second, enough that handing it over costs nothing.
SIZE = 32


@dataclasses.dataclass(frozen=True, eq=False)  # hashed as the object that it is, for `_balanced_order`
class Pieces:
    """The pieces of one process's share of all batches, in order, for Grain to index.

    Attributes:
      split: what is read.
      batch_size: of all processes together.
      process: (index, count): the rows of a batch that are this process's, an equal part of consecutive ones.
    """

    split: base.StreamedSplit
    batch_size: int
    process: tuple[int, int]

    @property
    def per_batch(self) -> int:
        return -(-self._share // SIZE)

    @property
    def _share(self) -> int:
        return self.batch_size // self.process[1]

    @property
    def piece_bytes(self) -> int:
        """At most, of one piece's images."""
        return min(SIZE, self._share) * int(np.prod(self.split.image_shape))

    def _rows(self, number: int) -> tuple[int, np.ndarray]:
        """(number of the batch, which rows of it) of a piece."""
        batch, piece = divmod(number, self.per_batch)
        first = self.process[0] * self._share
        return batch, first + np.arange(piece * SIZE, min((piece + 1) * SIZE, self._share))

    def _images(self, indices: np.ndarray, decode) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images, decode(which of `indices`, encoded bytes) of each, and int32 labels."""
        records = self.split.records
        images, labels = [], []
        read = records.read(self.split.positions[indices])
        for row, (where, encoded, label) in enumerate(read):
            with images_lib.damage_named(where, encoded, records.remedy):
                images.append(decode(row, encoded))
            labels.append(label)
        return np.stack(images), np.array(labels, np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainPieces(Pieces):
    """Attributes: seed, crop, flip, sampling: settings. views: of each image, or 0."""

    seed: int
    crop: str
    flip: bool
    views: int
    sampling: str = "shuffled"

    @property
    def piece_bytes(self):
        return super().piece_bytes * (self.views or 1)

    @property
    def steps_per_epoch(self) -> int:
        return resident.steps_per_epoch(len(self.split), self.batch_size)

    def __len__(self):
        return sys.maxsize  # one epoch after the other, as long as anyone asks

    def __getitem__(self, number):
        """(uint8 images [P, H, W, 3] or [P, views, H, W, 3], labels [P], places in the split [P]).

        With balanced sampling the fourth tells the times apart that the epoch has an image, [P].
        """
        step, rows = self._rows(number)
        epoch, position = divmod(step, self.steps_per_epoch)
        places = position * self.batch_size + rows
        if self.sampling == "balanced":
            drawn = tuple(x[places] for x in _balanced_order(self, epoch))
        else:
            order = epoch_order(self.seed, epoch, len(self.split))
            drawn = (order[places % len(order)],)
        images, labels = self._images(drawn[0], functools.partial(self._decode, epoch, *drawn))
        return images, labels, *drawn

    def _decode(self, epoch, indices, *given):
        *repeats, row, encoded = given
        size, max_value = self.split.image_size, self.split.max_value
        if self.crop == "pad":  # the rest is done on the device
            return images_lib.decode_image(encoded, size, max_value)
        # What comes again in an epoch is cut anew.
        first = int(repeats[0][row]) << 32 if repeats else 0
        views = range(first, first + (self.views or 1))
        generators = [_generator(self.seed, 1, epoch, indices[row], view) for view in views]
        images = crops.random_resized(encoded, size, generators, self.flip, max_value)
        return images if self.views else images[0]


@dataclasses.dataclass(frozen=True)
class EvalPieces(Pieces):
    """Attributes: crop: setting."""

    crop: str

    @property
    def batches(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __len__(self):
        return self.batches * self.per_batch

    def __getitem__(self, number):
        """(uint8 images [P, H, W, 3], labels [P], weights [P]); what fills the last batch up is black."""
        batch, rows = self._rows(number)
        indices = batch * self.batch_size + rows
        weights = (indices < len(self.split)).astype(np.float32)
        images = np.zeros((len(rows), *self.split.image_shape), np.uint8)
        labels = np.zeros(len(rows), np.int32)
        count = int(weights.sum())
        if count:
            images[:count], labels[:count] = self._images(indices[:count], self._decode)
        return images, labels, weights

    def _decode(self, row, encoded):
        return crops.evaluation_image(encoded, self.crop, self.split.image_size, self.split.max_value)


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """A permutation, int32 [num_examples], drawn on the host."""
    return _generator(seed, 0, epoch).permutation(num_examples).astype(np.int32)


@functools.lru_cache(maxsize=2)
def _balanced_order(pieces: TrainPieces, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    count = pieces.steps_per_epoch * pieces.batch_size
    return sampling.balanced_order(pieces.seed, epoch, pieces.split.labels, count)


def _generator(seed: int, use: int, epoch: int, index: int = 0, view: int = 0) -> np.random.Generator:
    """Random numbers of their own for each place: Philox counts, so that none needs the one before."""
    # The lowest word is what drawing counts up.
    counter = np.array([0, view, index, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, use], np.uint64), counter=counter))
