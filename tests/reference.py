"""Losses, their gradients by the logits, and a step of SGD: NumPy in float64, from the formulas."""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from conftest import draw_variables
from harness import Training

from configs import common
from ffl_jax import methods
from ffl_jax.methods.base import logged

SHAPE, BATCH, CLASSES = (8, 8, 3), 4, 3
LABELS = np.array([0, 2, 1, 1])
EPOCH = 40.0  # where a ramp of 80 epochs is exp(-5 / 4)
RAMP = np.exp(-1.25)


def draw_logits(num: int) -> np.ndarray:
    """[num, BATCH, CLASSES], spread enough that every term counts."""
    return np.random.default_rng(num).normal(0, 2, (num, BATCH, CLASSES))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(logits, labels):
    """[..., B, C] and [B] -> [..., B]."""
    return -np.log(softmax(logits)[..., np.arange(len(labels)), labels])


def kl_divergence(logits, target, temperature):
    """T**2 KL(target || logits): 2 x [..., C] -> [...]."""
    p, q = softmax(logits / temperature), softmax(target / temperature)
    return temperature**2 * (q * np.log(q / p)).sum(-1)


def cross_entropy_slope(logits):
    """(mean for LABELS, its gradient by the logits)."""
    slope = (softmax(logits) - np.eye(CLASSES)[LABELS]) / BATCH
    return cross_entropy(logits, LABELS).mean(), slope


def kl_divergence_slopes(logits, target, temperature):
    """(mean over the batch, its gradients by the learner's and by the target's logits)."""
    p, q = softmax(logits / temperature), softmax(target / temperature)
    gap = np.log(q / p)
    own, other = p - q, q * (gap - (q * gap).sum(-1, keepdims=True))
    value = kl_divergence(logits, target, temperature).mean()
    return value, temperature * own / BATCH, temperature * other / BATCH


def slopes(loss, tree):
    """The gradient of loss(tree) by central differences; the leaves are arrays of NumPy in float64."""
    tree = jax.tree.map(np.array, tree)  # to be moved

    def leaf(x):
        gradient = np.empty_like(x)
        for index in np.ndindex(x.shape):
            old, ends = x[index], []
            for new in (old + 1e-5, old - 1e-5):
                x[index] = new
                ends.append(loss(tree))
            x[index], gradient[index] = old, (ends[0] - ends[1]) / 2e-5
        return gradient

    return jax.tree.map(leaf, tree)


def first_state(method, config, params, model_state, image_shape=SHAPE, steps_per_epoch=10):
    """(the first `TrainState` with these variables, the step: (state, batch) -> state, not compiled)."""
    made = Training(method, config, image_shape, steps_per_epoch, (params, model_state))
    return made.state, made.step


class Step:
    """One step of a method on tiny networks with random variables, in float64.

    Attributes:
      method, config: as `common.get_config` gives them for `arg`, with `settings` for the method, and those
        for its `subnetworks`.
      outputs: what the method computes at the start, as NumPy arrays.
      gradients: of its objective, by the parameters.
      params, new_params: before and after the step.
    """

    def __init__(self, arg: str, num: int | None = None, subnetworks=None, **settings):
        self.config = common.get_config(arg)
        self.config.method.update(settings)
        self.config.subnetworks.update(subnetworks or {})
        if num is not None:
            self.config.subnetworks.num = num
        self.method = methods.build(self.config, CLASSES)
        rng = np.random.default_rng(0)
        self.batch = {"image": jnp.asarray(rng.normal(size=(BATCH, *SHAPE))), "label": jnp.asarray(LABELS)}
        variables = draw_variables(self.method, self.batch["image"])
        self.params = variables.pop("params")
        self._state = variables
        state, step = first_state(self.method, self.config, self.params, variables, steps_per_epoch=1)

        @jax.jit
        def run(state):
            outputs, pullback = jax.vjp(self._forward, state.params)
            new = step(state, self.batch)
            return outputs, pullback, new.params, new.record["terms"]

        self.outputs, self._pullback, self.new_params, self.terms = run(state.replace(step=jnp.int32(EPOCH)))

    def _forward(self, params):
        outputs, _ = self.method.apply(
            {"params": params, **self._state}, self.batch["image"], train=True, mutable=["batch_stats"]
        )
        return outputs

    def term_gradients(self) -> dict:
        """{term: gradient by the parameters} of every logged term."""

        def terms(params):
            epoch = jnp.asarray(EPOCH)
            return logged(self.method.objectives(self._forward(params), self.batch["label"], epoch)[1])

        return term_gradients(terms, self.params)

    def gradients(self, by_outputs: dict[str, np.ndarray]):
        """The gradient by the parameters that follows from the loss's gradient by some of the outputs."""
        cotangents = {
            name: jnp.asarray(by_outputs.get(name, np.zeros(x.shape)), x.dtype)
            for name, x in self.outputs.items()
        }
        return self._pullback(cotangents)[0]

    def check_sgd(self, gradients, nesterov: bool):
        """The first step of SGD with momentum 0.9 at rate 0.1, its weight decay added to the gradient."""
        decay, factor = self.config.optimizer.weight_decay, 1.9 if nesterov else 1.0
        expected = jax.tree.map(lambda p, g: p - 0.1 * factor * (g + decay * p), self.params, gradients)
        moved = jax.tree.map(lambda old, new: float(jnp.abs(old - new).max()), self.params, self.new_params)
        assert min(jax.tree.leaves(moved)) > 1e-7
        for (path, actual), wanted in zip(
            jax.tree_util.tree_leaves_with_path(self.new_params), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(actual, wanted, rtol=1e-8, atol=1e-10, err_msg=str(path))


def loss_and_gradients(method, outputs: dict[str, np.ndarray], epoch: float = EPOCH):
    """(loss, terms, gradients of the loss by the outputs) of a method's objective, in float64."""

    @jax.jit
    def run(outputs):
        def loss(outputs):
            scalars, terms = method.objectives(outputs, jnp.asarray(LABELS), jnp.asarray(epoch))
            return scalars["loss"], logged(terms)

        return jax.value_and_grad(loss, has_aux=True)(outputs)

    (loss, terms), gradients = run({name: jnp.asarray(x) for name, x in outputs.items()})
    return float(loss), {name: float(x) for name, x in terms.items()}, gradients


def term_gradients(terms: Callable[[dict], dict[str, jax.Array]], params) -> dict:
    """{term: gradient by the parameters} of all terms(params); one program for all of them."""

    @jax.jit
    def gradient(params, seed):
        return jax.vjp(terms, params)[1](seed)[0]

    values = jax.eval_shape(terms, params)
    return {
        term: gradient(params, {name: jnp.full_like(x, name == term) for name, x in values.items()})
        for term in values
    }


def parts_of(tree, num: int) -> dict:
    """{part: its leaves}: `trunk`, `stages_K` and `head_K` of every sub-network, modules by their names."""
    subnetworks = tree["subnetworks"]
    parts = {name: part for name, part in tree.items() if name != "subnetworks"}
    if "trunk" in subnetworks:
        parts["trunk"] = subnetworks["trunk"]
    for k in range(num):
        own = dict(branch(tree, k) if "branches" in subnetworks else subnetworks[f"networks_{k}"])
        parts[f"head_{k}"] = own.pop("head")
        parts[f"stages_{k}"] = own
    return parts


def check_reach(gradient, num: int, reached: Collection[str], term: str):
    """The gradient of a term is 0 all over a part of the parameters, or nowhere in any of its leaves."""
    for part, values in parts_of(gradient, num).items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(values):
            assert np.any(leaf) == (part in reached), f"{term} -> {part}{jax.tree_util.keystr(path)}"


def largest(tree) -> float:
    """The largest absolute value in a tree."""
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def branch(tree, k: int):
    """Sub-network k's part of the branches of stacked sub-networks."""
    return jax.tree.map(lambda leaf: leaf[k], tree["subnetworks"]["branches"])
