"""Closes a function over its variables: what is known before any image is seen is computed once."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from ffl_jax.devices import backend

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}  # where a call keeps its content


def fold(function: Callable, variables: Any) -> Callable[[jax.Array], jax.Array]:
    """`images -> function(variables, images)`, to be traced, with no operation on variables left in it.

    What the result does not need is gone, so is whatever depends on variables alone, such as copies taken out
    of a stack, and calls are dissolved: what is traced are plain operations on maps, for every platform.
    """

    def folded(images):
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        with backend.as_accelerator():  # what stands in for them is for this platform alone
            closed = jax.make_jaxpr(function)(variables, shape)
        jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)
        arguments = [*jax.tree.leaves(variables), images]
        (logits,) = _evaluate(core.ClosedJaxpr(jaxpr, closed.consts), arguments)
        return logits

    return folded


def _evaluate(closed, arguments):
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True))

    def value(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [value(atom) for atom in equation.invars]
        name = equation.primitive.name
        if name in _CALLS:
            results = _evaluate(equation.params[_CALLS[name]], inputs)
        else:
            with jax.ensure_compile_time_eval() if _foldable(equation, inputs) else contextlib.nullcontext():
                results = equation.primitive.bind(*inputs, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _foldable(equation, inputs) -> bool:
    if any(isinstance(x, jax.core.Tracer) for x in inputs):
        return False
    shapes = [variable.aval.shape for variable in equation.outvars]
    if not all(isinstance(size, int) for shape in shapes for size in shape):  # as many as there are images
        return False
    # A constant that is spread out would fill the file.
    return sum(map(math.prod, shapes)) <= max(
        1024, sum(math.prod(atom.aval.shape) for atom in equation.invars)
    )
