"""Closes a function over its variables: what is known before any image is seen is computed once."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from ffl_jax.devices import backend

# Where a call keeps its content.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
_CALLS |= {"custom_vjp_call": "call_jaxpr", "custom_vmap_call": "call"}


def fold(function: Callable, variables: Any) -> Callable[[jax.Array], jax.Array]:
    """`images -> function(variables, images)`, to be traced, with no operation on variables left in it.

    What the result does not need is gone, so is whatever depends on variables alone, such as copies taken out
    of a stack, and calls are dissolved: what is traced are plain operations on maps, for every platform. One
    that uses variables of a module has the module's path for a scope, "trunk/stage1_block1/conv1", and of
    copies in a stack which it is, "branches/stage2_block1/conv1[0]".
    """

    def folded(images):
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        with backend.plain():  # what stands in for them is for this platform alone
            closed = jax.make_jaxpr(function)(variables, shape)
        jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)
        leaves = jax.tree_util.tree_leaves_with_path(variables)
        modules = [jax.tree_util.keystr(path[1:-1], simple=True, separator="/") for path, _ in leaves]
        arguments = [*(leaf for _, leaf in leaves), images]
        ((logits, _),) = _evaluate(
            core.ClosedJaxpr(jaxpr, closed.consts), zip(arguments, [*modules, ""], strict=True)
        )
        return logits

    return folded


def _evaluate(closed, arguments) -> list[tuple[Any, str]]:
    """Args, returns: (value, path of the module whose variables alone it was computed from, or "")."""
    jaxpr = closed.jaxpr
    constants = [(value, "") for value in closed.consts]
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def value(atom):
        return (atom.val, "") if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = [value(atom) for atom in equation.invars]
        name = equation.primitive.name
        if name in _CALLS:
            results = _evaluate(equation.params[_CALLS[name]], given)
        else:
            inputs, modules = zip(*given, strict=True) if given else ((), ())
            module = next(filter(None, modules), "")
            with jax.ensure_compile_time_eval() if _foldable(equation, inputs) else _scope(module):
                results = equation.primitive.bind(*inputs, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
            of_images = any(isinstance(x, jax.core.Tracer) for x in inputs)
            module = "" if of_images else module and f"{module}{_copy(equation)}"
            results = [(result, module) for result in results]
        values.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _scope(module: str):
    return jax.named_scope(module) if module else contextlib.nullcontext()


def _copy(equation) -> str:
    """Which one it takes out of a stack, "[0]"; "" of all other operations."""
    if equation.primitive.name != "slice":
        return ""
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    (stack,) = (atom.aval.shape for atom in equation.invars)
    return f"[{starts[0]}]" if (limits[0], *limits[1:]) == (starts[0] + 1, *stack[1:]) != stack else ""


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
