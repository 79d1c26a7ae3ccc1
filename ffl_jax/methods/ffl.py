"""Feature Fusion Learning: "Feature Fusion for Online Mutual Knowledge Distillation", Kim et al., 2019."""

from typing import ClassVar

import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.losses import cross_entropy, kl_divergence, sigmoid_rampup
from ffl_jax.methods.base import KNOWLEDGE, LABELS, METHODS, Method, terms
from ffl_jax.methods.modules import FusionModule


@METHODS.register("ffl")
class FFL(Method):
    """The ensemble teaches the fused classifier, which teaches every sub-network (arXiv 1904.09058).

    loss = sum_k CE(z_k) + CE(z_f) + w(epoch) * [sum_k KL(z_k; z_f) + KL(z_f; mean_k z_k)]

    with values from the released code, and sums over the K sub-networks where that has K = 2. `sub_0` is
    what one would ship; `fused` is stronger and costs all sub-networks.

    Attributes:
      temperature: of both sides of every KL.
      rampup_epochs: the weight w rises over these many epochs; 0 holds it at 1.
      kd_mode: "mkd" (both directions), "ens2fused", "fused2sub" or "none" (our names for the ablations).
      smoothing: added to the teachers' probabilities; 0 turns it off.
      fusion_features: channels of the fused feature map; 0 takes the widest sub-network's.
    """

    temperature: float = 3.0
    rampup_epochs: float = 80.0
    kd_mode: str = "mkd"
    smoothing: float = 1e-7
    fusion_features: int = 0

    fuses = True
    choices: ClassVar = {"kd_mode": ("mkd", "ens2fused", "fused2sub", "none")}
    shares_trunk = True

    @classmethod
    def recipe(cls, data):
        return {"optimizer_rules": (("loss/fusion/.*", {"weight_decay": 1e-5}),)}

    def setup(self):
        self.fusion = FusionModule(self.num_classes, self.fusion_features)

    def __call__(self, images, train):
        peers = self.subnetworks(images, train)
        # Not stopped: the fused classifier's losses train the sub-networks' feature maps too.
        fused_logits, _ = self.fusion([peer.feature_map for peer in peers], train)
        return {"logits": jnp.stack([peer.logits for peer in peers]), "fused_logits": fused_logits}

    def objectives(self, outputs, labels, epoch):
        to_fused, to_networks = (self.kd_mode in ("mkd", mode) for mode in ("ens2fused", "fused2sub"))
        ce, kd, logs = mutual_losses(self, outputs, labels, self.smoothing, to_fused, to_networks)
        weight = sigmoid_rampup(jnp.floor(epoch), self.rampup_epochs)
        return {"loss": ce + weight * kd}, logs | {"distillation_weight": weight}


def mutual_losses(method, outputs, labels, smoothing=0.0, to_fused=True, to_networks=True):
    """FFL's (sum of all CE, sum of all KL, their terms) for a method that `fuses`, at its temperature.

    Args:
      outputs, labels: as for `Method.objectives`.
      smoothing: as in `FFL`.
      to_fused, to_networks: False makes the KL of the fused classifier, or of the sub-networks, zero.
    """
    logits, fused_logits = outputs["logits"], outputs["fused_logits"]

    def distill(learner, teacher):
        return kl_divergence(learner, stop_gradient(teacher), method.temperature, smoothing).mean(-1)

    ce, fused_ce = cross_entropy(logits, labels).mean(-1), cross_entropy(fused_logits, labels).mean()
    kd, fused_kd = distill(logits, fused_logits), distill(fused_logits, logits.mean(axis=0))
    kd = kd if to_networks else jnp.zeros_like(kd)
    fused_kd = fused_kd if to_fused else jnp.zeros_like(fused_kd)
    names = (*method.subnetwork_names(), "fused")
    logs = terms("cross_entropy", names, (*ce, fused_ce), LABELS)
    logs |= terms("distillation", names, (*kd, fused_kd), KNOWLEDGE)
    return ce.sum() + fused_ce, kd.sum() + fused_kd, logs
