"""Batch normalisation that reads each map as seldom as it can.

The variance that follows from the formula waits for the mean, and the backward pass has four sums: passes
over the whole map, of one thread on a CPU and of two small kernels each on a GPU. What stands in their place
is the same within rounding.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ffl_jax.devices import backend


class BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` over [B, H, W, D], with its variables and its statistics over all devices."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, D]."""
        usual = x.ndim == 4 and (x.dtype in (jnp.float32, jnp.float64) or not backend.is_cpu())
        if self.use_running_average or self.is_initializing() or backend.is_plain() or not usual:
            return super().__call__(x)
        scale, bias = (self.get_variable("params", name) for name in ("scale", "bias"))
        y, mean, variance = _normalized(self.axis_name, self.epsilon, x, scale, bias)
        for name, new in (("mean", mean), ("var", variance)):
            old = self.get_variable("batch_stats", name)
            self.put_variable("batch_stats", name, self.momentum * old + (1 - self.momentum) * new)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalized(axis_name, epsilon, x, scale, bias):
    """(normalised x [B, H, W, D], its mean [D] and variance [D] over all devices)."""
    return _forward(axis_name, epsilon, x, scale, bias)[0]


def _forward(axis_name, epsilon, x, scale, bias):
    saved, dtype = (x, scale, bias), x.dtype
    x, scale, bias = _accurate(x, scale, bias)
    # Sums of squares lose digits where the mean is large beside the spread, so they are taken of differences
    # to a number that is among each channel's own: then one pass is enough.
    near = x[0, 0, 0]
    apart = x - near
    first, variance = _mean(apart), _mean(jnp.square(apart))
    variance = jnp.maximum(variance - jnp.square(first), 0)
    mean = near + first
    if axis_name:
        here, mean = mean, lax.pmean(mean, axis_name)
        variance = lax.pmean(variance + jnp.square(here - mean), axis_name)
    slope = lax.rsqrt(variance + epsilon)
    y = (x - mean) * (scale * slope) + bias
    return (y.astype(dtype), mean, variance), (*saved, mean, slope)


def _backward(axis_name, epsilon, saved, gradients):
    *given, mean, slope = saved
    # Nothing is learned through the statistics that are kept.
    x, scale, gradient = _accurate(*given[:2], gradients[0])
    normal = (x - mean) * slope
    bias_mean, scale_mean = _mean(gradient), _mean(gradient * normal)
    count = x.size // x.shape[-1]
    scale_gradient, bias_gradient = scale_mean * count, bias_mean * count
    if axis_name:
        bias_mean, scale_mean = lax.pmean((bias_mean, scale_mean), axis_name)
    x_gradient = (gradient - bias_mean - normal * scale_mean) * (scale * slope)
    found = (x_gradient, scale_gradient, bias_gradient)
    return tuple(one.astype(like.dtype) for one, like in zip(found, given, strict=True))


_normalized.defvjp(_forward, _backward)


def _mean(x):
    """[B, H, W, D] -> [D], image by image, so that threads share the work."""
    return x.sum(axis=(1, 2)).sum(axis=0) / (x.size // x.shape[-1])


def _accurate(*arrays):
    """As float32 where they are shorter."""
    return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays]
