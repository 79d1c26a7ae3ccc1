"""Convolutions that `vmap` over their kernels leaves whole, on accelerators.

XLA makes of them a grouped convolution, which is slow on a GPU where channels are few. Here the channels of
all copies stand side by side in one convolution. Most of the products that its block-diagonal kernel adds are
with zeros, and yet it takes a half to a quarter of the time: maps of few channels are read and written more
slowly than products are made of them (docs/performance.md). Copies that share their input have no zeros.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Channels that stand side by side: with more, too many products are with zeros.
_MOST_CHANNELS = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def convolution(
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    x: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    """XLA's convolution of x [B, H, W, D] and a kernel [h, w, D, E]; of copies by `vmap`, all of them in one.

    Args:
      strides: of (rows, columns).
      padding: (before, after) of rows and of columns.
      x, kernel: see above.
    """

    def together(own_input, x, kernel):
        wide = _block_diagonal(kernel) if own_input else _joined(kernel)
        return _parted(convolution(strides, padding, _joined(x) if own_input else x, wide), len(kernel))

    call = functools.partial(_plain, strides, padding)
    return _of_copies(call, together, max(kernel.shape[2:]))(x, kernel)


def _forward(strides, padding, x, kernel):
    return convolution(strides, padding, x, kernel), (x, kernel)


def _backward(strides, padding, saved, gradient):
    x, kernel = saved
    with jax.named_scope("input_gradient"):
        by_input = _input_gradient(strides, padding, x.shape, gradient, kernel)
    with jax.named_scope("kernel_gradient"):
        return by_input, _kernel_gradient(strides, padding, kernel.shape, x, gradient)


convolution.defvjp(_forward, _backward)


def _input_gradient(strides, padding, shape, gradient, kernel):
    """[B, U, V, E] and the kernel -> [B, H, W, D], of that shape."""

    def alone(gradient, kernel):
        of_input = functools.partial(_plain, strides, padding, kernel=kernel)
        return jax.linear_transpose(of_input, jax.ShapeDtypeStruct(shape, gradient.dtype))(gradient)[0]

    def together(_, gradient, kernel):
        copies, wide = len(kernel), (*shape[:3], len(kernel) * shape[3])
        found = _input_gradient(strides, padding, wide, _joined(gradient), _block_diagonal(kernel))
        return _parted(found, copies)

    return _of_copies(alone, together, max(kernel.shape[2:]), shares=False)(gradient, kernel)


def _kernel_gradient(strides, padding, shape, x, gradient):
    """[B, H, W, D] and [B, U, V, E] -> [h, w, D, E], of that shape."""

    def alone(x, gradient):
        of_kernel = functools.partial(_plain, strides, padding, x)
        return jax.linear_transpose(of_kernel, jax.ShapeDtypeStruct(shape, gradient.dtype))(gradient)[0]

    def together(own_input, x, gradient):
        copies, (height, width, channels, features) = len(gradient), shape
        inputs = copies if own_input else 1
        wide = (height, width, inputs * channels, copies * features)
        x = _joined(x) if own_input else x
        found = _kernel_gradient(strides, padding, wide, x, _joined(gradient))
        found = found.reshape(height, width, inputs, channels, copies, features)
        return jnp.stack([found[:, :, i if own_input else 0, :, i] for i in range(copies)])

    return _of_copies(alone, together, max(shape[2:]))(x, gradient)


def _plain(strides, padding, x, kernel):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


def _of_copies(alone: Callable, together: Callable, channels: int, shares: bool = True) -> Callable:
    """`alone` of (x, y), which `vmap` turns into `together` of (whether each copy has its own x, x, y).

    Args:
      alone: of one copy.
      together: of several, as many at a time as `_MOST_CHANNELS` allows.
      channels: of one of them.
      shares: whether `together` can take one x for all; they are repeated if not.
    """
    function = jax.custom_batching.custom_vmap(alone)

    @function.def_vmap
    def of_copies(copies, batched, x, y):
        own, several = batched
        if not several:  # one kernel: the copies are more images
            return jax.vmap(alone, (0, None))(x, y), True
        if not (own or shares):
            x, own = jnp.broadcast_to(x, (copies, *x.shape)), True
        most = max(1, _MOST_CHANNELS // channels) if own else copies
        if most == 1 or copies == 1:
            ones = [function(x[i] if own else x, y[i]) for i in range(copies)]
            return jnp.stack(ones), True
        parts = [slice(first, first + most) for first in range(0, copies, most)]
        return jnp.concatenate([together(own, x[some] if own else x, y[some]) for some in parts]), True

    return function


def _joined(x):
    """[K, ..., D] -> [..., K * D], copy by copy."""
    return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)


def _parted(x, copies):
    """[..., K * D] -> [K, ..., D]."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], copies, -1), -2, 0)


def _block_diagonal(kernel):
    """[K, h, w, D, E] -> [h, w, K * D, K * E], zero where the copies differ."""
    copies, height, width, channels, features = kernel.shape
    apart = jnp.moveaxis(kernel, 0, 2)[..., None, :] * jnp.eye(copies, dtype=kernel.dtype)[:, None, :, None]
    return apart.reshape(height, width, copies * channels, copies * features)
