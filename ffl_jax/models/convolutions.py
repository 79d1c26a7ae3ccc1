"""Every convolution comes through here and is computed by what its backend does fastest.

What stands in the place of XLA's own gives the same numbers within rounding:

| on accelerators | by |
| --- | --- |
| a convolution alone, or in groups | XLA |
| of several kernels by `vmap`: XLA makes groups of them | `convolutions_of_copies`: a block-diagonal kernel |

XLA's CPU backend takes 1.3 to ten times as long as it must for all but narrow forward passes:

| on a CPU | by |
| --- | --- |
| forward and input's gradient, unstrided, of 32 channels or more | `_by_rows`: a product for all taps |
| forward, all others | XLA |
| input's gradient, strided | `_input_gradient`: a convolution for each phase |
| kernel's gradient | `_kernel_gradient`: products of columns and rows that stay in the cache |
| depthwise, and their gradients | `_depthwise`: a sum of shifted products |
| patches of 4 pixels and more | `_patches`: one product |
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import lax

from ffl_jax.devices import backend
from ffl_jax.models import convolutions_of_copies
from ffl_jax.models.convolutions_of_copies import DIMENSIONS

# Of the operands of one matrix product, in bytes: what stays in a core's cache.
_CHUNK_BYTES = 3 << 20
# The side from which on patches that do not overlap are one matrix product.
_PATCH = 4
# Channels from which on unstrided convolutions are made by rows.
_ROWS_FROM = 32
# Of a depthwise kernel: more of them are a loop, since 49 taps of a program take seconds to compile.
_UNROLLED_ROWS = 5


def conv_general_dilated(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    feature_group_count: int = 1,
    **settings,
) -> jax.Array:
    """`lax.conv_general_dilated` of x [B, H, W, D] and a kernel [h, w, D / groups, E], for `nn.Conv` to call.

    Args:
      x, kernel: see above.
      window_strides: (rows, columns).
      padding: (before, after) of rows and of columns; "SAME" and "VALID" go to XLA as they are.
      feature_group_count: groups of channels that are convolved apart.
      **settings: the other arguments of `lax.conv_general_dilated`.
    """
    strides, groups = tuple(window_strides), feature_group_count
    dilated = any(settings.get(key) not in (None, (1, 1)) for key in ("lhs_dilation", "rhs_dilation"))
    usual = x.ndim == 4 and not isinstance(padding, str) and not dilated
    own_kernels = groups == 1 and settings.get("precision") is None
    if not usual or (_left_to_xla(x) and not (own_kernels and backend.is_accelerator())):
        return lax.conv_general_dilated(
            x, kernel, strides, padding, feature_group_count=feature_group_count, **settings
        )
    padding = tuple(tuple(pair) for pair in padding)
    if backend.is_accelerator():
        return convolutions_of_copies.convolution(strides, padding, x, kernel)
    if strides == kernel.shape[:2] and groups == 1 and min(strides) >= _PATCH and not np.any(padding):
        return _patches(x, kernel)
    # One kernel for each channel has no matrix product in it: it is a sum of shifted products.
    if groups == x.shape[-1] == kernel.shape[-1] > 1:
        return _depthwise(strides, padding, x, kernel)
    parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
    return jnp.concatenate([_convolution(strides, padding, *part) for part in parts], axis=-1)


def conv_transpose(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """`lax.conv_transpose` of x [B, U, V, D] and a kernel [h, w, D, E].

    Args:
      x, kernel: see above.
      strides: by which rows and columns are spread.
      padding: (before, after) of the spread rows and columns, less than the kernel's size.

    Returns:
      [B, H, W, E], where H = (U - 1) * stride + 2 + before + after - h, and W likewise.
    """
    strides, padding = tuple(strides), tuple(tuple(pair) for pair in padding)
    if _left_to_xla(x):
        return lax.conv_transpose(x, kernel, strides, padding)
    return _transposed(strides, padding, x, kernel)


def _left_to_xla(x):
    return not backend.is_cpu() or x.dtype not in (jnp.float32, jnp.float64)


Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)


class ConvTranspose(nn.Module):
    """`nn.ConvTranspose` without a bias, by `conv_transpose`.

    Attributes:
      features: channels of the output.
      kernel_size, strides: (rows, columns).
      padding: see `conv_transpose`.
      kernel_init: draws the kernel.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: Sequence[int]
    padding: Sequence[tuple[int, int]]
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, U, V, D] -> [B, H, W, E]."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        return conv_transpose(*promote_dtype(x, kernel), self.strides, self.padding)


def _patches(x, kernel):
    """The convolution whose strides are its kernel's sides: its patches are rows of a matrix."""
    height, width, channels, features = kernel.shape
    rows, columns = x.shape[1] // height, x.shape[2] // width
    x = x[:, : rows * height, : columns * width].reshape(-1, rows, height, columns, width, channels)
    return x.swapaxes(2, 3).reshape(-1, rows, columns, kernel[..., 0].size) @ kernel.reshape(-1, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolution(strides, padding, x, kernel):
    wide = kernel.shape[0] > 1 and min(kernel.shape[2:]) >= _ROWS_FROM
    if wide and strides == (1, 1) and min(map(min, padding)) >= 0:
        return _by_rows(padding, x, kernel)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


def _by_rows(padding, x, kernel):
    """One product of the columns that a row of taps sees with all rows of the kernel, whose parts are summed.

    In chunks of images that stay in the cache, with what is made of them.
    """
    height, width, channels, features = kernel.shape
    rows, columns = _output_size(x, kernel, (1, 1), padding)
    matrix = kernel.transpose(1, 2, 0, 3).reshape(width * channels, height * features)

    def one(x):
        x = _pad(x, padding)
        seen = jnp.concatenate([x[:, :, j : j + columns] for j in range(width)], axis=-1)
        parts = (seen.reshape(-1, width * channels) @ matrix).reshape(*seen.shape[:3], height, features)
        return sum(parts[:, i : i + rows, :, i] for i in range(height))

    each = (rows + height - 1) * columns * (width * channels + height * features) * x.dtype.itemsize
    return _in_chunks(one, each, x)


def _chunk(batch: int, bytes_each: int) -> int:
    """How many images at a time: the most that divide the batch and whose operands stay in the cache."""
    fits = max(1, _CHUNK_BYTES // bytes_each)
    return max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fits)


def _in_chunks(function, bytes_each, x):
    """`function` of as many images at a time as `_CHUNK_BYTES` allow: [B, ...] -> [B, ...]."""
    batch = len(x)
    chunk = _chunk(batch, bytes_each)
    if chunk == batch:
        return function(x)
    result = lax.map(function, x.reshape(batch // chunk, chunk, *x.shape[1:]))
    return result.reshape(batch, *result.shape[2:])


def _forward(strides, padding, x, kernel):
    return _convolution(strides, padding, x, kernel), (x, kernel)


def _backward(strides, padding, saved, gradient):
    x, kernel = saved
    with jax.named_scope("input_gradient"):
        by_input = _input_gradient(gradient, kernel, strides, padding, x.shape)
    with jax.named_scope("kernel_gradient"):
        return by_input, _kernel_gradient(x, gradient, strides, padding, kernel.shape)


_convolution.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _transposed(strides, padding, x, kernel):
    """The gradient of the input of a strided convolution, whose own gradients are that convolution's parts.

    XLA's CPU backend computes some of the latter by plain loops within a `while_loop` (docs/performance.md).
    """
    mirrored, padding = _mirrored(kernel), _mirrored_padding(kernel, padding)
    # The size of the result, by the formula of a convolution's output solved for its input.
    sides = [
        s * (size - 1) + k - sum(pair)
        for s, size, k, pair in zip(strides, x.shape[1:3], kernel.shape, padding, strict=False)
    ]
    return _input_gradient(x, mirrored, strides, padding, (len(x), *sides, kernel.shape[3]))


def _transposed_forward(strides, padding, x, kernel):
    return _transposed(strides, padding, x, kernel), (x, kernel)


def _transposed_backward(strides, padding, saved, gradient):
    x, kernel = saved
    # What was the input's gradient has as its own gradient the convolution itself, and the roles of image and
    # gradient are exchanged in that of the kernel.
    mirrored, padding = _mirrored(kernel), _mirrored_padding(kernel, padding)
    kernel_gradient = _kernel_gradient(gradient, x, strides, padding, mirrored.shape)
    return _convolution(strides, padding, gradient, mirrored), _mirrored(kernel_gradient)


_transposed.defvjp(_transposed_forward, _transposed_backward)


def _mirrored(kernel):
    """The kernel of the convolution that goes the other way; its own inverse."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _mirrored_padding(kernel, padding):
    return tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape, padding, strict=False))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _depthwise(strides, padding, x, kernel):
    """A sum of shifted products, which becomes one loop."""
    size = _output_size(x, kernel, strides, padding)
    x = _pad(x, padding)

    if len(kernel) <= _UNROLLED_ROWS:
        taps = np.ndindex(kernel.shape[:2])
        return sum(_window(x, tap, strides, size) * kernel[*tap, 0] for tap in taps)

    def add(row, total):
        seen = _from_row(x, row, kernel)
        return total + sum(_window(seen, (0, j), strides, size) * tap[0] for j, tap in enumerate(kernel[row]))

    return lax.fori_loop(0, len(kernel), add, jnp.zeros((len(x), *size, x.shape[-1]), x.dtype))


def _from_row(x, row, kernel):
    """Of a padded map, all that row `row` of the kernel sees, in any row of the output."""
    return lax.dynamic_slice_in_dim(x, row, x.shape[1] - len(kernel) + 1, axis=1)


def _depthwise_forward(strides, padding, x, kernel):
    return _depthwise(strides, padding, x, kernel), (x, kernel)


def _depthwise_backward(strides, padding, saved, gradient):
    x, kernel = saved
    size, padded = gradient.shape[1:3], _pad(x, padding)

    def sums(x, taps):
        return jnp.stack([(_window(x, tap, strides, size) * gradient).sum(axis=(0, 1, 2)) for tap in taps])

    if len(kernel) <= _UNROLLED_ROWS:
        kernel_gradient = sums(padded, np.ndindex(kernel.shape[:2]))
    else:
        taps = [(0, j) for j in range(kernel.shape[1])]
        kernel_gradient = lax.map(lambda i: sums(_from_row(padded, i, kernel), taps), jnp.arange(len(kernel)))
    # Spread by the strides, the gradient is convolved with the kernel turned around.
    around = [
        (k - 1 - low, n + low - 1 - s * (out - 1), s - 1)
        for k, n, (low, _), s, out in zip(kernel.shape, x.shape[1:3], padding, strides, size, strict=False)
    ]
    spread = lax.pad(gradient, jnp.zeros((), gradient.dtype), ((0, 0, 0), *around, (0, 0, 0)))
    x_gradient = _depthwise((1, 1), ((0, 0), (0, 0)), spread, kernel[::-1, ::-1])
    return x_gradient, kernel_gradient.reshape(kernel.shape)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _input_gradient(gradient, kernel, strides, padding, shape):
    """[B, U, V, E] and the kernel -> [B, H, W, D], by one convolution for each phase of the strides.

    An input's row, modulo the stride, is its phase. All rows of one phase are seen by the same taps, in
    consecutive rows of the output. XLA spreads the output with zeros in place of this.
    """
    sizes = [-(-size // s) for size, s in zip(shape[1:3], strides, strict=True)]

    def phase(row, column):
        starts, around = [], []
        # Along each axis: the first tap that sees this phase, with every `stride`-th from there on, and how
        # far the gradient must be padded so that each row of the phase has all of its taps.
        for first, axis in ((row, 0), (column, 1)):
            later, start = divmod(first + padding[axis][0], strides[axis])
            taps = len(range(start, kernel.shape[axis], strides[axis]))
            low = taps - 1 - later
            starts.append(start)
            around.append((low, sizes[axis] - gradient.shape[1 + axis] - low + taps - 1))
        taps = kernel[starts[0] :: strides[0], starts[1] :: strides[1]]
        if not taps.size:  # a kernel smaller than its stride leaves rows that no window sees
            return jnp.zeros((shape[0], *sizes, shape[3]), gradient.dtype)
        return _convolution((1, 1), tuple(around), gradient, _mirrored(taps))

    # The phases are woven into one another again.
    rows = [jnp.stack([phase(a, b) for b in range(strides[1])], axis=3) for a in range(strides[0])]
    height, width = (size * s for size, s in zip(sizes, strides, strict=True))
    return jnp.stack(rows, axis=2).reshape(shape[0], height, width, -1)[:, : shape[1], : shape[2]]


def _kernel_gradient(x, gradient, strides, padding, shape):
    """[B, H, W, D] and [B, U, V, E] -> [h, w, D, E], by matrix products that stay in the cache.

    The columns that the taps of a row see stand side by side in one factor, the rows of the gradient that an
    input row feeds in the other, so that their product is the gradient of all taps at once.
    """
    height, width, channels, features = shape
    _, rows, columns, _ = gradient.shape
    # Padding need not be full: the last rows and columns may be seen by no window.
    room = [(low, high + size) for (low, high), size in zip(padding, strides, strict=True)]

    def product(x, gradient):
        x = _pad(x, room)
        by_row = [None] * height
        # Taps of one phase see the same rows of the input, some strides apart: one product serves them all.
        for phase in range(min(strides[0], height)):
            taps = range(phase, height, strides[0])
            more = len(taps) - 1
            seen = [_window(x, (phase, j), strides, (rows + more, columns)) for j in range(width)]
            spread = jnp.pad(gradient, ((0, 0), (more, more), (0, 0), (0, 0)))
            fed = [spread[:, more - n : 2 * more - n + rows] for n in range(more + 1)]
            seen, fed = (
                jnp.concatenate(parts, axis=-1).reshape(-1, len(parts) * parts[0].shape[-1])
                for parts in (seen, fed)
            )
            products = lax.dot_general(seen, fed, (((0,), (0,)), ((), ())))
            products = products.reshape(width, channels, len(taps), features)
            for n, i in enumerate(taps):
                by_row[i] = products[:, :, n]
        return jnp.stack(by_row)

    # In chunks of images: the factors of a whole batch are tens of megabytes, more than a cache holds.
    batch = len(x)
    bytes_each = rows * columns * (width * channels + height * features) * x.dtype.itemsize
    chunk = _chunk(batch, bytes_each)
    if chunk == batch:
        return product(x, gradient)
    chunks = [array.reshape(batch // chunk, chunk, *array.shape[1:]) for array in (x, gradient)]
    zero = jnp.zeros(shape, gradient.dtype)
    return lax.scan(lambda total, parts: (total + product(*parts), None), zero, tuple(chunks))[0]


def _output_size(x, kernel, strides, padding):
    return tuple(
        (size + sum(pair) - k) // s + 1
        for size, pair, k, s in zip(x.shape[1:3], padding, kernel.shape[:2], strides, strict=True)
    )


def _pad(x, padding):
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _window(x, start, strides, size):
    """Of a padded map, every `strides`-th row and column from `start` on: [B, *size, D]."""
    stop = [first + s * (n - 1) + 1 for first, s, n in zip(start, strides, size, strict=True)]
    return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[3]), (1, *strides, 1))
