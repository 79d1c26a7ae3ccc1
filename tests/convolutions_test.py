"""Convolutions and their gradients against loops over the taps in NumPy float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import equations

from ffl_jax.devices import backend
from ffl_jax.models import convolutions, convolutions_of_copies

CASES = {
    "stem": dict(shape=(4, 8, 9, 3), kernel=(3, 3, 3, 5)),
    "strided": dict(shape=(4, 8, 9, 3), kernel=(3, 3, 3, 5), stride=2),
    "strided_1x1": dict(shape=(3, 8, 7, 2), kernel=(1, 1, 2, 3), stride=2, pad=0),
    "unpadded_2x2": dict(shape=(2, 7, 8, 2), kernel=(2, 2, 2, 3), stride=2, pad=0),
    "wide_stride": dict(shape=(2, 11, 10, 2), kernel=(3, 3, 2, 3), stride=4),
    "large_kernel": dict(shape=(2, 12, 12, 2), kernel=(7, 7, 2, 3), stride=2, pad=3),
    "whole_map": dict(shape=(2, 5, 6, 2), kernel=(5, 6, 2, 1), pad=0),
    "patches": dict(shape=(2, 9, 14, 3), kernel=(4, 4, 3, 5), stride=4, pad=0),
    "wide": dict(shape=(4, 5, 6, 32), kernel=(3, 3, 32, 40)),
    "wide_unpadded": dict(shape=(3, 6, 5, 33), kernel=(3, 2, 33, 32), pad=0),
    "wide_strided": dict(shape=(2, 7, 8, 32), kernel=(3, 3, 32, 32), stride=2),
    "depthwise": dict(shape=(3, 6, 7, 4), kernel=(3, 3, 1, 4), groups=4),
    "depthwise_strided": dict(shape=(3, 6, 7, 4), kernel=(3, 3, 1, 4), groups=4, stride=2),
    "depthwise_7x7": dict(shape=(2, 6, 5, 4), kernel=(7, 7, 1, 4), groups=4, pad=3),
    "depthwise_7x7_strided": dict(shape=(2, 9, 8, 4), kernel=(7, 7, 1, 4), groups=4, stride=2, pad=3),
    "grouped": dict(shape=(3, 6, 7, 6), kernel=(3, 3, 2, 9), groups=3),
}


def case(shape, kernel, stride=1, pad=1, groups=1):
    """((inputs, kernel, output's gradient), (output, inputs' gradient, kernel's) as they must be, call)."""
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=shape), rng.normal(size=kernel)
    height, width = ((n + 2 * pad - m) // stride + 1 for n, m in zip(shape[1:3], kernel, strict=False))
    gradient = rng.normal(size=(shape[0], height, width, kernel[3]))
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y, dx, dk = np.zeros_like(gradient), np.zeros_like(padded), np.zeros_like(k)
    ins, outs = shape[3] // groups, kernel[3] // groups
    for i, j, group in np.ndindex(*kernel[:2], groups):
        rows, columns = (
            slice(n, n + stride * (size - 1) + 1, stride) for n, size in ((i, height), (j, width))
        )
        inside = (slice(None), rows, columns, slice(group * ins, (group + 1) * ins))
        part = slice(group * outs, (group + 1) * outs)
        tap = k[i, j, :, part]
        y[..., part] += padded[inside] @ tap
        dx[inside] += gradient[..., part] @ tap.T
        dk[i, j, :, part] = np.einsum("bhwd,bhwe->de", padded[inside], gradient[..., part])
    dx = dx[:, pad : pad + shape[1], pad : pad + shape[2]]

    def call(x, k):
        return convolutions.conv_general_dilated(
            x,
            k,
            (stride, stride),
            [(pad, pad)] * 2,
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return (x, k, gradient), (y, dx, dk), call


def run(call, x, k, gradient):
    y, pullback = jax.vjp(call, x, k)
    return y, *pullback(gradient)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_bytes", [1, 3 << 20])
def test_equals_loops_over_the_taps(name, chunk_bytes, monkeypatch):
    monkeypatch.setattr(convolutions, "_CHUNK_BYTES", chunk_bytes)
    arguments, expected, call = case(**CASES[name])
    with jax.enable_x64(True):
        results = jax.jit(lambda *arguments: run(call, *arguments))(*map(jnp.asarray, arguments))
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("strides", "padding"),
    [((2, 2), ((1, 2), (1, 1))), ((1, 2), ((1, 1), (0, 2))), ((3, 1), ((2, 0), (1, 0)))],
)
def test_transposed_equals_the_gradient_of_its_definition(strides, padding):
    """Every pixel adds a multiple of the turned kernel, and the borders fall off: a sum over the taps."""
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(2, 4, 5, 3)), rng.normal(size=(3, 3, 3, 2))
    # The spread map, padded by 2 on all sides; what falls off of its result is 2 less the padding.
    spread = np.zeros((2, 3 * strides[0] + 5, 4 * strides[1] + 5, 3))
    inside = (slice(None), slice(2, -2, strides[0]), slice(2, -2, strides[1]))
    spread[inside] = x
    height, width = (n - 2 for n in spread.shape[1:3])
    kept = (
        slice(None),
        *(slice(2 - a, n - 2 + b) for (a, b), n in zip(padding, (height, width), strict=True)),
    )
    y = np.zeros((2, height, width, 2))
    for i, j in np.ndindex(3, 3):
        y += spread[:, i : i + height, j : j + width] @ k[i, j]
    gradient = rng.normal(size=y[kept].shape)
    full, dx, dk = np.zeros_like(y), np.zeros_like(spread), np.zeros_like(k)
    full[kept] = gradient
    for i, j in np.ndindex(3, 3):
        window = (slice(None), slice(i, i + height), slice(j, j + width))
        dx[window] += full @ k[i, j].T
        dk[i, j] = np.einsum("bhwd,bhwe->de", spread[window], full)
    with jax.enable_x64(True):

        def results():
            return run(
                lambda *a: convolutions.conv_transpose(*a, strides, padding),
                *map(jnp.asarray, (x, k, gradient)),
            )

        ours = results()
        with backend.as_accelerator():
            theirs = results()
    for result, other, wanted in zip(ours, theirs, (y[kept], dx[inside], dk), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-12)
        np.testing.assert_allclose(other, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["strided", "patches", "depthwise", "depthwise_7x7"])
def test_vectorized_equals_one_after_another(name):
    arguments, _, call = case(**CASES[name])
    with jax.enable_x64(True):
        both = [jnp.stack([jnp.asarray(x), 2 - jnp.asarray(x)]) for x in arguments]
        together = jax.jit(jax.vmap(lambda *arguments: run(call, *arguments)))(*both)
        for k in range(2):
            for one, all_ in zip(run(call, *(x[k] for x in both)), together, strict=True):
                np.testing.assert_allclose(all_[k], one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("own_input", [True, False])
@pytest.mark.parametrize(
    ("name", "up_to", "copies"),
    [("stem", 512, 3), ("stem", 12, 3), ("stem", 1, 3), ("stem", 512, 1), ("strided", 512, 3)],
)
def test_copies_on_accelerators_are_one_convolution(name, up_to, copies, own_input, monkeypatch):
    """Runs of copies, each as by itself, in parts of so many channels; none is a grouped convolution."""
    monkeypatch.setattr(convolutions_of_copies, "_MOST_CHANNELS", up_to)
    (x, k, gradient), _, call = case(**CASES[name])
    factors = np.array([[1.0, -2.0, 0.5], [3.0, 0.25, -1.5]])[:, :copies]  # of two runs
    xs, ks, gradients = (np.multiply.outer(factors, a) for a in (x, k, gradient))
    if not own_input:
        xs = xs[:, 0]

    def one_run(x, k, gradient):
        y, pullback = jax.vjp(jax.vmap(call, (0 if own_input else None, 0)), x, k)
        return y, *pullback(gradient)

    with jax.enable_x64(True), backend.as_accelerator():
        program = jax.jit(jax.vmap(one_run)).lower(*map(jnp.asarray, (xs, ks, gradients)))
        y, dx, dk = program.compile()(xs, ks, gradients)
    assert set(re.findall(r"(?:feature|batch)_group_count = (\d+)", program.as_text())) == {"1"}
    for i, j in np.ndindex(2, copies):
        own = factors[i, j if own_input else 0] * x
        with jax.enable_x64(True):
            wanted = run(call, own, ks[i, j], gradients[i, j])
        np.testing.assert_allclose(y[i, j], wanted[0], rtol=0, atol=1e-11)
        np.testing.assert_allclose(dk[i, j], wanted[2], rtol=0, atol=1e-11)
        if own_input:
            np.testing.assert_allclose(dx[i, j], wanted[1], rtol=0, atol=1e-11)


def test_accelerators_get_the_convolutions_of_xla(monkeypatch):
    """Also the depthwise one, and its gradients."""
    arguments, _, call = case(**CASES["depthwise"])

    def convolutions_of_xla():
        program = jax.make_jaxpr(lambda *arguments: run(call, *arguments))(*map(jnp.float32, arguments))
        return str(program).count("conv_general_dilated[")

    assert convolutions_of_xla() == 0
    with backend.as_accelerator():
        assert convolutions_of_xla() == 3
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolutions_of_xla() == 3


def test_a_precision_that_is_asked_for_is_kept_on_accelerators():
    """With its gradients; by default it is the backend's."""
    x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 3))

    def loss(x, k, precision):
        y = convolutions.conv_general_dilated(
            *(x, k, (1, 1), [(1, 1)] * 2),
            precision=precision,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.sum()

    with backend.as_accelerator():
        for precision, times in ((None, 0), ("highest", 3)):
            program = jax.make_jaxpr(jax.grad(loss, (0, 1)), static_argnums=2)(x, k, precision)
            convolved = [
                one for one in equations(program.jaxpr) if one.primitive.name == "conv_general_dilated"
            ]
            assert sum("HIGHEST" in str(one.params["precision"]) for one in convolved) == times
            assert len(convolved) == 3
