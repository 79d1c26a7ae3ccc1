"""Small datasets held in device memory as uint8: shuffled, batched and augmented inside compiled code.

The data order is a pure function of (seed, epoch, position). There is no iterator, and nothing to save.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ffl_jax.data import augment, sampling
from ffl_jax.devices import parallel as parallel_lib


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches that cover every example; the last is filled up from the beginning of the same order.

    FFL's released code lets the last batch of an epoch be smaller. Full batches keep that count of steps and
    need no second program, at the price of at most batch_size - 1 examples seen twice in an epoch.
    """
    return -(-num_examples // batch_size)


def epoch_order(seed: int | jax.Array, epoch: jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Example indices of one epoch, int32 [steps_per_epoch, batch_size]; each example comes at least once."""
    key = jax.random.fold_in(_data_key(seed), epoch)
    order = jax.random.permutation(key, num_examples)
    steps = steps_per_epoch(num_examples, batch_size)
    return jnp.resize(order, (steps, batch_size)).astype(jnp.int32)


def train_batch(
    images: jax.Array, labels: jax.Array, indices: jax.Array, *how, **more
) -> dict[str, jax.Array]:
    """An augmented, normalised batch: `image` [B, H, W, 3], or [views, B, H, W, 3], and `label` [B].

    Args:
      images, labels: the whole training split, uint8 [N, H, W, 3] and int32 [N].
      indices: [B], the examples to take.
      *how, **more: the other arguments of `augmented`.
    """
    image = augmented(images[indices], indices, *how, **more)
    return {"image": image, "label": labels[indices]}


def augmented(
    images: jax.Array,
    indices: jax.Array,
    seed: int | jax.Array,
    epoch: jax.Array,
    settings,
    views: int = 0,
    repeats: jax.Array | None = None,
) -> jax.Array:
    """Padded, cropped, flipped, recoloured, normalised images: [B, H, W, 3], or [views, B, H, W, 3].

    Args:
      images: uint8 [B, H, W, 3]; with `crop` other than "pad" they are cut already, [B, views, H, W, 3] where
        there are views.
      indices: [B], their places in the training split.
      seed, epoch: with the example's index they fix its augmentation, whatever device or position it has.
      settings: the `data` section of the configuration: `crop`, `pad`, `pad_mode`, `flip`, and what
        `augment.finished` reads.
      views: how many augmentations of each image to make, independent of one another; 0 for one without the
        leading axis.
      repeats: [B], which time it is that the epoch has the example, where it may have it more than once.
    """
    # Away from the key of the order itself, which the same epoch folds in.
    epoch_key = jax.random.fold_in(jax.random.fold_in(_data_key(seed), epoch), 1)
    keys = jax.vmap(lambda index: jax.random.fold_in(epoch_key, index))(indices)
    keys = keys if repeats is None else jax.vmap(jax.random.fold_in)(keys, repeats)

    def view(keys, images):
        if settings.crop == "pad":
            images = augment.pad_crop_flip(images, keys, settings.pad, settings.flip, settings.pad_mode)
        return augment.finished(images, keys, settings)

    if not views:
        return view(keys, images)
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    given = [images] * views if images.ndim == 4 else jnp.moveaxis(images, 1, 0)
    return jnp.stack([view(fold(keys, index), given[index]) for index in range(views)])


def eval_batches(num_examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, weights), each [batches, batch_size]: every example once with weight 1, padding with 0."""
    batches = -(-num_examples // batch_size)
    flat = np.arange(batches * batch_size)
    indices = np.minimum(flat, num_examples - 1).astype(np.int32)
    weights = (flat < num_examples).astype(np.float32)
    return indices.reshape(batches, -1), weights.reshape(batches, -1)


def eval_batch(images, labels, indices, weights, settings) -> dict[str, jax.Array]:
    """A normalised batch with `weight`, of the split's examples `indices` [B]."""
    return {
        "image": augment.normalize(images[indices], settings.mean, settings.std),
        "label": labels[indices],
        "weight": weights,
    }


class TrainInput:
    """Feeds the training step; see `data.train_input`. With several seeds, each has an order of its own."""

    kinds = (parallel_lib.OWN, parallel_lib.SHARED)
    reusable = True

    def __init__(self, split, config, parallel, views: int):
        self._settings, self._views = config.data, views
        self._parallel = parallel
        self._examples = parallel.place((split.images, split.labels))
        self.steps_per_epoch = steps_per_epoch(len(split), config.batch_size)

        def order(own):
            return own, epoch_order(own["seed"], own["epoch"], len(split), config.batch_size)

        self._order = parallel.map(order, (parallel_lib.OWN,), seldom=True)
        self._labels = split.labels if config.data.sampling == "balanced" else None
        self._batch_size, self._first_seed = config.batch_size, config.seed

    def batches(self, epoch: int, position: int):
        seeds = range(self._first_seed, self._first_seed + self._parallel.num_seeds)
        own = [{"seed": np.uint32(seed), "epoch": np.int32(epoch)} for seed in seeds]
        if self._labels is None:
            order = self._order(self._parallel.place_runs(own))
        else:
            order = self._parallel.place_runs([self._balanced(**one) for one in own])
        for _ in range(position, self.steps_per_epoch):
            yield order, self._examples  # the step picks its batch itself, by its number

    def _balanced(self, seed, epoch):
        """What `_order` gives, drawn so that every class comes equally often."""
        shape = (self.steps_per_epoch, self._batch_size)
        drawn = sampling.balanced_order(int(seed), int(epoch), self._labels, shape[0] * shape[1])
        indices, repeats = (x.reshape(shape) for x in drawn)
        return {"seed": seed, "epoch": epoch, "repeats": repeats}, indices

    def batch(self, arrays, step: jax.Array) -> dict[str, jax.Array]:
        (about, order), examples = arrays
        position = step % self.steps_per_epoch
        indices = parallel_lib.share(order[position])
        repeats = parallel_lib.share(about["repeats"][position]) if "repeats" in about else None
        drawn = (about["seed"], about["epoch"], self._settings, self._views, repeats)
        return train_batch(*examples, indices, *drawn)

    def close(self):
        pass


class EvalInput:
    """Feeds the evaluation step; see `data.eval_input`."""

    kinds = parallel_lib.SHARED

    def __init__(self, split, config, parallel):
        self._settings = config.data
        shares = parallel.shares
        self.batch_size = -(-min(config.evaluation.batch_size, len(split)) // shares) * shares
        indices, weights = eval_batches(len(split), self.batch_size)
        self._chosen = [parallel.place(batch) for batch in zip(indices, weights, strict=True)]
        self._examples = parallel.place((split.images, split.labels))

    def batches(self):
        for chosen in self._chosen:
            yield chosen, self._examples

    def batch(self, arrays) -> dict[str, jax.Array]:
        (indices, weights), examples = arrays
        return eval_batch(*examples, parallel_lib.share(indices), parallel_lib.share(weights), self._settings)


def _data_key(seed):
    # Folded once, so that data and initialisation never draw from the same key.
    return jax.random.fold_in(jax.random.key(seed), 0xDA7A)
