"""Scores of one prediction as sums that can be merged over batches and devices, in any order."""

import jax
import jax.numpy as jnp
import numpy as np

CALIBRATION_BINS = 15


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
    log_probabilities = jax.nn.log_softmax(logits)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # How many classes stand before the label: larger logits, and equal ones of a lower index, so that ties
    # go to the lower index as in argmax.
    tied_before = (logits == label_logits) & (jnp.arange(logits.shape[-1]) < labels[:, None])
    rank = ((logits > label_logits) | tied_before).sum(axis=-1)
    # Every comparison with NaN is false, which would rank the label first.
    valid = jnp.isfinite(log_probabilities).all(axis=-1)
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
        "bin_confidence": (members * confidence[:, None]).sum(axis=0),
        "bin_correct": (members * top1[:, None]).sum(axis=0),
    }


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
