"""Pure per-example losses and ramps that methods share: in log space and float32, whatever networks use."""

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class SoftLabels:
    """Labels that are no class alone: smoothed, mixed or weighted.

    Attributes:
      probabilities: of the classes, float [B, C], of sum 1.
      weights: C numbers that multiply the classes' shares of a cross-entropy; empty for 1.
    """

    probabilities: jax.Array
    weights: tuple[float, ...] = flax.struct.field(pytree_node=False, default=())


def classes(labels: jax.Array | SoftLabels) -> jax.Array:
    """The class of each label, int [B]: of a soft one the likeliest, whatever its weight."""
    return labels.probabilities.argmax(axis=-1) if isinstance(labels, SoftLabels) else labels


def unweighted(labels: jax.Array | SoftLabels) -> jax.Array:
    """Labels without weights, for `cross_entropy` and `probabilities`: int [B] or float [B, C]."""
    return labels.probabilities if isinstance(labels, SoftLabels) else labels


def probabilities(labels: jax.Array, num_classes: int) -> jax.Array:
    """int [B] or float [B, C] -> float [B, C]."""
    return jax.nn.one_hot(labels, num_classes) if jnp.issubdtype(labels.dtype, jnp.integer) else labels


def cross_entropy(logits: jax.Array, labels: jax.Array | SoftLabels) -> jax.Array:
    """-sum_c w_c y_c log softmax(logits)_c: [..., B, C] -> [..., B].

    With weights as PyTorch's of probabilities: a mean over a batch divides by B, not by the sum of weights.

    Args:
      logits: [..., B, C].
      labels: classes, int [B]; what multiplies each log-probability, float [B, C]; or `SoftLabels`.
    """
    log_probabilities = _log_softmax(logits)
    if isinstance(labels, SoftLabels):
        weights = jnp.array(labels.weights or 1.0, labels.probabilities.dtype)
        labels = weights * labels.probabilities
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return -(labels * log_probabilities).sum(axis=-1)
    labels = jnp.broadcast_to(labels, logits.shape[:-1])
    return -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]


def kl_divergence(
    logits: jax.Array, target_logits: jax.Array, temperature: float, smoothing: float = 0.0
) -> jax.Array:
    """T**2 * KL(target || logits) at temperature T: [..., C], [..., C] -> [...]. Hinton et al., 2015, sec. 2.

    Args:
      logits: of the learner; broadcast against the target.
      target_logits: of the teacher. The gradient flows into it too, unless the caller stops it.
      temperature: softens both sides.
      smoothing: added to every target probability, which is not normalised again (FFL's released code: 1e-7).
    """
    log_p = _log_softmax(logits, temperature)
    log_q = _log_softmax(target_logits, temperature)
    if smoothing:
        log_q = jnp.logaddexp(log_q, math.log(smoothing))
    return temperature**2 * (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1)


def sigmoid_rampup(epoch: jax.Array, rampup_epochs: float) -> jax.Array:
    """exp(-5 (1 - epoch / R)**2), held at 1 from epoch R on; 1 where R = 0. Laine & Aila, 2017, sec. 3.1."""
    if rampup_epochs == 0:
        return jnp.ones_like(epoch, jnp.float32)
    progress = jnp.clip(epoch / rampup_epochs, 0.0, 1.0)
    return jnp.exp(-5.0 * (1.0 - progress) ** 2)


def of_others(logits: jax.Array) -> jax.Array:
    """For each network, those of all the others, in order: [K, ...] -> [K, K - 1, ...]."""
    num = len(logits)
    return logits[np.array([[other for other in range(num) if other != k] for k in range(num)])]


def at_least_float32(x: jax.Array) -> jax.Array:
    """Narrower types become float32; float64 stays, so that tests can look past rounding."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit(x: jax.Array) -> jax.Array:
    """Every example divided by its L2 norm, in at least float32: [B, ...] -> [B, ...]."""
    x = at_least_float32(x)
    return x / l2_norm(x)


def l2_norm(x: jax.Array) -> jax.Array:
    """The norm of every example, or 1e-12 if that is larger: [B, ...] -> [B, 1, ...]."""
    # The maximum is within the root, whose derivative at 0 would make NaN of a gradient.
    squares = jnp.square(x).sum(axis=range(1, x.ndim), keepdims=True)
    return jnp.sqrt(jnp.maximum(squares, 1e-24))


def _log_softmax(logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    return jax.nn.log_softmax(at_least_float32(logits) / temperature)
