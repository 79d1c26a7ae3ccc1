"""Every image of a dataset decoded once: what is in it, and all that cannot be used, in one pass."""

import collections
import dataclasses
import logging

from ml_collections import ConfigDict

from ffl_jax.data import base, images, tfds
from ffl_jax.errors import FFLError


@dataclasses.dataclass
class Survey:
    """What is in the images of one split.

    Attributes:
      labels: integers of the images that can be used.
      sizes: {(width, height): count}, in pixels.
      modes: {Pillow's name for the kind of pixels: count}.
      bad: of each image that cannot be used, which one and why.
    """

    labels: list[int] = dataclasses.field(default_factory=list)
    sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    modes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bad: list[str] = dataclasses.field(default_factory=list)

    def __str__(self):
        sides = [sorted({min(side), max(side)}) for side in zip(*self.sizes, strict=True)]
        size = " x ".join(" to ".join(map(str, ends)) for ends in sides)
        modes = ", ".join(f"{mode} {count}" for mode, count in self.modes.most_common())
        return (
            f"{len(self.labels)} images of {size} pixels ({modes})" if sides else "no image that can be used"
        )


def survey(config) -> dict[str, Survey]:
    """Looks at every image of the splits that `data.load(config)` reads from files; {} where there are none.

    Raises:
      FFLError: as `data.load`, but not for an image.
    """
    settings = ConfigDict(config.to_dict() | {"streaming": True})  # to look at files, and decode none
    logging.disable(logging.WARNING)  # `load` says it again
    try:
        train, test, _, *validation = base.SOURCES.get(config.name, tfds.load)(settings)
    finally:
        logging.disable(logging.NOTSET)
    roles = dict(zip(("train", "test", "validation"), (train, test, *validation), strict=False))
    return {
        role: _survey(split.records, config.image_size, f"Looking at {role}")
        for role, split in roles.items()
        if isinstance(split, base.StreamedSplit)
    }


def _survey(records: base.Records, image_size: int, title: str) -> Survey:
    def look(position: int):
        try:
            ((where, encoded, label),) = records.read([position])
            with images.damage_named(where, encoded, records.remedy), images.open_image(encoded) as opened:
                about = label, opened.size, opened.mode
                images.check_size(*opened.size, image_size)
                images.to_rgb(opened)
        except FFLError as error:
            return str(error)
        return about

    found = Survey()
    for chunk in base.in_threads(lambda chunk: list(map(look, chunk)), len(records), title):
        for about in chunk:
            if isinstance(about, str):
                found.bad.append(about)
            else:
                label, size, mode = about
                found.labels.append(label)
                found.sizes[size] += 1
                found.modes[mode] += 1
    return found
