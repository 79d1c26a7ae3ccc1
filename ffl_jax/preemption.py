"""SIGTERM and SIGINT: the first asks a run to save and stop, a second one ends it at once.

Light on imports: the handler stands before the heavy ones begin.
"""

import contextlib
import os
import signal

from ffl_jax.errors import Preempted

_received: list[int] = []
_deferred = False


def install():
    """Takes over SIGTERM and SIGINT; to be called once, in the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handle)


def _handle(number, frame):
    if _received:
        os._exit(128 + number)
    _received.append(number)
    if not _deferred:
        raise Preempted(_message("nothing was under way that had to be saved"))


def requested() -> bool:
    """Whether a signal has come."""
    return bool(_received)


@contextlib.contextmanager
def deferred():
    """Inside, a signal only sets `requested`; outside, it raises `Preempted` on the spot."""
    global _deferred
    _deferred = True
    try:
        if _received:  # came while something swallowed the exception
            raise Preempted(_message("nothing was under way that had to be saved"))
        yield
    finally:
        _deferred = False


def stop(step: int) -> Preempted:
    """The exception that ends a run whose state at `step` is saved."""
    return Preempted(_message(f"step {step} is saved"))


def _message(what):
    name = signal.Signals(_received[0]).name if _received else "signal"
    return f"stopped by {name}: {what}; run the same command again to continue."
