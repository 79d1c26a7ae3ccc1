"""Crops of photographs of any size, on the host: random ones for training, the centre for evaluation.

Sizes, aspect ratios, rounding and interpolation are those of torchvision's RandomResizedCrop, Resize and
CenterCrop (Szegedy et al., 2015, sec. 6, and the evaluation of Krizhevsky et al., 2012).
"""

import math

import numpy as np

from ffl_jax.data import images, limits

CROPS = ("pad", "resized")
_AREA = (0.08, 1.0)  # of the image
_RATIO = (3 / 4, 4 / 3)  # width / height
_EVAL_RATIO = 256 / 224  # the shorter side over the centre square
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def random_resized(
    encoded: bytes,
    image_size: int,
    generators: list[np.random.Generator],
    flip: bool,
    max_value: int = limits.MAX_GREY,
) -> np.ndarray:
    """A random rectangle of one image for each generator, brought to a square: uint8 [V, S, S, 3].

    A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where the smallest rectangle stays larger than S.

    Args:
      encoded: the bytes of the image file.
      image_size: S, pixels.
      generators: V, one for each view.
      flip: whether to flip left-right with probability 1/2.
      max_value: as for `images.to_rgb`.
    """
    from PIL import Image

    with images.open_image(encoded) as opened:
        turned = images.orientation(opened) in _TURNED
        width, height = reversed(opened.size) if turned else opened.size
        boxes = [draw_box(generator, width, height) for generator in generators]
        smallest = min(min(right - left, bottom - top) for left, top, right, bottom in boxes)
        divisor = max(d for d in (1, 2, 4, 8) if d == 1 or smallest >= d * image_size)
        if divisor > 1:
            opened.draft(None, tuple(side // divisor for side in opened.size))
        image = images.to_rgb(opened, max_value)
    if image.size == (width, height):
        divisor = 1
    views = []
    for box, generator in zip(boxes, generators, strict=True):
        # Cut first, as torchvision does: resizing alone would let pixels from outside into the border.
        view = image.crop(tuple(round(edge / divisor) for edge in box))
        view = view.resize((image_size, image_size), Image.Resampling.BILINEAR)
        if flip and generator.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        views.append(np.asarray(view))
    return np.stack(views)


def draw_box(generator: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a rectangle of 8 to 100 % of the area and 3:4 to 4:3, in pixels.

    Where ten draws do not fit into the image, it is the largest centred one of an allowed aspect ratio.
    """
    for _ in range(10):
        area = width * height * generator.uniform(*_AREA)
        ratio = math.exp(generator.uniform(*map(math.log, _RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.integers(width - w + 1), generator.integers(height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre(encoded: bytes, image_size: int, max_value: int = limits.MAX_GREY) -> np.ndarray:
    """The centre square after the shorter side was resized to 256/224 of S: uint8 [S, S, 3].

    Args: encoded: the bytes of the image file. image_size: S, pixels. max_value: as for `images.to_rgb`.
    """
    from PIL import Image

    target = round(image_size * _EVAL_RATIO)
    with images.open_image(encoded) as opened:
        images.check_size(*opened.size, target)
        image = images.to_rgb(opened, max_value)
    shorter = min(image.size)
    size = tuple(int(side * target / shorter) for side in image.size)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - image_size) / 2) for side in size)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


def evaluation_image(
    encoded: bytes, crop: str, image_size: int, max_value: int = limits.MAX_GREY
) -> np.ndarray:
    """What networks see of an image file in evaluation, not yet normalised: uint8 [H, W, 3].

    Args: encoded: the bytes of the file. crop, image_size, max_value: of the `data` section.
    """
    bring = centre if crop == "resized" else images.decode_image
    return bring(encoded, image_size, max_value)
