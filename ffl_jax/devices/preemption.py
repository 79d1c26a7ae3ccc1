"""SIGTERM, SIGINT, SIGHUP: the first asks a run to save and stop, a second one ends it at once.

Light on imports: the handler stands before the heavy ones begin.
"""

import contextlib
import os
import signal

from ffl_jax.errors import Preempted

# SIGHUP says that the terminal is gone; `nohup` has it ignored, and then it is.
_SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    _SIGNALS.append(signal.SIGHUP)
_received: list[int] = []
_deferred = False


def install():
    """Takes these signals over; to be called once, in the main thread."""
    for number in _SIGNALS:
        signal.signal(number, _handle)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def hold_back():
    """Before the process begins anew: signals wait until `install`; Python would tell of them at length."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _handle(number, frame):
    if _received:
        os._exit(128 + number)
    _received.append(number)
    if not _deferred:
        # At once: an exception raised here is lost where it meets a callback, the garbage collector's say.
        with contextlib.suppress(OSError):  # nobody may read it
            os.write(2, f"error: {_message('there was nothing to save')}\n".encode())
        os._exit(Preempted.exit_code)


def requested() -> bool:
    """Whether a signal has come."""
    return bool(_received)


@contextlib.contextmanager
def deferred():
    """Inside, a signal only sets `requested`; outside there is nothing to save, and it ends the process."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


def stop(step: int) -> Preempted:
    """The exception that ends a run whose state at `step` is saved."""
    return Preempted(_message(f"step {step} is saved" if step else "no step was done"))


def _message(what):
    name = signal.Signals(_received[0]).name if _received else "a signal"
    return f"stopped by {name}: {what}; run the same command again to continue."
