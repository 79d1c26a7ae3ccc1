"""What is in the images of a dataset, and all that cannot be used, in one pass."""

import collections
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping

import numpy as np
from ml_collections import ConfigDict

from ffl_jax.data import base, images, tfds
from ffl_jax.errors import ConfigError, FFLError


@dataclasses.dataclass
class Survey:
    """What is in the images of one split.

    Attributes:
      labels: integers of the images that can be used.
      sizes: {(width, height): count}, in pixels.
      modes: {Pillow's name for the kind of pixels: count}.
      bad: of each image that cannot be used, which one and why.
      digests: of what each image that can be used holds: of a file its bytes, of an array its pixels.
      white: the largest value of all greys with more than 8 bits, 0 where there are none.
      records: where they are from; None for arrays.
    """

    labels: list[int] = dataclasses.field(default_factory=list)
    sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    modes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bad: list[str] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    white: int = 0
    records: base.Records | None = None

    def __str__(self):
        sides = [sorted({min(side), max(side)}) for side in zip(*self.sizes, strict=True)]
        size = " x ".join(" to ".join(map(str, ends)) for ends in sides)
        modes = ", ".join(f"{mode} {count}" for mode, count in self.modes.most_common())
        return (
            f"{len(self.labels)} images of {size} pixels ({modes})" if sides else "no image that can be used"
        )

    def where(self, position: int) -> str:
        """Where an image is from."""
        if self.records is None:
            return f"image {position}"
        ((where, _, _),) = self.records.read([position])
        return where


def find(config) -> dict[str, base.Records]:
    """{role: files} of the splits that `data.load(config)` reads from files; {} where there are none.

    Raises:
      FFLError: as `data.load`, but not for an image.
    """
    settings = ConfigDict(config.to_dict() | {"streaming": True})  # to look at files, and decode none
    logging.disable(logging.WARNING)  # `load` says it again
    try:
        train, test, _, *validation = base.SOURCES.get(config.name, tfds.load)(settings)
    except ConfigError:  # of what is always in memory, or `load` says it again
        return {}
    finally:
        logging.disable(logging.NOTSET)
    splits = dict(zip(("train", "test", "validation"), (train, test, *validation), strict=False))
    return {role: one.records for role, one in splits.items() if isinstance(one, base.StreamedSplit)}


def of_files(records: Mapping[str, base.Records], config, decode: bool) -> dict[str, Survey]:
    """Looks at every image.

    Args: decode: all of it; else what its head says, where it has been decoded already.
    """
    return {role: _survey(one, config, decode, f"Looking at {role}") for role, one in records.items()}


def of_arrays(splits: Mapping[str, base.Split]) -> dict[str, Survey]:
    """The same of images in memory."""
    surveys = {}
    for role, split in splits.items():
        height, width, _ = split.image_shape
        count = len(split)
        digests = [hashlib.sha256(np.ascontiguousarray(image)).digest()[:16] for image in split.images]
        surveys[role] = Survey(
            split.labels.tolist(),
            collections.Counter({(width, height): count}),
            collections.Counter(RGB=count),
            digests=digests,
        )
    return surveys


def _survey(records: base.Records, config, decode: bool, title: str) -> Survey:
    def look(position: int):
        try:
            ((where, encoded, label),) = records.read([position])
            named = images.damage_named(where, encoded, records.remedy)
            with named, images.open_image(encoded, whole=decode) as opened:
                mode, size, white = opened.mode, opened.size, 0
                images.check_size(*size, config.image_size)
                if mode.startswith("I"):
                    white = int(np.asarray(opened).max())
                if decode:
                    images.to_rgb(opened, config.max_value)
        except FFLError as error:
            return str(error)
        return label, size, mode, white, hashlib.sha256(encoded).digest()[:16]

    found = Survey(records=records)
    for chunk in base.in_threads(lambda chunk: list(map(look, chunk)), len(records), title):
        for about in chunk:
            if isinstance(about, str):
                found.bad.append(about)
            else:
                label, size, mode, white, content = about
                found.labels.append(label)
                found.sizes[size] += 1
                found.modes[mode] += 1
                found.digests.append(content)
                found.white = max(found.white, white)
    return found


def duplicates(surveys: Mapping[str, Survey]) -> Iterator[tuple[str, str, int, int, list[str]]]:
    """(role, other role, how many images are in both, how many with another label, the first of them).

    Within a split, a copy is told with the first of its kind. Only where all images can be used.
    """
    firsts = {}
    for role, found in surveys.items():
        firsts[role] = {content: place for place, content in reversed(list(enumerate(found.digests)))}
        for other, first in firsts.items():
            pairs = [
                (place, first[content]) for place, content in enumerate(found.digests) if content in first
            ]
            pairs = [(one, two) for one, two in pairs if other != role or one != two]
            if pairs:
                differ = sum(found.labels[one] != surveys[other].labels[two] for one, two in pairs)
                told = [f"{found.where(one)} = {surveys[other].where(two)}" for one, two in pairs[:5]]
                yield role, other, len(pairs), differ, told
