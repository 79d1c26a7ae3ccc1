"""What deploying a prediction costs: its parameters, and the floating-point operations for one image."""

import math

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval


def prediction_costs(method, params, model_state, image_shape) -> dict[str, dict[str, int]]:
    """{prediction: {"parameters", "flops"}} of the part of a method that the prediction needs.

    Args:
      method: a `Method`.
      params, model_state: its variables, or their shapes.
      image_shape: (H, W, 3).

    `parameters` counts trained numbers, and averages of them, which are trees called "params" in the model
    state; not batch statistics. `flops` is XLA's count, with a multiply-add as two.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    if getattr(method.subnetworks, "vectorize", False):
        # One after another, what a prediction does not need falls away.
        method = method.clone(subnetworks=method.subnetworks.clone(vectorize=False))

    def predictions(params, model_state, images):
        return method.predictions(method.apply({"params": params, **model_state}, images, train=False))

    costs = {}
    for prediction in jax.eval_shape(predictions, params, model_state, images):
        if prediction in method.network_names():
            # Alone, since slicing stacked parameters looks like a use of all K copies.
            costs[prediction] = _network_cost(method, params, model_state, images, prediction)
        else:
            costs[prediction] = _cost(
                lambda *arguments, name=prediction: predictions(*arguments)[name], params, model_state, images
            )
    return costs


def _network_cost(method, params, model_state, images, prediction):
    taken = {}

    def take(variables):
        taken["network"], part = method.extract(variables, prediction)
        return part

    variables = jax.eval_shape(take, {"params": params, **model_state})

    def logits(params, model_state, images):
        return taken["network"].apply({"params": params, **model_state}, images, train=False).logits

    return _cost(logits, variables.pop("params"), variables, images)


def _cost(function, params, model_state, images):
    jaxpr = jax.make_jaxpr(function)(params, model_state, images).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    leaves = jax.tree_util.tree_leaves_with_path(({"params": params}, model_state, images))
    parameters = sum(
        _used_numbers(jaxpr, variable)
        for (path, _), variable in zip(leaves, jaxpr.invars, strict=True)
        if jax.tree_util.DictKey("params") in path
    )
    analysis = jax.jit(function).lower(params, model_state, images).cost_analysis() or {}
    return {"parameters": parameters, "flops": int(analysis.get("flops", 0)) or None}


def _used_numbers(jaxpr, variable):
    """How many numbers of an input are used: of stacked copies, those of the copies that are taken out."""
    uses = [equation for equation in jaxpr.eqns if variable in equation.invars]
    if not all(equation.primitive.name == "slice" for equation in uses):
        return math.prod(variable.aval.shape)
    copies = {equation.params["start_indices"]: equation.outvars[0].aval.shape for equation in uses}
    return sum(math.prod(shape) for shape in copies.values())
