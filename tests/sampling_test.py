"""Balanced sampling: counted, and the same for data in memory and streamed, on one device and in parts."""

import collections
import types

import jax
import numpy as np
import pytest
from conftest import data_section
from data_streaming_test import Host, make_config, textured, train_batches, tree

from ffl_jax import data
from ffl_jax.data import resident
from ffl_jax.data.base import Dataset, Split
from ffl_jax.data.sampling import balanced_order
from ffl_jax.devices.parallel import Parallel
from ffl_jax.errors import ConfigError
from ffl_jax.training import config as config_lib
from ffl_jax.training import recipe

__all__ = ["tree"]  # a fixture
# Class 3 has no image; class 1 has fewer than it gives, and class 0 more.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4], [70, 2, 9, 19]))


def test_every_class_comes_equally_often():
    larger = collections.Counter()
    for epoch in range(6):
        indices, repeats = balanced_order(3, epoch, LABELS, 102)
        assert indices.dtype == repeats.dtype == np.int32
        counts = np.bincount(LABELS[indices])
        assert sorted(counts) == [0, 25, 25, 26, 26]
        assert counts[3] == 0
        larger.update(np.flatnonzero(counts == 26).tolist())
        # Within a class, too, no image is ahead of another by more than one, and no draw is there twice.
        times = np.bincount(indices, minlength=100)
        for label in (0, 1, 2, 4):
            assert np.ptp(times[label == LABELS]) <= 1
        assert len(set(zip(indices, repeats, strict=True))) == 102
        np.testing.assert_array_equal(np.bincount(indices, repeats, 100), times * (times - 1) / 2)
    assert len(larger) > 2  # the odd draws do not fall to the same classes


def test_the_order_is_shuffled_and_of_its_seed_and_epoch():
    orders = [balanced_order(*about, LABELS, 2000)[0] for about in ((0, 0), (0, 1), (1, 0), (0, 0))]
    np.testing.assert_array_equal(orders[0], orders[3])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).mean() < 0.1
    labels = LABELS[orders[0]]
    # Of four equal classes one follows itself in a quarter of the places: standard deviation 0.01.
    assert abs((labels[1:] == labels[:-1]).mean() - 0.25) < 0.05


def resident_input(split, batch_size=16, num_seeds=1, views=0):
    settings = data_section(sampling="balanced", pad=2, mean=(0.5,) * 3, std=(0.2,) * 3)
    config = types.SimpleNamespace(data=settings, batch_size=batch_size, seed=3)
    parallel = Parallel(num_devices=1, num_seeds=num_seeds)
    return data.train_input(split, config, parallel, views), parallel


def split():
    images = np.random.default_rng(1).integers(0, 256, (100, 8, 8, 3), np.uint8)
    return Split(images, LABELS.astype(np.int32))


def test_an_epoch_in_memory_has_its_steps_and_each_seed_its_own():
    inputs, parallel = resident_input(split(), num_seeds=2)
    assert inputs.steps_per_epoch == 7
    (about, order), _ = parallel.fetch(next(inputs.batches(5, 3)))
    for index, seed in enumerate((3, 4)):
        indices, repeats = balanced_order(seed, 5, LABELS, 112)
        np.testing.assert_array_equal(order[index], indices.reshape(7, 16))
        np.testing.assert_array_equal(about["repeats"][index], repeats.reshape(7, 16))


@pytest.mark.parametrize("views", [0, 2])
def test_what_comes_again_is_augmented_anew(views):
    inputs, parallel = resident_input(split(), batch_size=100, views=views)
    arrays = parallel.fetch(next(inputs.batches(0, 0)))
    batch = inputs.batch(arrays, 0)
    indices, repeats = balanced_order(3, 0, LABELS, 100)
    np.testing.assert_array_equal(batch["label"], LABELS[indices])
    images = np.asarray(batch["image"] if views else batch["image"][None])
    for image in np.flatnonzero(LABELS == 1):
        seen = {one.tobytes() for view in images for one in view[indices == image]}
        assert len(seen) > 8  # of 50 draws, 12 or 13, or twice as many, are drawn
    # The first time is not that of a shuffled epoch either, but no draw hangs on its place.
    some = np.array([7, 2])
    again = resident.train_batch(
        split().images, LABELS, indices[some], 3, 0, inputs._settings, views, repeats[some]
    )
    np.testing.assert_array_equal(again["image"], batch["image"][..., some, :, :, :])


def test_streamed_batches_are_those_of_data_in_memory(tmp_path):
    """Three images of noise, of which class a has one: 6 of 12 draws."""
    config = make_config(textured(tmp_path), image_size=16, batch_size=12, crop="pad", sampling="balanced")
    streamed = data.load(config.data).train
    inputs = data.train_input(streamed, config, Host())
    arrays = next(inputs.batches(1, 0))
    assert sorted(np.bincount(arrays[2])) == [3, 3, 6]
    batch = inputs.batch(arrays, 1)
    config.data.streaming = False
    inputs, parallel = data.train_input(data.load(config.data).train, config, p := Parallel(num_devices=1)), p
    expected = inputs.batch(parallel.fetch(next(inputs.batches(1, 0))), 1)
    jax.tree.map(np.testing.assert_array_equal, batch, expected)


@pytest.mark.parametrize("views", [0, 2])
def test_crops_that_come_again_are_cut_anew(tmp_path, views):
    config = make_config(textured(tmp_path), image_size=16, batch_size=12, sampling="balanced")
    (arrays,) = train_batches(config, [(0, 0)], views)
    crops = arrays[0].reshape(-1, 16, 16, 3)
    assert len({crop.tobytes() for crop in crops}) == len(crops) == 12 * (views or 1)


def test_streams_start_anywhere_with_any_workers(tree):
    config = make_config(tree, sampling="balanced")
    whole = train_batches(config, [(epoch, position) for epoch in range(2) for position in range(3)])
    config.data.workers = 2
    for batch, expected in zip(train_batches(config, [(0, 2), (1, 0)]), whole[2:4], strict=True):
        for array, wanted in zip(batch, expected, strict=True):
            np.testing.assert_array_equal(array, wanted)


def test_what_does_not_go_together_is_refused():
    config = make_config("", sampling="even")
    with pytest.raises(ConfigError, match="one of shuffled, balanced, got 'even'"):
        config_lib.check(config)
    config.data.sampling = "balanced"
    config_lib.check(config)
    unknown = types.SimpleNamespace(labels=None)
    with pytest.raises(ConfigError, match="sampling=balanced needs the labels of mine"):
        recipe.make(config, Dataset("mine", unknown, unknown, ("a", "b"), ""))
    config.class_weights = ("balanced",)
    with pytest.raises(ConfigError, match="even the classes out twice"):
        config_lib.check(config)
