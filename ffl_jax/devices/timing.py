"""How long a compiled program takes."""

import statistics
import time
from collections.abc import Callable

import jax

_BLOCKS, _BLOCK_SECONDS = 5, 0.3


def step_seconds(step: Callable, state, *rest) -> float:
    """Seconds of `state = step(state, *rest)`: the median over blocks of calls, after two that compile."""
    for _ in range(2):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state, *rest))
    calls = max(1, round(_BLOCK_SECONDS / (time.perf_counter() - start)))
    times = []
    for _ in range(_BLOCKS):
        start = time.perf_counter()
        for _ in range(calls):
            state = step(state, *rest)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)
