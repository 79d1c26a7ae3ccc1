"""Scores as sums that can be merged over batches and devices, in any order."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

CALIBRATION_BINS = 15
LARGEST_CONFUSION = 2000  # classes: what is taken for what is 16 MB of counts then


def classification_sums(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Sums over a batch from which `classification_scores` computes the scores.

    Args:
      logits: [B, C].
      labels: int [B].
      weights: 1 for an example that counts and 0 for padding, [B]; None counts all.

    Returns:
      {name: float32 scalar, or [CALIBRATION_BINS]}; add them leaf by leaf to merge.
    """
    logits = logits.astype(jnp.float32)
    weights = jnp.ones(labels.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    log_probabilities, rank, valid = _standing(logits, labels)
    top1, top5 = (valid & (rank < k) for k in (1, 5))
    confidence = jnp.where(weights > 0, jnp.exp(log_probabilities.max(axis=-1)), 0.0)
    bins = jnp.clip(jnp.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1).astype(jnp.int32)
    members = jax.nn.one_hot(bins, CALIBRATION_BINS) * weights[:, None]
    nll = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    return {
        "count": weights.sum(),
        "top1": (weights * top1).sum(),
        "top5": (weights * top5).sum(),
        "nll": jnp.where(weights > 0, nll, 0.0).sum(),
        "bin_count": members.sum(axis=0),
        "bin_confidence": (members * confidence[:, None]).sum(axis=0),
        "bin_correct": (members * top1[:, None]).sum(axis=0),
    }


def _standing(logits, labels):
    """Of float32 logits [B, C]: (log-probabilities, how many classes stand before the label, is it valid).

    XLA computes it once, however often it is asked for.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # Larger logits, and equal ones of a lower index, so that ties go to the lower index as in argmax.
    tied_before = (logits == label_logits) & (jnp.arange(logits.shape[-1]) < labels[:, None])
    rank = ((logits > label_logits) | tied_before).sum(axis=-1)
    # Every comparison with NaN is false, which would rank the label first.
    return log_probabilities, rank, jnp.isfinite(log_probabilities).all(axis=-1)


def classification_scores(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """The scores that a run reports: `top1`, `top5` and `ece` in 0..1, `nll` in nats per example.

    `ece` is the expected calibration error over `CALIBRATION_BINS` equal bins of confidence: Guo et al.,
    2017. With at most five classes `top5` is 1.
    """
    count = float(sums["count"])
    scores = {name: float(sums[name]) / count for name in ("top1", "top5", "nll")}
    gaps = np.abs(
        np.asarray(sums["bin_correct"], np.float64) - np.asarray(sums["bin_confidence"], np.float64)
    )
    return scores | {"ece": float(gaps.sum()) / count}


def reliability(sums: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """What a reliability diagram shows: `count`, mean `confidence` and `accuracy`, 0..1, of each equal bin.

    Both are 0 where a bin is empty.
    """
    count = np.asarray(sums["bin_count"], np.float64)
    means = {
        name: np.asarray(sums[key], np.float64) / np.maximum(count, 1)
        for name, key in (("confidence", "bin_confidence"), ("accuracy", "bin_correct"))
    }
    return {name: one.tolist() for name, one in ({"count": count} | means).items()}


def class_sums(
    predictions: dict[str, jax.Array], labels: jax.Array, weights: jax.Array, confused: str
) -> dict:
    """Counts over a batch from which `class_scores` tells class from class: int32, and so exact.

    Args:
      predictions: {prediction: logits [B, C]}.
      labels: int [B].
      weights: 1 for an image that counts and 0 for padding, [B].
      confused: the prediction whose errors are counted one by one; of all would be too much memory.

    Returns:
      `images` [C] of each class. `right` {prediction: [C]} of them, those that it names rightly. `confusion`
      [C, C], how many images of each class (rows) are taken for which (columns); {} of more classes than
      `LARGEST_CONFUSION`. What has logits that are not finite is taken for none.
    """
    predictions = {name: logits.astype(jnp.float32) for name, logits in predictions.items()}
    num_classes = predictions[confused].shape[-1]
    counted = (weights > 0).astype(jnp.int32)
    right, valid = [], {}
    for name, logits in predictions.items():
        _, rank, valid[name] = _standing(logits, labels)
        right.append(valid[name] & (rank < 1))
    # One addition for all of them: XLA compiles each on its own, and slowly.
    columns = jnp.stack([jnp.ones_like(counted), *right], axis=-1) * counted[:, None]
    images, *right = jnp.zeros((num_classes, columns.shape[-1]), jnp.int32).at[labels].add(columns).T
    confusion = {}
    if num_classes <= LARGEST_CONFUSION:
        # What is added outside of the matrix is dropped.
        answers = jnp.where(valid[confused], predictions[confused].argmax(axis=-1), num_classes)
        confusion = jnp.zeros((num_classes, num_classes), jnp.int32)
        confusion = confusion.at[labels, answers].add(counted, mode="drop")
    return {
        "images": images,
        "right": dict(zip(predictions, right, strict=True)),
        "confusion": confusion,
    }


def class_scores(sums: dict, confused: str) -> dict:
    """What `class_sums` of a whole split say, JSON-able.

    Returns:
      `balanced_accuracy`: {prediction: the mean of its accuracies in each class, 0..1}; classes without
      images are in no mean. `images`, `right`: [C] counts of `confused`. `confusion`: the counts that are not
      zero, as `true`, `predicted` and `images`, three lists; None where it was not counted.
    """
    images, confusion = sums["images"], sums["confusion"]
    seen = images > 0
    recalls = {name: right[seen] / images[seen] for name, right in sums["right"].items()}
    entries = None
    if not isinstance(confusion, dict):
        true, predicted = np.nonzero(confusion)
        entries = {"true": true, "predicted": predicted, "images": confusion[true, predicted]}
        entries = {key: values.tolist() for key, values in entries.items()}
    return {
        "balanced_accuracy": {name: float(values.mean()) for name, values in recalls.items()},
        "images": images.tolist(),
        "right": sums["right"][confused].tolist(),
        "confusion": entries,
    }


def diversity_sums(
    logits: jax.Array, feature_maps: Sequence[jax.Array], weights: jax.Array
) -> dict[str, jax.Array]:
    """Sums over a batch from which `diversity_scores` compares K networks, pair by pair.

    Args:
      logits: [K, B, C].
      feature_maps: K times [B, H, W, D]; each position is a sample, unless networks differ in H and W: then
        each image is one, by the mean over its positions.
      weights: 1 for an image that counts and 0 for padding, [B].
    """
    logits = logits.astype(jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits)
    probabilities = jnp.exp(log_probabilities)
    own = (probabilities * log_probabilities).sum(axis=-1)
    cross = jnp.einsum("ibc,jbc->ijb", probabilities, log_probabilities, precision="highest")
    classes = logits.argmax(axis=-1)
    if len({x.shape[1:3] for x in feature_maps}) > 1:
        feature_maps = [x.mean(axis=(1, 2), keepdims=True) for x in feature_maps]
    samples = [x.astype(jnp.float32).reshape(len(x), -1, x.shape[-1]) for x in feature_maps]
    samples = [(x * weights[:, None, None]).reshape(-1, x.shape[-1]) for x in samples]
    return {
        "count": weights.sum(),
        "disagreement": ((classes[:, None] != classes) * weights).sum(axis=-1),
        "kl": ((own[:, None] - cross) * weights).sum(axis=-1),
        "samples": weights.sum() * (len(samples[0]) // len(weights)),
        "features": [x.sum(axis=0) for x in samples],
        "products": [
            [jnp.dot(x.T, y, precision="highest") for y in samples[i:]] for i, x in enumerate(samples)
        ],
    }


def diversity_scores(sums: dict) -> dict[str, np.ndarray]:
    """How far K networks differ, each [K, K]: `disagreement`, `kl` and `cka`.

    `disagreement` is the share of images, 0..1, for which two networks name different classes; `kl` the
    Kullback-Leibler divergence of column j's softmax from row i's, in nats per image; `cka` the linear
    centred kernel alignment of their features, 0..1, which is 1 where they are equal up to rotation and
    scale: Kornblith et al., 2019. It is 0 where a network's features are constant.
    """
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    num = len(sums["features"])
    means = [x / sums["samples"] for x in sums["features"]]
    similarity = np.zeros((num, num))
    for i, row in enumerate(sums["products"]):
        for j, products in enumerate(row, i):
            covariance = products / sums["samples"] - np.outer(means[i], means[j])
            similarity[i, j] = similarity[j, i] = np.square(covariance).sum()
    own = np.sqrt(np.diag(similarity))
    norms = np.outer(own, own)
    cka = np.divide(similarity, norms, out=np.zeros_like(norms), where=norms > 0)
    return {
        "disagreement": sums["disagreement"] / sums["count"],
        "kl": sums["kl"] / sums["count"],
        "cka": cka,
    }


def mean_over_pairs(matrix: np.ndarray) -> float:
    """Of what a [K, K] comparison says of two different networks."""
    matrix = np.asarray(matrix)
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


def pair_means(diversity: dict[str, list]) -> dict[str, float]:
    """Of each score of `diversity_scores`, the mean over pairs; {} of {}."""
    return {name: mean_over_pairs(matrix) for name, matrix in diversity.items()}


def by_name(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """{prediction: {score: x}} -> {"prediction/score": x}, as a line of the log has them."""
    return {f"{name}/{score}": value for name, one in scores.items() for score, value in one.items()}
