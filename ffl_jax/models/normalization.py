"""Batch normalisation that reads each map as seldom as it can on a CPU.

XLA's CPU backend takes the mean and the variance in passes of one thread over the whole map, and the backward
pass that follows from the formula has more of them. What stands in their place there is the same within
rounding.
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
        usual = x.ndim == 4 and x.dtype in (jnp.float32, jnp.float64)
        if self.use_running_average or self.is_initializing() or not usual or not backend.is_cpu():
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
    return (y, mean, variance), (x, mean, slope, scale)


def _backward(axis_name, epsilon, saved, gradients):
    x, mean, slope, scale = saved
    gradient, _, _ = gradients  # nothing is learned through the statistics that are kept
    normal = (x - mean) * slope
    bias_mean, scale_mean = _mean(gradient), _mean(gradient * normal)
    count = x.size // x.shape[-1]
    scale_gradient, bias_gradient = scale_mean * count, bias_mean * count
    if axis_name:
        bias_mean, scale_mean = lax.pmean((bias_mean, scale_mean), axis_name)
    x_gradient = (gradient - bias_mean - normal * scale_mean) * (scale * slope)
    return x_gradient, scale_gradient, bias_gradient


_normalized.defvjp(_forward, _backward)


def _mean(x):
    """[B, H, W, D] -> [D], image by image, so that threads share the work."""
    return x.sum(axis=(1, 2)).sum(axis=0) / (x.size // x.shape[-1])
