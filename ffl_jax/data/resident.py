"""Small datasets held in device memory as uint8: shuffled, batched and augmented inside compiled code.

The data order is a pure function of (seed, epoch, position). There is no iterator, and nothing to save.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ffl_jax.data import augment


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches that cover every example; the last is filled up from the beginning of the same order.

    FFL's released code lets the last batch of an epoch be smaller. Full batches keep that count of steps and
    need no second program, at the price of at most batch_size - 1 examples seen twice in an epoch.
    """
    return -(-num_examples // batch_size)


def epoch_order(seed: int, epoch: jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Example indices of one epoch, int32 [steps_per_epoch, batch_size]; each example comes at least once."""
    key = jax.random.fold_in(_data_key(seed), epoch)
    order = jax.random.permutation(key, num_examples)
    steps = steps_per_epoch(num_examples, batch_size)
    return jnp.resize(order, (steps, batch_size)).astype(jnp.int32)


def train_batch(
    images: jax.Array, labels: jax.Array, indices: jax.Array, seed: int, epoch: jax.Array, settings
) -> dict[str, jax.Array]:
    """An augmented, normalised batch.

    Args:
      images, labels: the whole training split, uint8 [N, H, W, 3] and int32 [N].
      indices: [B], the examples to take.
      seed, epoch: with the example's index they fix its augmentation, whatever device or position it has.
      settings: the `data` section of the configuration: `pad`, `flip`, `mean`, `std`.
    """
    # Away from the key of the order itself, which the same epoch folds in.
    epoch_key = jax.random.fold_in(jax.random.fold_in(_data_key(seed), epoch), 1)
    keys = jax.vmap(lambda index: jax.random.fold_in(epoch_key, index))(indices)
    batch = augment.pad_crop_flip(images[indices], keys, settings.pad, settings.flip)
    return {"image": augment.normalize(batch, settings.mean, settings.std), "label": labels[indices]}


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


def _data_key(seed):
    # Folded once, so that data and initialisation never draw from the same key.
    return jax.random.fold_in(jax.random.key(seed), 0xDA7A)
