"""What deploying a prediction costs, in parameters and operations, and what training takes, in memory."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from ffl_jax.data import Split
from ffl_jax.devices import backend
from ffl_jax.methods.base import parameter_mask
from ffl_jax.methods.subnetworks import vectorized
from ffl_jax.training import steps


def flops(function, *arguments) -> int | None:
    """Operations of the plain program by XLA's count, a multiply-add as two; arguments may be shapes."""
    # JAX counts before it compiles on a CPU alone, which there is beside an accelerator too.
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # but where the environment says otherwise
        device = None
    with backend.plain(), jax.default_device(device):
        analysis = jax.jit(function).lower(*arguments).cost_analysis() or {}
    return int(analysis.get("flops", 0)) or None


@backend.plain()
def prediction_costs(method, variables, image_shape) -> dict[str, dict[str, int]]:
    """{prediction: {"parameters", "flops"}} of the part of a method that the prediction needs.

    Args:
      method: a `Method`.
      variables: its own, or their shapes.
      image_shape: (H, W, 3).

    `parameters` counts trained numbers, and averages of them; not batch statistics. `flops` are as above.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    method = vectorized(method, False)  # so that what a prediction does not need falls away

    @functools.partial(jax.jit, inline=True)  # which is traced once for all predictions
    def predictions(variables, images):
        return method.predictions(method.apply(variables, images, train=False))

    costs, networks, mask = {}, {}, parameter_mask(variables, method.averages)
    for prediction in jax.eval_shape(predictions, variables, images):
        if prediction in method.network_names():
            # Alone, since slicing stacked parameters looks like a use of all K copies; and each network once.
            network, its_own = _network(method, variables, prediction)
            if network not in networks:
                networks[network] = _network_cost(network, its_own, images)
            costs[prediction] = networks[network]
        else:
            costs[prediction] = _cost(
                lambda *arguments, name=prediction: predictions(*arguments)[name], variables, mask, images
            )
    return costs


def _network(method, variables, prediction):
    """(network, shapes of its variables)"""
    taken = {}

    def take(variables):
        taken["network"], part = method.extract(variables, prediction)
        return part

    shapes = jax.eval_shape(take, variables)
    return taken["network"], shapes


def _network_cost(network, variables, images):
    mask = parameter_mask(variables)
    return _cost(lambda *given: network.apply(*given, train=False).logits, variables, mask, images)


def _cost(function, variables, is_parameter, images):
    jaxpr = jax.make_jaxpr(function)(variables, images).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    counted = [*jax.tree.leaves(is_parameter), False]
    parameters = sum(
        _used_numbers(jaxpr, variable)
        for counts, variable in zip(counted, jaxpr.invars, strict=True)
        if counts
    )
    return {"parameters": parameters, "flops": flops(function, variables, images)}


def _used_numbers(jaxpr, variable):
    """How many numbers of an input are used: of stacked copies, those of the copies that are taken out."""
    uses = [equation for equation in jaxpr.eqns if variable in equation.invars]
    if not all(equation.primitive.name == "slice" for equation in uses):
        return math.prod(variable.aval.shape)
    copies = {equation.params["start_indices"]: equation.outvars[0].aval.shape for equation in uses}
    return sum(math.prod(shape) for shape in copies.values())


def training_flops(experiment) -> int | None:
    """`flops` of one training step of one seed, on all devices; evaluation is left out."""
    step = functools.partial(  # as the plain program: in float32, and the batch as a whole
        steps.train_step,
        method=vectorized(experiment.method, False),
        optimizers=experiment.optimizers,
        steps_per_epoch=experiment.steps_per_epoch,
    )
    return flops(step, experiment.abstract_state(), experiment.abstract_batch())


def evaluation_flops(experiment, batch_size: int) -> int | None:
    """`flops` of all predictions of a batch."""
    method = vectorized(experiment.method, False)
    images = jax.ShapeDtypeStruct((batch_size, *experiment.image_shape), jnp.float32)
    variables = experiment.abstract_state().variables
    return flops(lambda *given: method.predictions(method.apply(*given, train=False)), variables, images)


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
    batch = experiment.abstract_batch(num_devices * config.accumulate)

    def kept(method):
        def pullback(state, batch):
            def forward(params):
                variables, mutable = state.variables | {"params": params}, list(state.model_state)
                settings = {"train": True, "mutable": mutable, "rngs": {"dropout": jax.random.key(0)}}
                outputs, _ = steps.apply(method, variables, batch["image"], config.precision, **settings)
                return method.objectives(outputs, batch["label"], jnp.float32(0))[0]

            return jax.vjp(forward, state.params)[1]

        residuals = jax.eval_shape(pullback, state, batch)
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


def tell_memory(experiment, parallel):
    """Logs what training will take of each device, and a warning where it is more than there is."""
    here = parallel.num_seeds // parallel.seeds
    needed = training_memory(experiment, parallel.shares, here, 1 if backend.is_cpu() else here)
    parts = (f"{part} {size / 1e6:.0f} MB" for part, size in needed.items())
    logging.info("Memory for training on each device, estimated: %s.", ", ".join(parts))
    limit = (parallel.devices[0].memory_stats() or {}).get("bytes_limit")
    if limit and sum(needed.values()) > limit:
        logging.warning(
            "That is more than the device's %.0f MB: set config.accumulate=2 or more, "
            "config.subnetworks.remat=True, config.precision=bfloat16, or a smaller config.batch_size.",
            limit / 1e6,
        )


def _bytes(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
