"""Deep mutual learning: Zhang, Xiang, Hospedales and Lu, CVPR 2018, arXiv 1706.00384."""

import math
from typing import ClassVar

import jax
from jax.lax import stop_gradient

from ffl_jax.losses import at_least_float32, cross_entropy, kl_divergence, of_others
from ffl_jax.methods.base import ENSEMBLE, KNOWLEDGE, LABELS, METHODS, Method, Role, terms


@METHODS.register("dml")
class DML(Method):
    """Every network learns from the labels and from what each of the others says.

    loss = sum_k [CE(z_k) + 1 / (K - 1) sum_{l != k} KL(z_k; z_l)]

    No gradient flows into a target, so that one gradient of the sum serves all networks. They move together,
    as in nearly all public code; the authors update one after another and run it again before the next.

    The recipe is the paper's, second-hand. "DML" in others' tables is often not this: OKDDip's script has one
    target, the mean of the others' logits, at temperature 3, into which gradients flow
    (`variant="mean_logits"`, `temperature=3`, `detached_targets=False`, `smoothing=1e-7`), and MCL-OKD's
    shares the stem and the first stage (`config.subnetworks.shared_stages=1`), with K = 4 and temperature 2.

    `ensemble` is the mean of the logits, as for every method; `probability_ensemble` that of the
    probabilities, as is usual for this one.

    Attributes:
      variant: "pairwise", or one target for each network out of the others': "mean_probabilities" (the
        paper's DML_e) or "mean_logits".
      temperature: of both sides of every KL.
      normalize: whether pairs are divided by K - 1, as in the paper; the authors' code sums them.
      detached_targets: whether no gradient flows into a target, as in the paper; OKDDip's script stops none.
      smoothing: added to every target probability; OKDDip's script has 1e-7.
    """

    variant: str = "pairwise"
    temperature: float = 1.0
    normalize: bool = True
    detached_targets: bool = True
    smoothing: float = 0.0

    choices: ClassVar = {"variant": ("pairwise", "mean_probabilities", "mean_logits")}

    @classmethod
    def recipe(cls, data):
        if data == "imagenet":
            return {}
        return {"epochs": 200, "batch_size": 64, "optimizer.decay_epochs": (60, 120, 180)}

    def objectives(self, outputs, labels, epoch):
        logits = outputs["logits"]
        ce = cross_entropy(logits, labels).mean(-1)
        others = of_others(stop_gradient(logits) if self.detached_targets else logits)  # [K, K - 1, B, C]
        if self.variant == "pairwise":
            kd = kl_divergence(logits[:, None], others, self.temperature, self.smoothing).mean(-1).sum(axis=1)
            kd = kd / (len(logits) - 1) if self.normalize else kd
        else:
            target = others.mean(axis=1)
            if self.variant == "mean_probabilities":
                target = mean_probability_logits(others, self.temperature)
            kd = kl_divergence(logits, target, self.temperature, self.smoothing).mean(-1)
        names = self.subnetwork_names()
        logs = terms("cross_entropy", names, ce, LABELS) | terms("distillation", names, kd, KNOWLEDGE)
        return {"loss": ce.sum() + kd.sum()}, logs

    def predictions(self, outputs):
        mean = mean_probability_logits(outputs["logits"], temperature=1.0)
        return super().predictions(outputs) | {"probability_ensemble": mean}

    def roles(self):
        return super().roles() | {"probability_ensemble": Role(ENSEMBLE)}


def mean_probability_logits(logits: jax.Array, temperature: float) -> jax.Array:
    """Logits whose softmax at T is the mean of those of L networks: [..., L, B, C] -> [..., B, C]."""
    log_probabilities = jax.nn.log_softmax(at_least_float32(logits) / temperature)
    total = jax.nn.logsumexp(log_probabilities, axis=-3)
    return temperature * (total - math.log(logits.shape[-3]))
