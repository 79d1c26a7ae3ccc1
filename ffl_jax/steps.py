"""One training step and one evaluation step: pure, and blind to the method."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from ffl_jax import metrics, parallel


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


def zero_record(method, params, model_state, image_shape):
    """Sums of no steps: those of every loss term and every prediction's scores, and how many were finite."""

    def one_step(params, model_state):
        outputs = method.apply({"params": params, **model_state}, jnp.zeros((1, *image_shape)), train=False)
        labels = jnp.zeros((1,), jnp.int32)
        scalars, terms = method.objectives(outputs, labels, jnp.float32(0))
        return step_record(method, scalars | terms, outputs, labels)

    shapes = jax.eval_shape(one_step, params, model_state)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def step_record(method, terms, outputs, labels):
    """What one step adds to the record, joined over the devices."""
    terms = parallel.mean(terms)
    finite = jnp.array([jnp.isfinite(value) for value in terms.values()]).all()
    return {
        "steps": jnp.int32(1),
        "finite_steps": finite.astype(jnp.int32),
        "terms": terms,
        "predictions": prediction_sums(method, outputs, labels),
    }


def prediction_sums(method, outputs, labels, weights=None):
    """{prediction: sums for its scores} over this batch on all devices."""
    return parallel.sum(
        {
            name: metrics.classification_sums(logits, labels, weights)
            for name, logits in method.predictions(outputs).items()
        }
    )


def train_step(state: TrainState, batch: dict[str, jax.Array], *, method, optimizers, steps_per_epoch):
    """One forward pass, one gradient for each objective, all taken at the same parameters.

    Args:
      state: before the step.
      batch: `image` [B, H, W, 3], or [K, B, H, W, 3] where the method asks for views, normalised, and `label`
        int [B]; this device's part of it.
      method: a `Method`.
      optimizers: {objective: optax transformation}.
      steps_per_epoch: turns steps into the epochs that a method's ramps count in.

    Returns:
      The state after the step.
    """

    def forward(params):
        rngs = {"dropout": jax.random.fold_in(state.rng, state.step)}
        outputs, model_state = method.apply(
            {"params": params, **state.model_state},
            batch["image"],
            train=True,
            mutable=list(state.model_state),
            rngs=rngs,
        )
        scalars, terms = method.objectives(outputs, batch["label"], state.step / steps_per_epoch)
        return scalars, (model_state, step_record(method, scalars | terms, outputs, batch["label"]))

    scalars, pullback, (model_state, record) = jax.vjp(forward, state.params, has_aux=True)
    params, opt_state = state.params, {}
    for objective in scalars:
        seed = {name: jnp.full_like(value, name == objective) for name, value in scalars.items()}
        (gradients,) = parallel.mean(pullback(seed))
        updates, opt_state[objective] = optimizers[objective].update(
            gradients, state.opt_state[objective], state.params
        )
        params = optax.apply_updates(params, updates)
    # Batch norm has already joined its statistics over the devices; this keeps any other state equal, and
    # that of frozen networks as it was, to the bit.
    model_state = method.after_step(params, parallel.first(model_state), state.step)
    return state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        model_state=model_state,
        record=jax.tree.map(jnp.add, state.record, record),
    )


def eval_step(variables, batch: dict[str, jax.Array], *, method) -> dict[str, dict[str, jax.Array]]:
    """{prediction: sums for its scores} over a batch with `image`, `label` and `weight` (0 for padding)."""
    outputs = method.apply(variables, batch["image"], train=False)
    return prediction_sums(method, outputs, batch["label"], batch["weight"])


def validation_step(variables, batch: dict[str, jax.Array], *, method) -> dict[str, jax.Array]:
    """The method's own sums over a batch like that of `eval_step`."""
    outputs = method.apply(variables, batch["image"], train=False)
    return parallel.sum(method.validation_sums(outputs, batch["label"], batch["weight"]))
