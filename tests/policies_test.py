"""TrivialAugment's operations against Pillow, by every magnitude and sign."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from ffl_jax.data import policies

apply = jax.jit(jax.vmap(policies.apply, (None, None, 0, 0)))


def pictures():
    """Noise; a picture with few greys; and one of a single colour, whose histograms have one entry."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (12, 17, 3), np.uint8)
    dull = (90 + 40 * rng.random((12, 17, 3)) ** 2).astype(np.uint8)
    dull[:9] = dull[0, 0]
    return {"noise": noise, "dull": dull, "plain": np.full((12, 17, 3), (3, 200, 77), np.uint8)}


def by_pillow(image, name, level, sign):
    """Magnitudes as torchvision's TrivialAugmentWide has them."""
    bins = np.linspace(0.0, 1.0, policies.LEVELS)
    signed = -1 if sign else 1
    size, level_of = image.size, level / 30

    def transformed(*matrix):
        return image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    if name in ("shear_x", "shear_y"):
        m = signed * np.linspace(0, 0.99, 31)[level]
        return transformed(1, m, 0, 0, 1, 0) if name == "shear_x" else transformed(1, 0, 0, m, 1, 0)
    if name in ("translate_x", "translate_y"):
        m = signed * int(np.linspace(0, 32, 31)[level])
        return transformed(1, 0, m, 0, 1, 0) if name == "translate_x" else transformed(1, 0, 0, 0, 1, m)
    if name == "rotate":
        return image.rotate(signed * np.linspace(0, 135, 31)[level], Image.Resampling.NEAREST)
    enhancers = {
        "brightness": "Brightness",
        "color": "Color",
        "contrast": "Contrast",
        "sharpness": "Sharpness",
    }
    if name in enhancers:
        return getattr(ImageEnhance, enhancers[name])(image).enhance(1 + signed * 0.99 * bins[level])
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(level_of * 6))
    if name == "solarize":
        return ImageOps.solarize(image, np.linspace(255, 0, 31)[level])
    return {
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "identity": Image.Image.copy,
    }[name](image)


@pytest.mark.parametrize("name", policies.NAMES)
def test_every_operation_is_that_of_pillow(name):
    draws = [(level, sign) for level in range(policies.LEVELS) for sign in range(2)]
    levels, signs = jnp.array(draws).T
    for title, pixels in pictures().items():
        actual = np.asarray(apply(pixels, policies.NAMES.index(name), levels, signs))
        assert actual.dtype == np.uint8
        expected = np.stack([np.asarray(by_pillow(Image.fromarray(pixels), name, *draw)) for draw in draws])
        difference = np.abs(actual.astype(int) - expected)
        # Truncated after another rounding in float32, here and there.
        exact = name not in ("brightness", "color", "contrast", "sharpness")
        assert difference.max() <= (0 if exact else 1), (title, difference.max())
        assert (difference > 0).mean() < 1e-3, title


def test_each_operation_level_and_sign_is_drawn():
    images = jnp.broadcast_to(pictures()["noise"], (3000, 12, 17, 3))
    made = np.asarray(jax.jit(policies.trivial_augment)(images, jax.random.split(jax.random.key(0), 3000)))
    counts = {}
    for image in made:
        counts[image.tobytes()] = counts.get(image.tobytes(), 0) + 1
    # 62 draws of each of the 5 + 4 signed operations, and 31 of two more: about 600 pictures, of which the
    # unchanged one has at least a 14th: identity, levels of 0, and the rotation that equals it.
    assert len(counts) > 400
    assert 3000 / 14 < counts[np.asarray(images[0]).tobytes()] < 3000 / 4
    again = jax.jit(policies.trivial_augment)(images[:2], jax.random.split(jax.random.key(0), 3000)[:2])
    np.testing.assert_array_equal(again, made[:2])
