"""TrivialAugment inside compiled code: one operation on each image, by one random key for each.

Müller and Hutter, ICCV 2021, arXiv 2103.10158, the wide space, with torchvision's magnitudes. Operations give
the pixels that Pillow gives, from tables in its fixed-point numbers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

LEVELS = 31
_STRENGTH = np.linspace(0.0, 1.0, LEVELS)
# name -> (its largest magnitude, whether it has a sign); what is not here has no magnitude.
MAGNITUDES = {
    "shear_x": (0.99, True),
    "shear_y": (0.99, True),
    "translate_x": (32.0, True),  # pixels, whatever the image's size
    "translate_y": (32.0, True),
    "rotate": (135.0, True),  # degrees
    "brightness": (0.99, True),
    "color": (0.99, True),
    "contrast": (0.99, True),
    "sharpness": (0.99, True),
    "posterize": (6.0, False),  # bits that are lost
    "solarize": (255.0, False),  # below 255, from which on pixels are turned over
    "autocontrast": (0.0, False),
    "equalize": (0.0, False),
    "identity": (0.0, False),
}
NAMES = tuple(MAGNITUDES)
_GEOMETRIC, _BLENDED = NAMES[:5], NAMES[5:9]


def trivial_augment(images: jax.Array, keys: jax.Array) -> jax.Array:
    """One operation on each image, of a random magnitude and sign: uint8 [B, H, W, 3] and [B] keys."""

    def one(image, key):
        # One draw for all three: each takes a CPU's compiler a second or two.
        draws = jax.random.uniform(key, (3,)) * jnp.array([len(NAMES), LEVELS, 2])
        return apply(image, *draws.astype(jnp.int32))

    return jax.vmap(one)(images, keys)


def apply(image: jax.Array, name: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """One operation on one image, uint8 [H, W, 3].

    Args: image: see above. name: which of `NAMES`. level: 0 .. LEVELS - 1. sign: 1 turns the magnitude round.
    """
    height, width, _ = image.shape
    pixels = image.astype(jnp.int32)
    moved = _moved(pixels, jnp.asarray(_matrices(height, width))[jnp.minimum(name, 5), level, sign])
    change = np.linspace(0, 0.99, LEVELS)
    factor = jnp.asarray(np.stack([1 + change, 1 - change], axis=-1), jnp.float32)[level, sign]
    bits = jnp.asarray(np.round(6 * _STRENGTH).astype(np.int32))[level]
    threshold = jnp.asarray(np.ceil(np.linspace(255, 0, LEVELS)).astype(np.int32))[level]
    results = [moved] * len(_GEOMETRIC)
    results += [_blend(base, pixels, factor) for base in _bases(pixels)]
    results += [
        pixels & -(1 << bits),
        jnp.where(pixels < threshold, pixels, 255 - pixels),
        _by_channel(_autocontrast, pixels),
        _by_channel(_equalize, pixels),
        pixels,
    ]
    return jax.lax.select_n(name, *results).astype(jnp.uint8)


def _matrices(height, width) -> np.ndarray:
    """Where a result's pixels come from, as Pillow has it, in 1 / 65536 pixel: int32 [6, LEVELS, 2, 6].

    x = m0 column + m1 row + m2 and y = m3 column + m4 row + m5. The sixth matrix changes nothing.
    """
    matrices = np.zeros((6, LEVELS, 2, 6))
    matrices[..., 0] = matrices[..., 4] = 1
    for index, name in enumerate(_GEOMETRIC):
        most, _ = MAGNITUDES[name]
        for level, sign in np.ndindex(LEVELS, 2):
            m, size = matrices[index, level, sign], most * _STRENGTH[level] * (-1 if sign else 1)
            if name == "rotate":
                # Counter-clockwise, around the centre; rounded as in `Image.rotate`.
                sine, cosine = (round(f(-math.radians(size)), 15) for f in (math.sin, math.cos))
                m[[0, 1, 3, 4]] = cosine, sine, -sine, cosine
                m[2] = width / 2 - cosine * width / 2 - sine * height / 2
                m[5] = height / 2 + sine * width / 2 - cosine * height / 2
            else:
                at = {"shear_x": 1, "shear_y": 3, "translate_x": 2, "translate_y": 5}[name]
                m[at] = int(size) if name.startswith("translate") else size
    # Of a pixel's centre, half a pixel from its place.
    matrices[..., 2] += (matrices[..., 0] + matrices[..., 1]) / 2
    matrices[..., 5] += (matrices[..., 3] + matrices[..., 4]) / 2
    return np.floor(65536 * matrices + 0.5).astype(np.int32)


def _moved(pixels, m):
    height, width, _ = pixels.shape
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    x = (m[0] * column + m[1] * row + m[2]) >> 16
    y = (m[3] * column + m[4] * row + m[5]) >> 16
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    found = pixels[jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)]
    return jnp.where(inside[..., None], found, 0)


def _bases(pixels):
    """What brightness, colour, contrast and sharpness are counted from, in this order."""
    grey = (pixels @ jnp.array([19595, 38470, 7471]) + 0x8000) >> 16
    mean = (2 * grey.sum() + grey.size) // (2 * grey.size)
    return jnp.zeros_like(pixels), jnp.broadcast_to(grey[..., None], pixels.shape), mean, _smooth(pixels)


def _smooth(pixels):
    """Weights 5 in the middle and 1 around, over 13; the border stays."""
    if min(pixels.shape[:2]) < 3:
        return pixels
    height, width, _ = pixels.shape
    shifted = [pixels[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    inner = (2 * (sum(shifted) + 4 * shifted[4]) + 13) // 26
    return pixels.at[1:-1, 1:-1].set(inner)


def _blend(base, pixels, factor):
    return jnp.clip(base + factor * (pixels - base), 0, 255).astype(jnp.int32)


def _by_channel(table, pixels):
    """Each channel looked up in the table that its histogram gives."""
    flat = pixels.reshape(-1, 3).T
    histograms = jax.vmap(lambda channel: jnp.zeros(256, jnp.int32).at[channel].add(1))(flat)
    return jax.vmap(lambda histogram, channel: table(histogram)[channel])(histograms, flat).T.reshape(
        pixels.shape
    )


def _autocontrast(histogram):
    low, high = (histogram > 0).argmax(), 255 - (histogram[::-1] > 0).argmax()
    values = jnp.arange(256)
    stretched = jnp.clip(255 * (values - low) // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, values)


def _equalize(histogram):
    last = histogram[255 - (histogram[::-1] > 0).argmax()]
    step = (histogram.sum() - last) // 255
    below = jnp.cumsum(histogram) - histogram
    equal = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, equal, jnp.arange(256))
