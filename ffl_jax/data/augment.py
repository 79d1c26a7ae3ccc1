"""Augmentation and normalisation inside compiled code, one random key for each example."""

import jax
import jax.numpy as jnp

PAD_MODES = ("reflect", "zero")


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
