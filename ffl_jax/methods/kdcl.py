"""KDCL: "Online Knowledge Distillation via Collaborative Learning", Guo et al., CVPR 2020."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.errors import ConfigError
from ffl_jax.losses import (
    at_least_float32,
    classes,
    cross_entropy,
    kl_divergence,
    probabilities,
    unweighted,
)
from ffl_jax.methods.base import KNOWLEDGE, LABELS, METHODS, Method, terms


@METHODS.register("kdcl")
class KDCL(Method):
    """One target out of all networks' logits teaches each of them, and each sees its own augmentation.

    loss = sum_k [c CE(z_k) + w KL(z_k; z_t)]

    No gradient flows into the target z_t, which is made for every example by one of

    - naive: the logits of the network with the smallest cross-entropy.
    - linear: sum_k a_k z_k with the a on the simplex that minimises its cross-entropy.
    - minlogit: every network's logits are shifted so that the true class has 0, then the least over the
      networks is taken class by class. The target is as sure of the true class as any network, or more.
    - general: sum_k w_k z_k with one w for all examples, w = C^-1 1 / (1^T C^-1 1), made before every epoch
      from the errors on the validation split: C_ij is the mean of <p_i - t, p_j - t> over its examples, with
      probabilities p and one-hot labels t. Needs `config.data.validation_examples`.
    - mean: the mean of the logits. This is not KDCL, though a widely copied re-implementation goes by that
      name: temperature=4, cross_entropy_weight=0.5 and distillation_weight=0.5 give its loss.

    Where labels are soft, naive and linear take the cross-entropy of the soft label, minlogit its likeliest
    class; class weights weigh losses and no target, and the validation split keeps its classes.

    The paper introduces the first four. Linear overfits small datasets, and general was reported best on
    CIFAR-100. The default here is minlogit: exact, the cheapest, and without a part of the data held out.

    The authors released no code, and their recipe was not found: ours is the one of that re-implementation
    (shaoeric/Online-Knowledge-Distillation-via-Collaborative-Learning), for CIFAR. It gives MobileNetV2 and
    ShuffleNets the rate 0.01; for the second of two different networks that is
    `config.optimizer_rules=(("loss/subnetworks/networks_1/.*", {"learning_rate": 0.01}),)`.

    Attributes:
      variant: "naive", "linear", "minlogit", "general" or "mean", see above.
      temperature: of both sides of every KL; second-hand, not checked against the paper.
      cross_entropy_weight: c.
      distillation_weight: w; 1 is second-hand too.
      linear_steps: of exponentiated gradient for "linear" (our choice: the paper leaves the solver open).
      ridge: added to the diagonal of C (our choice, as are the next two, where the paper is silent); squared
        errors are at most 2.
      clip_weights: whether negative w become 0, the others scaled to the sum 1.
      mix: whether w is applied to "logits", or to "probabilities" at temperature 1, of which z_t is then the
        logarithm; negative ones become 1e-8.
    """

    variant: str = "minlogit"
    temperature: float = 2.0
    cross_entropy_weight: float = 1.0
    distillation_weight: float = 1.0
    linear_steps: int = 50
    ridge: float = 1e-3
    clip_weights: bool = False
    mix: str = "logits"

    choices: ClassVar = {
        "variant": ("naive", "linear", "minlogit", "general", "mean"),
        "mix": ("logits", "probabilities"),
    }
    views = True
    refuses_trunk = "each of its peers is a whole network, with a view of its own"

    @classmethod
    def recipe(cls, data):
        if data == "imagenet":
            return {}
        return {
            "epochs": 240,
            "batch_size": 64,
            "optimizer.learning_rate": 0.05,
            "optimizer.weight_decay": 5e-4,
            "optimizer.nesterov": False,
            "optimizer.decay_epochs": (150, 180, 210),
            "data.pad_mode": "zero",
        }

    def check(self):
        super().check()
        for name, value, bound in (("linear_steps", self.linear_steps, 1), ("ridge", self.ridge, 1e-6)):
            if value < bound:  # below this ridge float32 does not tell C from a singular matrix
                raise ConfigError(f"method.{name} must be at least {bound:g}, got {value}.")

    @nn.compact
    def __call__(self, images, train):
        outputs = super().__call__(images, train)
        if self.uses_validation:
            num = self.subnetworks.num
            weights = self.variable("validation", "weights", lambda: jnp.full(num, 1 / num))
            outputs["weights"] = weights.value
        return outputs

    def objectives(self, outputs, labels, epoch):
        logits = outputs["logits"]
        # A constant from the start: the solver of "linear" has nothing to differentiate.
        target = self._target(stop_gradient(outputs), labels)
        ce = cross_entropy(logits, labels).mean(-1)
        kd = kl_divergence(logits, target, self.temperature).mean(-1)
        loss = self.cross_entropy_weight * ce.sum() + self.distillation_weight * kd.sum()

        names = self.subnetwork_names()
        target_ce = cross_entropy(target, labels).mean()
        logs = terms("cross_entropy", (*names, "target"), (*ce, target_ce), LABELS)
        logs |= terms("distillation", names, kd, KNOWLEDGE)
        if "weights" in outputs:
            logs |= terms("target_weight", names, outputs["weights"])
        return {"loss": loss}, logs

    def _target(self, outputs, labels):
        logits = at_least_float32(outputs["logits"])
        if self.variant == "naive":
            return naive_target(logits, unweighted(labels))
        if self.variant == "linear":
            return linear_target(logits, unweighted(labels), self.linear_steps)
        if self.variant == "minlogit":
            return minlogit_target(logits, classes(labels))
        if self.variant == "general":
            return general_target(logits, outputs["weights"], self.mix)
        return logits.mean(axis=0)

    @property
    def uses_validation(self):
        return self.variant == "general"

    def validation_sums(self, outputs, labels, weights):
        errors = jax.nn.softmax(at_least_float32(outputs["logits"])) - jax.nn.one_hot(
            labels, self.num_classes
        )
        # By default an accelerator multiplies matrices with 8 or 11 bits; C is about to be inverted.
        products = jnp.einsum("ibc,jbc->ij", errors * weights[:, None], errors, precision="highest")
        return {"products": products, "count": weights.sum()}

    def validation_state(self, sums):
        weights = general_weights(sums["products"] / sums["count"], self.ridge, self.clip_weights)
        return {"validation": {"weights": weights}}


def naive_target(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The logits of the network with the least cross-entropy: [K, B, C], [B] or [B, C] -> [B, C]."""
    best = cross_entropy(logits, labels).argmin(axis=0)
    return jnp.take_along_axis(logits, best[None, :, None], axis=0)[0]


def minlogit_target(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """min_k (z_k - z_k[label]), class by class: [K, B, C], int [B] -> [B, C]."""
    indices = jnp.broadcast_to(labels, logits.shape[:-1])[..., None]
    return (logits - jnp.take_along_axis(logits, indices, axis=-1)).min(axis=0)


def linear_target(logits: jax.Array, labels: jax.Array, steps: int) -> jax.Array:
    """sum_k a_k z_k with the least cross-entropy among all a >= 0 of sum 1: [K, B, C] -> [B, C].

    Labels are classes, int [B], or probabilities, float [B, C].

    Exponentiated gradient from a = 1/K. Every example has a rate of its own: doubled after a step that does
    not raise its loss, else quartered and the step undone. A fixed rate that is safe for all logits needs
    thousands of steps.
    """
    spread = (logits.max(axis=-1) - logits.min(axis=-1)).max(axis=0)
    # spread^2 / 4 bounds the curvature, so that the first step cannot fail.
    rate = 4 / jnp.maximum(spread, 1.0) ** 2

    def mixed(exponents):
        return (jax.nn.softmax(exponents, axis=0)[..., None] * logits).sum(axis=0)

    def step(_, state):
        exponents, target, rate = state
        errors = jax.nn.softmax(target) - probabilities(labels, logits.shape[-1])
        new_exponents = exponents - rate * (errors * logits).sum(axis=-1)
        new_target = mixed(new_exponents)
        better = cross_entropy(new_target, labels) <= cross_entropy(target, labels)
        return (
            jnp.where(better, new_exponents, exponents),
            jnp.where(better[:, None], new_target, target),
            # Bounded, since at a corner of the simplex no step fails.
            jnp.where(better, jnp.minimum(2 * rate, 1e6), rate / 4),
        )

    exponents = jnp.zeros(logits.shape[:-1], logits.dtype)
    return jax.lax.fori_loop(0, steps, step, (exponents, mixed(exponents), rate))[1]


def general_target(logits: jax.Array, weights: jax.Array, mix: str) -> jax.Array:
    """The mixture by weights [K] of logits [K, B, C] -> logits [B, C]; `mix` as in `KDCL`."""
    weights = weights[:, None, None]
    if mix == "logits":
        return (weights * logits).sum(axis=0)
    return jnp.log(jnp.maximum((weights * jax.nn.softmax(logits)).sum(axis=0), 1e-8))


def general_weights(products: jax.Array, ridge: float, clip: bool) -> jax.Array:
    """C^-1 1 / (1^T C^-1 1) for C = products + ridge * identity: [K, K] -> [K], of sum 1."""
    num = len(products)
    weights = jnp.linalg.solve(products + ridge * jnp.eye(num), jnp.ones(num))
    if clip:
        weights = jnp.maximum(weights, 0)
    return weights / weights.sum()
