"""What deploying a prediction costs, in parameters and operations, and what training takes, in memory."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from ffl_jax.data import Split
from ffl_jax.devices import backend
from ffl_jax.training import steps


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
    method = _one_after_another(method)  # so that what a prediction does not need falls away

    def predictions(params, model_state, images):
        return method.predictions(method.apply({"params": params, **model_state}, images, train=False))

    costs, networks = {}, {}
    for prediction in jax.eval_shape(predictions, params, model_state, images):
        if prediction in method.network_names():
            # Alone, since slicing stacked parameters looks like a use of all K copies; and each network once.
            network, variables = _network(method, params, model_state, prediction)
            if network not in networks:
                networks[network] = _network_cost(network, variables, images)
            costs[prediction] = networks[network]
        else:
            costs[prediction] = _cost(
                lambda *arguments, name=prediction: predictions(*arguments)[name], params, model_state, images
            )
    return costs


def _one_after_another(method):
    """The method with its copies of one network in a loop."""
    if not getattr(method.subnetworks, "vectorize", False):
        return method
    return method.clone(subnetworks=method.subnetworks.clone(vectorize=False))


def _network(method, params, model_state, prediction):
    """(network, shapes of its variables)"""
    taken = {}

    def take(variables):
        taken["network"], part = method.extract(variables, prediction)
        return part

    variables = jax.eval_shape(take, {"params": params, **model_state})
    return taken["network"], variables


def _network_cost(network, variables, images):
    def logits(params, model_state, images):
        return network.apply({"params": params, **model_state}, images, train=False).logits

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


def training_flops(experiment) -> float | None:
    """Operations of one training step of one seed, by XLA's count of the plain program, on all devices.

    A multiply-add counts as two. Evaluation is left out.
    """
    config, method = experiment.config, _one_after_another(experiment.method)
    step = functools.partial(
        steps.train_step,
        method=method,
        optimizers=experiment.optimizers,
        steps_per_epoch=experiment.steps_per_epoch,
    )
    views = (method.subnetworks.num,) if method.views else ()
    batch = {
        "image": jax.ShapeDtypeStruct((*views, config.batch_size, *experiment.image_shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    with backend.as_accelerator():
        lowered = jax.jit(step).lower(experiment.abstract_state(), batch)
    return (lowered.cost_analysis() or {}).get("flops")


def training_memory(
    experiment, num_devices: int, num_seeds: int = 1, seeds_at_once: int = 1
) -> dict[str, int]:
    """Bytes that training takes of each device, without compiling anything.

    Args:
      experiment: of one seed.
      num_devices: that share the batch. Sub-networks that lie on different devices count on each.
      num_seeds: that are trained side by side, `seeds_at_once` of them at the same moment.

    Returns:
      `state`: parameters, optimisers' and model state, and one gradient. `data`: the splits that are held in
      memory. `maps`: what the forward pass keeps for the backward pass; XLA fuses some of it away and needs
      room of its own for some operations, so that it is right within a factor of two.
    """
    config, method = experiment.config, experiment.method
    state, dataset = experiment.abstract_state(), experiment.dataset
    batch_size = config.batch_size // num_devices // config.accumulate
    views = (method.subnetworks.num,) if method.views else ()
    images = jax.ShapeDtypeStruct((*views, batch_size, *experiment.image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)

    def kept(method):
        def pullback(params, model_state, images, labels):
            def forward(params):
                variables = {"params": params, **model_state}
                outputs, _ = steps.apply(
                    method, variables, images, config.precision, train=True, mutable=list(model_state)
                )
                return method.objectives(outputs, labels, jnp.float32(0))[0]

            return jax.vjp(forward, params)[1]

        residuals = jax.eval_shape(pullback, state.params, state.model_state, images, labels)
        # Kernels are among them, which are in the state already.
        return max(0, _bytes(residuals) - _bytes(state.params))

    maps, networks = kept(method), method.subnetworks
    if networks.remat:  # while one network is computed anew, its maps are there after all
        maps += kept(method.clone(subnetworks=networks.clone(remat=False))) // networks.num
    splits = (dataset.train, dataset.validation, dataset.test)
    return {
        "state": _bytes((state, state.params)) * num_seeds,
        "data": sum(_bytes((one.images, one.labels)) for one in splits if isinstance(one, Split)),
        "maps": maps * seeds_at_once,
    }


def _bytes(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
