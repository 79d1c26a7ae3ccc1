"""Augmentation against numpy.pad and slices, by search over every draw that there can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffl_jax.data import augment

pad_crop_flip = jax.jit(augment.pad_crop_flip, static_argnums=(2, 3, 4))
split = jax.jit(jax.random.split, static_argnums=1)


def draw_images(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def candidates(image, pad, flip, pad_mode="reflect"):
    """{(row, column, flipped): crop} of one image."""
    height, width = image.shape[:2]
    crops = {}
    for flipped in (False, True) if flip else (False,):
        image_or_mirror = image[:, ::-1] if flipped else image
        mode = {"reflect": "reflect", "zero": "constant"}[pad_mode]
        padded = np.pad(image_or_mirror, ((pad, pad), (pad, pad), (0, 0)), mode)
        for row in range(2 * pad + 1):
            for column in range(2 * pad + 1):
                crops[row, column, flipped] = padded[row : row + height, column : column + width]
    return crops


def draws(images, pad, flip, seed=1, pad_mode="reflect"):
    """Augments and finds (row, column, flipped) of every image; fails where no candidate is equal."""
    keys = split(jax.random.key(seed), len(images))
    augmented = np.asarray(pad_crop_flip(images, keys, pad, flip, pad_mode))
    assert augmented.dtype == np.uint8
    assert augmented.shape == images.shape
    found = []
    for image, result in zip(images, augmented, strict=True):
        equal = [
            draw
            for draw, crop in candidates(image, pad, flip, pad_mode).items()
            if np.array_equal(crop, result)
        ]
        assert equal
        found.append(equal[0])  # a reflected border may equal the flipped image, so there can be two
    return found


@pytest.mark.parametrize(
    ("height", "width", "pad", "flip"), [(8, 8, 4, True), (8, 8, 1, False), (5, 9, 3, True), (4, 6, 3, False)]
)
def test_equals_numpy_pad_flip_and_crop(height, width, pad, flip):
    draws(draw_images(40, height, width), pad, flip)


def test_zero_padding_is_black():
    """As PyTorch's RandomCrop on images, which Normalize follows: the border is (0 - mean) / std."""
    found = draws(draw_images(40, 6, 5), 2, True, pad_mode="zero")
    assert len(set(found)) > 20
    images, keys = np.maximum(draw_images(40, 6, 5), 1), split(jax.random.key(1), 40)
    zero, reflect = (
        np.asarray(pad_crop_flip(images, keys, 2, True, mode)) for mode in augment.PAD_MODES[::-1]
    )
    np.testing.assert_array_equal(zero, np.where(zero == 0, 0, reflect))  # both cut at the same places
    white, mean, std = np.full((60, 6, 6, 3), 255, np.uint8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    padded = pad_crop_flip(white, split(jax.random.key(0), 60), 2, True, "zero")
    values = np.asarray(augment.normalize(padded, mean, std))
    black, bright = (
        np.isclose(values, (value - np.array(mean)) / np.array(std), rtol=1e-5).all(axis=-1)
        for value in (0.0, 1.0)
    )
    assert (black ^ bright).all()
    # An offset of -2 .. 2 shows up to two black rows and columns: 6 x 6 - 4 x 4 = 20 pixels at most.
    assert (black.sum(axis=(1, 2)).min(), black.sum(axis=(1, 2)).max()) == (0, 20)


def test_every_offset_and_both_flips_occur_equally_often():
    found = draws(draw_images(1800, 4, 5), 1, True)
    offsets, flips = {}, 0
    for row, column, flipped in found:
        offsets[row, column] = offsets.get((row, column), 0) + 1
        flips += flipped
    # Binomial: 200 of each of 9 offsets, standard deviation 13.3; 900 flips, standard deviation 21.2.
    assert len(offsets) == 9
    assert all(abs(count - 200) < 4 * 13.3 for count in offsets.values()), offsets
    assert abs(flips - 900) < 4 * 21.2
    # Offsets and flips are drawn apart: 900 of 1800 flips, whatever the offset.
    for offset in offsets:
        drawn = [flipped for row, column, flipped in found if (row, column) == offset]
        assert abs(np.mean(drawn) - 0.5) < 4 * 0.5 / np.sqrt(len(drawn))


def test_no_padding_and_no_flip_is_the_identity():
    images = draw_images(6, 6, 7)
    keys = split(jax.random.key(0), 6)
    np.testing.assert_array_equal(pad_crop_flip(images, keys, 0, False), images)


def test_without_padding_only_flips():
    assert {draw[:2] for draw in draws(draw_images(30, 4, 4), 0, True)} == {(0, 0)}


def test_an_example_does_not_depend_on_the_rest_of_its_batch():
    images, keys = draw_images(6, 8, 8), split(jax.random.key(3), 6)
    whole = pad_crop_flip(images, keys, 4, True)
    order = np.array([4, 0, 5])
    np.testing.assert_array_equal(pad_crop_flip(images[order], keys[order], 4, True), whole[order])


def test_equal_images_with_different_keys_are_augmented_differently():
    images = np.repeat(draw_images(1, 8, 8), 8, axis=0)
    augmented = pad_crop_flip(images, split(jax.random.key(0), 8), 4, True)
    assert len({np.asarray(image).tobytes() for image in augmented}) > 4


def test_normalize():
    images = draw_images(3, 4, 5)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    actual = augment.normalize(jnp.asarray(images), mean, std)
    assert actual.dtype == jnp.float32
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)
