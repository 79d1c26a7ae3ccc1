"""Whether programs are made for a CPU or for an accelerator: the only place that asks.

They differ in how convolutions are computed, and in whether copies of a network, and seeds, run one after
another or by `vmap`. Inside `as_accelerator` all of it is as on an accelerator, wherever it runs: so do tests
see what users of GPUs and TPUs get, and so are operations counted.
"""

import contextlib
import contextvars

import jax

_as_accelerator = contextvars.ContextVar("as_accelerator", default=False)


def is_cpu() -> bool:
    """Whether what is traced now is made for a CPU."""
    return jax.default_backend() == "cpu" and not _as_accelerator.get()


@contextlib.contextmanager
def as_accelerator(yes: bool = True):
    """What is traced and chosen inside is as on an accelerator; with False, as on this machine again."""
    token = _as_accelerator.set(yes)
    try:
        yield
    finally:
        _as_accelerator.reset(token)
