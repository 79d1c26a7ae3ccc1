"""Order, padding and batches of data in device memory, by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import data_section
from ml_collections import ConfigDict

from ffl_jax.data import augment, resident

SETTINGS = data_section(pad=2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


epoch_order = jax.jit(resident.epoch_order, static_argnums=(2, 3))


@pytest.mark.parametrize(
    ("examples", "batch_size", "expected"),
    [(50000, 128, 391), (1437, 64, 23), (128, 64, 2), (129, 64, 3), (5, 5, 1)],
)
def test_steps_per_epoch(examples, batch_size, expected):
    assert resident.steps_per_epoch(examples, batch_size) == expected


@pytest.mark.parametrize(("examples", "batch_size"), [(12, 4), (13, 4), (9, 8), (8, 8), (50, 7)])
def test_an_epoch_has_every_example_and_fewer_than_a_batch_twice(examples, batch_size):
    order = np.asarray(epoch_order(0, 3, examples, batch_size))
    assert order.dtype == np.int32
    assert order.shape == (-(-examples // batch_size), batch_size)
    counts = np.bincount(order.ravel(), minlength=examples)
    assert len(counts) == examples
    assert counts.min() == 1
    assert counts.sum() - examples <= batch_size - 1
    assert counts.max() <= 2


def test_the_size_of_the_published_recipe():
    order = np.asarray(epoch_order(1, 0, 50000, 128))
    assert order.shape == (391, 128)
    np.testing.assert_array_equal(np.unique(order), np.arange(50000))
    # The 48 places that are left hold the first 48 of the same order.
    np.testing.assert_array_equal(order.ravel()[50000:], order.ravel()[:48])


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return np.asarray(epoch_order(seed, epoch, 100, 10)).tobytes()

    first = {(seed, epoch): order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(set(first.values())) == 9
    for seed, epoch in [(2, 1), (0, 0)]:  # again, in another order
        assert order(seed, epoch) == first[seed, epoch]
    assert np.asarray(resident.epoch_order(1, 2, 100, 10)).tobytes() == first[1, 2]  # without jit


def test_order_is_shuffled():
    order = np.asarray(epoch_order(0, 0, 1000, 100)).ravel()
    # Ranks of independent permutations correlate by 1 / sqrt(999) = 0.03.
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15
    following = np.asarray(epoch_order(0, 1, 1000, 100)).ravel()
    assert abs(np.corrcoef(order, following)[0, 1]) < 0.15


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("examples", range(1, 34))
def test_evaluation_counts_every_example_once(examples, batch_size):
    indices, weights = resident.eval_batches(examples, batch_size)
    assert indices.shape == weights.shape == (-(-examples // batch_size), batch_size)
    assert set(np.unique(weights)) <= {0.0, 1.0}
    counts = np.bincount(indices.ravel(), weights.ravel(), minlength=examples)
    np.testing.assert_array_equal(counts, np.ones(examples))


def make_split(examples):
    images = np.random.default_rng(0).integers(0, 256, (examples, 6, 6, 3), dtype=np.uint8)
    return images, np.arange(examples, dtype=np.int32) % 5


def test_eval_batch_takes_and_normalizes():
    images, labels = make_split(9)
    indices, weights = resident.eval_batches(9, 4)
    batch = resident.eval_batch(images, labels, indices[2], weights[2], SETTINGS)
    np.testing.assert_array_equal(batch["weight"], [1, 0, 0, 0])
    np.testing.assert_array_equal(batch["label"], labels[[8, 8, 8, 8]])
    expected = (images[8].astype(np.float64) / 255 - SETTINGS.mean) / np.array(SETTINGS.std)
    np.testing.assert_allclose(batch["image"][0], expected, rtol=1e-5, atol=2e-6)


def test_train_batch_depends_on_seed_epoch_and_example_alone():
    images, labels = make_split(12)

    @jax.jit
    def train_batch(indices, seed, epoch):
        return resident.train_batch(jnp.asarray(images), jnp.asarray(labels), indices, seed, epoch, SETTINGS)

    def batch(indices, seed=0, epoch=0):
        return jax.device_get(train_batch(np.array(indices), seed, epoch))

    first = batch(range(12))
    np.testing.assert_array_equal(first["label"], labels)
    assert first["image"].dtype == np.float32
    some = batch([7, 2])
    np.testing.assert_array_equal(some["image"], first["image"][[7, 2]])
    np.testing.assert_array_equal(some["label"], labels[[7, 2]])
    for other in (batch(range(12), seed=1), batch(range(12), epoch=1)):
        changed = [not np.array_equal(x, y) for x, y in zip(other["image"], first["image"], strict=True)]
        assert sum(changed) > 8  # of 50 draws two are equal by chance only


def test_initialisation_order_and_augmentation_draw_from_keys_apart():
    """None may be drawn from the key of another: networks begin from (parts of) `jax.random.key(seed)`."""
    seed, epoch, images = 3, 5, make_split(40)[0]
    initial = jax.random.key(seed)
    of_order = jax.random.fold_in(jax.random.fold_in(initial, 0xDA7A), epoch)
    order = epoch_order(seed, epoch, 40, 40).ravel()
    np.testing.assert_array_equal(order, jax.random.permutation(of_order, 40))
    augmented = resident.augmented(images, np.arange(40), seed, epoch, SETTINGS)

    def drawn_from(key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(40))
        return augment.normalize(augment.pad_crop_flip(images, keys, 2, True), SETTINGS.mean, SETTINGS.std)

    np.testing.assert_array_equal(augmented, drawn_from(jax.random.fold_in(of_order, 1)))
    for other in (*jax.random.split(initial), initial):
        for key in (other, jax.random.fold_in(other, epoch), of_order):
            if key is not of_order:
                assert not np.array_equal(order, jax.random.permutation(key, 40))
            assert not np.array_equal(augmented, drawn_from(key))


def test_train_batch_augments_every_example_by_itself():
    images = np.repeat(make_split(1)[0], 12, axis=0)
    batch = resident.train_batch(images, jnp.arange(12), jnp.arange(12), 0, 0, SETTINGS)
    assert len({np.asarray(image).tobytes() for image in batch["image"]}) > 8  # of 50 draws


def test_train_batch_without_augmentation_is_the_images():
    images, labels = make_split(4)
    settings = ConfigDict({**SETTINGS, "pad": 0, "flip": False})
    batch = resident.train_batch(images, labels, np.arange(4), 0, 0, settings)
    expected = (images.astype(np.float64) / 255 - settings.mean) / np.array(settings.std)
    np.testing.assert_allclose(batch["image"], expected, rtol=1e-5, atol=2e-6)


def test_views_are_augmented_apart():
    """Each view is a draw of its own, and none hangs on how many there are."""
    images, labels = make_split(12)

    def draw(views):
        return resident.train_batch(images, labels, np.arange(12), 0, 0, SETTINGS, views)

    three, two = draw(3), draw(2)
    assert three["image"].shape == (3, *images.shape)
    np.testing.assert_array_equal(three["label"], labels)
    np.testing.assert_array_equal(three["image"][:2], two["image"])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = zip(three["image"][first], three["image"][second], strict=True)
        assert sum(not np.array_equal(x, y) for x, y in pairs) > 8  # of 50 draws
    # All of the same images: what is moved by 2 pixels and mirrored has no pixel of another one.
    values = np.asarray(three["image"]) * np.array(SETTINGS.std) + np.array(SETTINGS.mean)
    pixels = np.rint(255 * values).astype(int).reshape(3, 12, -1, 3)
    for index, image in enumerate(images):
        own = {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()}
        assert {tuple(pixel) for pixel in pixels[:, index].reshape(-1, 3).tolist()} <= own
