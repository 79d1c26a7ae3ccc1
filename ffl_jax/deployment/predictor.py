"""A prediction as a pure function of its variables and of raw images, and the numbers that it uses."""

import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from ffl_jax import methods
from ffl_jax.data import augment
from ffl_jax.errors import CheckpointError
from ffl_jax.methods.base import parameter_mask
from ffl_jax.models import NETWORKS
from ffl_jax.registry import import_modules


def build(card: dict) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """What a card describes.

    Returns:
      (function, shapes of its variables): function(variables, images), with images as `card.input_of` says,
      gives float32 logits [B, C]. It is computed in float32 throughout, also where a device has something
      faster; with float16 as precision, networks see parameters and images of that type, as in training in
      bfloat16.

    Raises:
      ConfigError: a network, a method or a hyper-parameter is unknown here.
    """
    import_modules(card["modules"])
    architecture = card["architecture"]
    alone = "network" in architecture
    module = _network(architecture) if alone else _method(architecture)

    def logits(variables, images):
        with jax.default_matmul_precision("float32"):
            images = _normalized(card, images).astype(card["precision"])
            outputs = module.apply(variables, images, train=False)
            outputs = _cast(outputs, jax.tree.map(lambda _: True, outputs), "float32")
            return outputs.logits if alone else module.predictions(outputs)[card["predictor"]]

    images = jnp.zeros((1, *card["image_size"], 3))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))
    mask = parameter_mask(shapes, () if alone else module.averages)
    return logits, jax.eval_shape(lambda tree: _cast(tree, mask, card["precision"]), shapes)


def _normalized(card, images):
    mean, std = tuple(card["mean"]), tuple(card["std"])
    if card["input"] == "nhwc-uint8":
        return augment.normalize(images, mean, std)
    return (images.transpose(0, 2, 3, 1) - jnp.array(mean)) / jnp.array(std)


def _cast(tree, mask, dtype):
    """The leaves that hold fractions and that a mask chooses in another type."""

    def cast(x, chosen):
        return x.astype(dtype) if chosen and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree, mask)


def in_types_of(shapes: Any, variables: Any) -> Any:
    """A checkpoint's variables in the types that `build` wants."""
    return jax.tree.map(lambda shape, x: x.astype(shape.dtype), shapes, variables)


def _network(architecture) -> nn.Module:
    return NETWORKS.lookup(architecture["network"])(architecture["num_classes"])


def _method(architecture) -> nn.Module:
    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    sections = {
        name: {key: tuples(value) for key, value in section.items()}
        for name, section in architecture.items()
        if isinstance(section, dict)
    }
    # One after another, what a prediction does not need of the copies of a network falls away.
    sections["subnetworks"] |= {"execution": "loop", "remat": False}
    if "teachers" in sections:
        sections["teachers"] = types.SimpleNamespace(**sections["teachers"])
    config = types.SimpleNamespace(**sections, ema_decay=architecture.get("ema_decay", 0.0))
    return methods.build(config, architecture["num_classes"])


def weights(function: Callable, variables: Any, image_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The variables that a function of `build` uses: {"params/head/kernel": array, …}.

    Of stacked copies of which some are not used, the others have entries of their own, "…/kernel[0]".
    """
    leaves, (places, _) = jax.tree.leaves(variables), _used(function, variables, image_shape)
    return {
        name: np.asarray(leaves[leaf] if copy is None else leaves[leaf][copy])
        for name, (leaf, copy) in places.items()
    }


def _used(function, variables, image_shape):
    """({name of an entry: (which of the leaves, which copy of it or None)}, shape and type of the logits)."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    jaxpr = jax.make_jaxpr(function)(variables, images).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True], instantiate=True)
    places = {}
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    for leaf, ((path, _), variable) in enumerate(zip(leaves, jaxpr.invars, strict=False)):  # images come last
        name, copies = jax.tree_util.keystr(path, simple=True, separator="/"), _copies(jaxpr, variable)
        if copies is None:
            places[name] = leaf, None
        else:
            places |= {f"{name}[{k}]": (leaf, k) for k in copies}
    return places, jaxpr.outvars[0].aval


def _copies(jaxpr, variable) -> list[int] | None:
    """Which entries along the first axis of an input are used; None where that is the whole of it."""
    shape, found = variable.aval.shape, set()
    for equation in jaxpr.eqns:
        if variable not in equation.invars:
            continue
        if equation.primitive.name != "slice":
            return None
        starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
        if limits[0] != starts[0] + 1 or tuple(limits[1:]) != shape[1:]:
            return None
        found.add(starts[0])
    return None if found and len(found) == shape[0] else sorted(found)


def variables(
    function: Callable, weights: dict[str, np.ndarray], shapes: Any, image_shape: tuple[int, int, int]
) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The inverse of `weights`: (variables with zeros where a function of `build` does not look, its logits).

    Raises:
      CheckpointError: an entry is missing, has another shape or type, or no place.
    """
    places, logits = _used(function, shapes, image_shape)
    for problem, names in (("lacks", places.keys() - weights), ("has no place for", weights.keys() - places)):
        if names:
            raise CheckpointError(f"it {problem} {', '.join(sorted(names)[:5])}: export it again.")
    leaves, tree = jax.tree.flatten(shapes)
    arrays = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
    for name, (leaf, copy) in places.items():
        wanted, found = arrays[leaf][... if copy is None else (copy, ...)], weights[name]
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise CheckpointError(
                f"{name} is {found.dtype} {list(found.shape)}, and its network wants {wanted.dtype} "
                f"{list(wanted.shape)}: export it again."
            )
        wanted[...] = found
    return jax.tree.unflatten(tree, arrays), logits
