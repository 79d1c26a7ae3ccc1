"""For what programs are made, a CPU or an accelerator: the only place that asks.

They differ in how convolutions and batch norms are computed, and in whether copies of a network, and seeds,
run one after another or by `vmap`. Inside `as_accelerator` all of it is as on an accelerator, wherever it is,
so that tests see what users of GPUs and TPUs get. Inside `plain` nothing stands in for XLA's own operations:
operations are counted so, and networks exported.
"""

import contextlib
import contextvars

import jax

_SELDOM = {"xla_backend_optimization_level": 1}  # at 0 multiplications and additions round apart
if jax.__version_info__ < (0, 11):
    _SELDOM["xla_cpu_use_fusion_emitters"] = False  # jax 0.10's old way to fuse loops, quicker to compile
_made_for = contextvars.ContextVar("made_for", default=None)


def is_cpu() -> bool:
    """Whether what is traced now is made for a CPU."""
    return jax.default_backend() == "cpu" and not _made_for.get()


def is_accelerator() -> bool:
    """Whether what is traced now is made for an accelerator, and need not serve any machine."""
    return not (is_cpu() or is_plain())


def is_plain() -> bool:
    """Whether nothing shall stand in for XLA's own operations."""
    return _made_for.get() == "anything"


def seldom_options() -> dict | None:
    """XLA's options for a program that runs a few times, and takes longest to compile; None for the usual.

    On a CPU the program that draws the parameters of two small networks is compiled in 3 s of work in place
    of 25, and draws the same to the bit.
    """
    return _SELDOM if is_cpu() else None


def as_accelerator(yes: bool = True):
    """What is traced and chosen inside is as on an accelerator; with False, as on this machine again."""
    return _inside("accelerator" if yes else None)


def plain():
    """What is traced inside is the plain program, for any machine."""
    return _inside("anything")


@contextlib.contextmanager
def _inside(made_for):
    token = _made_for.set(made_for)
    try:
        yield
    finally:
        _made_for.reset(token)
