"""Augmentation and normalisation inside compiled code, one random key for each example."""

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 [..., 3] -> float32, (x / 255 - mean) / std; mean and std are in units of 0..1."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


def pad_crop_flip(images: jax.Array, keys: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Reflect-pads by `pad` pixels, flips half of the images, crops the original size at a random place.

    Reflection does not repeat the border pixel, as numpy's "reflect". Pixels are looked up in place, so that
    padded images never exist.

    Args:
      images: [B, H, W, 3], any type.
      keys: [B], one random key for each example.
      pad: pixels, less than H and W; 0 crops nothing.
      flip: whether to flip left-right with probability 1/2.
    """
    height, width = images.shape[1:3]

    def positions(key):
        row_key, column_key, flip_key = jax.random.split(key, 3)
        rows = _reflect(jnp.arange(height) + jax.random.randint(row_key, (), -pad, pad + 1), height)
        columns = jnp.arange(width)
        if flip:
            columns = jnp.where(jax.random.bernoulli(flip_key), columns[::-1], columns)
        columns = _reflect(columns + jax.random.randint(column_key, (), -pad, pad + 1), width)
        return rows, columns

    rows, columns = jax.vmap(positions)(keys)
    return jax.vmap(lambda image, r, c: image[r[:, None], c[None, :]])(images, rows, columns)


def _reflect(index, size):
    index = jnp.abs(index)
    return jnp.where(index >= size, 2 * (size - 1) - index, index)
