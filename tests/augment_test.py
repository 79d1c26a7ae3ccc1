"""Augmentation against numpy.pad and slices, by search over every draw that there can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import data_section

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


erase = jax.jit(augment.random_erasing, static_argnums=2)


def test_random_erasing():
    """One rectangle of 2 to 33 % with sides of 0.3 to 1 / 0.3, where it fits, of standard normal noise."""
    images = jnp.full((2000, 16, 20, 3), 50.0)
    erased = np.asarray(erase(images, split(jax.random.key(0), 2000), 0.25))
    masks = (erased != 50).any(-1)
    assert ((erased != 50).all(-1) == masks).all()
    hit = masks.any(axis=(1, 2))
    assert abs(hit.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)  # in ten draws one fits
    for mask in masks[hit]:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, np.outer(rows, columns))
        assert (np.diff(np.flatnonzero(rows)) == 1).all()
        assert (np.diff(np.flatnonzero(columns)) == 1).all()
        tall, wide = rows.sum(), columns.sum()
        assert tall < 16
        assert wide < 20
        # Both sides were rounded.
        assert (tall - 0.5) * (wide - 0.5) <= 320 / 3
        assert (tall + 0.5) * (wide + 0.5) >= 320 * 0.02
        assert (tall + 0.5) / (wide - 0.5) >= 0.3
        assert (tall - 0.5) / (wide + 0.5) <= 1 / 0.3
    noise = erased[masks]
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 0.02
    # Places are even: as often in the left half as in the right.
    left, right = masks[:, :, :10].sum(), masks[:, :, 10:].sum()
    assert abs(left / (left + right) - 0.5) < 0.05
    np.testing.assert_array_equal(erase(images[:3], split(jax.random.key(0), 2000)[:3], 0.25), erased[:3])


def test_erasing_where_nothing_fits_or_never():
    images = jnp.full((50, 1, 1, 3), 50.0)
    np.testing.assert_array_equal(erase(images, split(jax.random.key(0), 50), 1.0), images)
    images = jnp.full((50, 8, 8, 3), 50.0)
    assert (erase(images, split(jax.random.key(0), 50), 1.0) != 50).any(axis=(1, 2, 3)).all()


def test_cropped_images_are_finished_by_the_settings():
    """The policy sees pixels, erasing normalised values, and neither the draws of the other."""
    images, keys = draw_images(30, 8, 8), split(jax.random.key(0), 30)
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}

    def finished(**more):
        section = data_section(**settings, **more)
        return np.asarray(jax.jit(lambda images: augment.finished(images, keys, section))(images))

    plain, trivial, both = finished(), finished(policy="trivial"), finished(policy="trivial", erasing=1.0)
    np.testing.assert_allclose(plain, augment.normalize(images, **settings), rtol=1e-5, atol=2e-6)
    changed, erased = (~np.isclose(x, trivial, rtol=1e-4, atol=1e-4) for x in (plain, both))  # rounded apart
    changed, erased = changed.any(axis=(1, 2, 3)), erased.any(axis=-1)
    assert 15 < changed.sum() < 30
    assert erased.any(axis=(1, 2)).all()
    assert erased.mean() < 0.4
