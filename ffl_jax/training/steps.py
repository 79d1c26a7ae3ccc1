"""One training step and one evaluation step: pure, and blind to the method."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from ffl_jax import losses
from ffl_jax.devices import parallel
from ffl_jax.methods import layers, subnetworks
from ffl_jax.methods.base import Term, logged, parameter_mask
from ffl_jax.training import metrics

PRECISIONS = ("float32", "bfloat16")


@flax.struct.dataclass
class TrainState:
    """All that changes during a run, arrays only.

    Attributes:
      step: int32, finished steps.
      params, model_state: variables of the method, trained and not.
      opt_state: {objective: state of its optimiser}.
      rng: key of the run's own randomness, constant; steps fold their number into it.
      record: sums over the steps since the last line of the log, see `step_record`.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    rng: jax.Array
    record: Any

    @property
    def variables(self) -> dict:
        """{"params": …, kind of model state: …}, as `method.apply` takes them."""
        return {"params": self.params, **self.model_state}


# Tracing takes seconds. It is done once for all that ask: no setting that is not in the method changes this.
@functools.partial(jax.jit, static_argnames=("method", "image_shape"))
def init_variables(method, rng, image_shape) -> tuple[Any, Any]:
    """(params, model_state) of a method for images of [H, W, 3], freshly drawn."""
    variables = method.init({"params": rng}, jnp.zeros((1, *image_shape)), train=False)
    params = variables.pop("params")
    return params, variables


def create_state(method, optimizers, rng, image_shape) -> TrainState:
    """The state before the first step; pure, to be jitted."""
    init_rng, run_rng = jax.random.split(rng)
    params, model_state = init_variables(method, init_rng, image_shape)
    opt_state = {name: optimizer.init(params) for name, optimizer in optimizers.items()}
    record = zero_record(method, params, model_state, image_shape)
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state, run_rng, record)


def apply(method, variables, images, precision: str = "float32", **options):
    """`method.apply`, computed in one of `PRECISIONS` from float32 variables.

    In bfloat16 networks and modules see parameters and images of that type. Batch statistics are taken and
    kept in float32, averages of parameters are kept so, and losses
    see float32 outputs. No loss is scaled: bfloat16 has the range of float32.

    Args:
      method: a `Method`.
      variables: {"params": …, kind of model state: …}.
      images: [B, H, W, 3], or one view for each sub-network [K, B, H, W, 3].
      precision: see above.
      **options: of `method.apply`: `train`, `mutable`, `rngs`.

    Returns:
      What `method.apply` does: the outputs, and, if `mutable` is given, the new model state beside them.
    """
    if precision == "float32":
        return method.apply(variables, images, **options)

    def cast(x, dtype=precision):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    is_parameter = parameter_mask(variables, method.averages)
    seen = jax.tree.map(lambda yes, x: cast(x) if yes else x, is_parameter, variables)
    result = method.apply(seen, cast(images), **options)
    if "mutable" not in options:
        return jax.tree.map(functools.partial(cast, dtype="float32"), result)
    outputs, new = result
    new = {
        kind: jax.tree.map(
            lambda yes, new, old: old if yes else new, is_parameter[kind], tree, variables[kind]
        )
        if kind in variables
        else tree
        for kind, tree in new.items()
    }
    return jax.tree.map(functools.partial(cast, dtype="float32"), outputs), new


def terms(method, params, model_state, image_shape) -> dict[str, Term]:
    """{name: its `Term`, with a shape for a value} of all that a step logs, the objectives included."""
    return _logged.eval_shape(method, params, model_state, image_shape)[0]


def zero_record(method, params, model_state, image_shape):
    """Sums of no steps: those of every loss term and every prediction's scores, and how many were finite."""
    _, shapes = _logged.eval_shape(method, params, model_state, image_shape)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@functools.partial(jax.jit, static_argnames=("method", "image_shape"))  # for its cache of shapes
def _logged(method, params, model_state, image_shape):
    variables, labels = {"params": params, **model_state}, jnp.zeros((1,), jnp.int32)
    rngs = {"dropout": jax.random.key(0)}
    images = jnp.zeros((1, *image_shape))
    # In training, where a method may have fewer predictions than in evaluation.
    outputs, _ = method.apply(variables, images, train=True, mutable=list(model_state), rngs=rngs)
    objectives, others = method.objectives(outputs, labels, jnp.float32(0))
    together = (objectives | others).items()
    named = {name: term if isinstance(term, Term) else Term(term) for name, term in together}
    return named, step_record(method, objectives, others, outputs, labels)


def step_record(method, objectives, terms, outputs, labels):
    """What one step adds to the record, joined over the devices; scores go by the likeliest classes."""
    values = parallel.mean(logged(objectives | terms))
    finite = jnp.array([jnp.isfinite(value) for value in values.values()]).all()
    return {
        "steps": jnp.int32(1),
        "finite_steps": finite.astype(jnp.int32),
        "terms": values,
        "predictions": prediction_sums(method, outputs, losses.classes(labels)),
    }


def join_records(records):
    """One step's record from those of its parts, stacked along a leading axis."""
    return {
        "steps": jnp.int32(1),
        "finite_steps": records["finite_steps"].min(axis=0),
        "terms": jax.tree.map(lambda x: x.mean(axis=0), records["terms"]),
        "predictions": jax.tree.map(lambda x: x.sum(axis=0), records["predictions"]),
    }


def prediction_sums(method, outputs, labels, weights=None):
    """{prediction: sums for its scores} over this batch on all devices."""
    return parallel.sum(
        {
            name: metrics.classification_sums(logits, labels, weights)
            for name, logits in method.predictions(outputs).items()
        }
    )


def train_step(state: TrainState, batch: dict[str, jax.Array], **settings) -> TrainState:
    """The state after `observed_step`, alone."""
    return observed_step(state, batch, **settings)[0]


def observed_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    method,
    optimizers,
    steps_per_epoch,
    precision: str = "float32",
    accumulate: int = 1,
    recipe: Callable | None = None,
    freeze_steps: int = 0,
):
    """One forward pass, one gradient for each objective, all taken at the same parameters.

    Args:
      state: before the step.
      batch: `image` [B, H, W, 3], or [K, B, H, W, 3] where the method asks for views, normalised, and `label`
        int [B]; this device's part of it.
      method: a `Method`.
      optimizers: {objective: its `Optimizer`}.
      steps_per_epoch: turns steps into the epochs that a method's ramps count in.
      precision: one of `PRECISIONS`.
      accumulate: how many equal parts, one after another, the batch is taken in; the gradient is their mean.
        Batch statistics, and what a loss takes over the batch, are those of a part.
      recipe: a `recipe.Recipe`, which makes of the batch what the method sees; None leaves it as it is.
      freeze_steps: in the first so many, sub-networks are trained but in their heads: they have no other
        gradient, and run by the batch statistics that they have, which stay. The optimisers know of it, too.

    Returns:
      The state after the step, and its `gauges`.
    """
    if recipe is not None:
        batch = recipe(batch, jax.random.fold_in(state.rng, state.step))
    step = functools.partial(
        _step,
        optimizers=optimizers,
        steps_per_epoch=steps_per_epoch,
        precision=precision,
        accumulate=accumulate,
    )
    free = functools.partial(step, method=method, frozen=False)
    if not freeze_steps:
        return free(state, batch)
    held = functools.partial(step, method=subnetworks.frozen(method), frozen=True)
    return jax.lax.cond(_of_all_runs(state.step) < freeze_steps, held, free, state, batch)


@jax.custom_batching.custom_vmap
def _of_all_runs(step):
    """The step, at which all runs of a program are: told so, `vmap` over them runs one side of a `cond`."""
    return step


@_of_all_runs.def_vmap
def _(axis_size, in_batched, step):
    return step[0], False


def _step(state, batch, *, method, optimizers, steps_per_epoch, precision, accumulate, frozen):
    """`observed_step` on what the method sees; `frozen` stops gradients below the sub-networks' heads."""
    gradients = functools.partial(
        _gradients,
        state,
        method=method,
        steps_per_epoch=steps_per_epoch,
        precision=precision,
        frozen=frozen,
    )
    if accumulate == 1:
        by_objective, model_state, record = gradients(state.model_state, batch)
    else:
        by_objective, model_state, record = _accumulated(
            gradients, state.model_state, batch, accumulate, list(optimizers), state.params
        )
    params, opt_state, seen = state.params, {}, {}
    for objective, gradient in by_objective.items():
        gradient, optimizer = parallel.mean(gradient), optimizers[objective]
        updates, opt_state[objective] = optimizer.update(gradient, state.opt_state[objective], state.params)
        seen[objective] = parallel.norm(gradient, optimizer.trained)
        params = optax.apply_updates(params, updates)
    # Batch norm has already joined its statistics over the devices; this keeps any other state equal, and
    # that of frozen networks as it was, to the bit.
    model_state = method.after_step(params, parallel.first(model_state), state.step)
    after = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        model_state=model_state,
        record=jax.tree.map(jnp.add, state.record, record),
    )
    return after, gauges(optimizers, state.step, seen)


def gauges(optimizers, step, norms) -> dict[str, jax.Array]:
    """What a step shows beside its sums: {name: float32}, of this one step, so that no checkpoint holds it.

    `learning_rate` and `gradient_norm`, the Euclidean norm over the parameters that move, before weight
    decay; with several objectives `gradient_norm/OBJECTIVE` and so on. A rule with a rate of its own has
    `learning_rate/rule_N` beside it.

    Args:
      optimizers: {objective: its `Optimizer`}.
      step: int32, the number of the step from 0 on.
      norms: {objective: its gradient's}.
    """
    seen = {}
    for objective, optimizer in optimizers.items():
        place = f"/{objective}" if len(optimizers) > 1 else ""
        seen |= {f"learning_rate{place}{rule}": rate(step) for rule, rate in optimizer.rates.items()}
        seen[f"gradient_norm{place}"] = norms[objective]
    return {name: jnp.asarray(value, jnp.float32) for name, value in seen.items()}


def _gradients(state, model_state, part, index=None, *, method, steps_per_epoch, precision, frozen):
    """({objective: gradient}, new model state, record) of a batch, or of its part number `index`."""
    # Nothing else of a step is random: whoever goes on from a checkpoint draws the same masks again.
    rng = jax.random.fold_in(state.rng, state.step)
    rng = rng if index is None else jax.random.fold_in(rng, index)

    def forward(params):
        if frozen:
            held = layers.body(params)
            params = jax.tree.map(lambda held, x: jax.lax.stop_gradient(x) if held else x, held, params)
        variables = {"params": params, **model_state}
        outputs, new_state = apply(
            method,
            variables,
            part["image"],
            precision,
            train=True,
            mutable=list(model_state),
            rngs={"dropout": rng},
        )
        scalars, terms = method.objectives(outputs, part["label"], state.step / steps_per_epoch)
        return scalars, (new_state, step_record(method, scalars, terms, outputs, part["label"]))

    scalars, pullback, (new_state, record) = jax.vjp(forward, state.params, has_aux=True)
    # One forward pass serves all objectives: each is pulled back alone.
    seeds = {
        objective: {name: jnp.full_like(value, name == objective) for name, value in scalars.items()}
        for objective in scalars
    }
    return {objective: pullback(seed)[0] for objective, seed in seeds.items()}, new_state, record


def _accumulated(gradients, model_state, batch, parts, objectives, params):
    """What `gradients` gives for a whole batch, in memory for a part of it."""

    def split(x, axis=0):
        x = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    batch = {
        "image": split(batch["image"], batch["image"].ndim - 4),
        "label": jax.tree.map(split, batch["label"]),
    }

    def one(carry, part):
        total, model_state, index = carry
        new, model_state, record = gradients(model_state, part, index)
        return (jax.tree.map(jnp.add, total, new), model_state, index + 1), record

    zero = {objective: jax.tree.map(jnp.zeros_like, params) for objective in objectives}
    (total, model_state, _), records = jax.lax.scan(one, (zero, model_state, 0), batch)
    return jax.tree.map(lambda x: x / parts, total), model_state, join_records(records)


def eval_step(
    variables,
    batch: dict[str, jax.Array],
    *,
    method,
    precision: str = "float32",
    confused: str | None = None,
) -> dict[str, dict[str, jax.Array]]:
    """Sums over a batch with `image`, `label` and `weight` (0 for padding).

    Returns:
      `predictions`: {prediction: sums for its scores}. `classes`: of `metrics.class_sums`, with the errors of
      `confused`, or of what is shipped. `diversity`: sums that compare the sub-networks; {} if there is one
      alone.
    """

    outputs, seen = apply(
        method,
        variables,
        batch["image"],
        precision,
        train=False,
        mutable=["intermediates"],
    )
    labels, weights = batch["label"], batch["weight"]
    classes = metrics.class_sums(method.predictions(outputs), labels, weights, confused or method.headline)
    sums = {
        "predictions": prediction_sums(method, outputs, labels, weights),
        "classes": parallel.sum(classes),
        "diversity": {},
    }
    if method.subnetworks.num > 1:
        (maps,) = seen["intermediates"]["subnetworks"]["feature_maps"]
        sums["diversity"] = parallel.sum(metrics.diversity_sums(outputs["logits"], maps, weights))
    return sums


def validation_step(
    variables, batch: dict[str, jax.Array], *, method, precision: str = "float32"
) -> dict[str, jax.Array]:
    """The method's own sums over a batch like that of `eval_step`."""
    outputs = apply(method, variables, batch["image"], precision, train=False)
    return parallel.sum(method.validation_sums(outputs, batch["label"], batch["weight"]))
