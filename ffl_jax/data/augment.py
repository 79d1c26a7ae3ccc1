"""Augmentation and normalisation inside compiled code, one random key for each example."""

import jax
import jax.numpy as jnp

from ffl_jax.data import policies

PAD_MODES = ("reflect", "zero")
POLICIES = ("none", "trivial")
# Away from the draws of `pad_crop_flip`, which the same keys are split for.
_POLICY, _ERASING = 0x5EED0001, 0x5EED0002
_ATTEMPTS, _AREA, _ASPECT = 10, (0.02, 1 / 3), (0.3, 1 / 0.3)


def finished(images: jax.Array, keys: jax.Array, settings) -> jax.Array:
    """What networks see of cropped images in training: uint8 [B, H, W, 3] -> float32.

    Args:
      images: see above.
      keys: [B], as for `pad_crop_flip`.
      settings: the `data` section of the configuration: `policy`, `mean`, `std`, `erasing`.
    """
    if settings.policy == "trivial":
        images = policies.trivial_augment(images, _fold(keys, _POLICY))
    images = normalize(images, settings.mean, settings.std)
    return random_erasing(images, _fold(keys, _ERASING), settings.erasing) if settings.erasing else images


def random_erasing(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Fills one rectangle of an image with normal noise: [B, H, W, 3], [B] keys.

    Zhong et al., 2020, arXiv 1708.04896, with timm's noise for each pixel and its bounds: 2 to 33 % of the
    area, sides in a ratio of 0.3 to 1 / 0.3, and smaller than the image's. The first of ten that fits is
    taken, and none where none does.
    """
    height, width = images.shape[1:3]

    def erase(image, key):
        place, noise = jax.random.split(key)
        # One draw for all: each takes a CPU's compiler a second or two.
        area, ratio, row, column, whether = jax.random.uniform(place, (5, _ATTEMPTS))
        area = height * width * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        ratio = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** ratio
        tall, wide = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
        fits = (tall < height) & (wide < width)
        first = fits.argmax()
        erased = fits.any() & (whether[0] < probability)

        def inside(draw, length, side):
            start = jnp.floor(draw[first] * (side - length[first] + 1))
            place = jnp.arange(side)
            return (place >= start) & (place < start + length[first])

        box = inside(row, tall, height)[:, None] & inside(column, wide, width)
        return jnp.where((erased & box)[..., None], jax.random.normal(noise, image.shape), image)

    return jax.vmap(erase)(images, keys)


def _fold(keys, number):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 [..., 3] -> float32, (x / 255 - mean) / std; mean and std are in units of 0..1."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


def pad_crop_flip(
    images: jax.Array, keys: jax.Array, pad: int, flip: bool, pad_mode: str = "reflect"
) -> jax.Array:
    """Pads by `pad` pixels, flips half of the images, crops the original size at a random place.

    Reflection does not repeat the border pixel, as numpy's "reflect". Pixels are looked up in place, so that
    padded images never exist.

    Args:
      images: [B, H, W, 3], any type.
      keys: [B], one random key for each example.
      pad: pixels, less than H and W; 0 crops nothing.
      flip: whether to flip left-right with probability 1/2.
      pad_mode: one of `PAD_MODES`: "reflect", or "zero" for black.
    """
    height, width = images.shape[1:3]

    def positions(key):
        row_key, column_key, flip_key = jax.random.split(key, 3)
        rows = jnp.arange(height) + jax.random.randint(row_key, (), -pad, pad + 1)
        columns = jnp.arange(width)
        if flip:
            columns = jnp.where(jax.random.bernoulli(flip_key), columns[::-1], columns)
        return rows, columns + jax.random.randint(column_key, (), -pad, pad + 1)

    def crop(image, rows, columns):
        cropped = image[_reflect(rows, height)[:, None], _reflect(columns, width)[None, :]]
        if pad_mode == "reflect":
            return cropped
        row_inside, column_inside = ((x >= 0) & (x < size) for x, size in ((rows, height), (columns, width)))
        return jnp.where((row_inside[:, None] & column_inside)[..., None], cropped, 0)

    rows, columns = jax.vmap(positions)(keys)
    return jax.vmap(crop)(images, rows, columns)


def _reflect(index, size):
    index = jnp.abs(index)
    return jnp.where(index >= size, 2 * (size - 1) - index, index)
