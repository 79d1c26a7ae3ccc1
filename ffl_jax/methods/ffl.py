"""Feature Fusion Learning: "Feature Fusion for Online Mutual Knowledge Distillation", Kim et al., 2019."""

import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.errors import ConfigError
from ffl_jax.losses import cross_entropy, kl_divergence, sigmoid_rampup
from ffl_jax.methods.base import METHODS, Method
from ffl_jax.methods.modules import FusionModule

KD_MODES = ("mkd", "ens2fused", "fused2sub", "none")


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

    shares_trunk = True

    @classmethod
    def recipe(cls, data):
        return {"optimizer_rules": (("loss/fusion/.*", {"weight_decay": 1e-5}),)}

    def check(self):
        super().check()
        if self.kd_mode not in KD_MODES:
            raise ConfigError(f"method.kd_mode must be one of {', '.join(KD_MODES)}, got {self.kd_mode!r}.")

    def setup(self):
        self.fusion = FusionModule(self.num_classes, self.fusion_features)

    def __call__(self, images, train):
        peers = self.subnetworks(images, train)
        # Not stopped: the fused classifier's losses train the sub-networks' feature maps too.
        fused_logits, _ = self.fusion([peer.feature_map for peer in peers], train)
        return {"logits": jnp.stack([peer.logits for peer in peers]), "fused_logits": fused_logits}

    def objectives(self, outputs, labels, epoch):
        logits, fused_logits = outputs["logits"], outputs["fused_logits"]
        ensemble_logits = logits.mean(axis=0)

        def distill(learner, teacher):
            return kl_divergence(learner, stop_gradient(teacher), self.temperature, self.smoothing).mean(-1)

        ce, fused_ce = cross_entropy(logits, labels).mean(-1), cross_entropy(fused_logits, labels).mean()
        kd, fused_kd = distill(logits, fused_logits), distill(fused_logits, ensemble_logits)
        if self.kd_mode in ("ens2fused", "none"):
            kd = jnp.zeros_like(kd)
        if self.kd_mode in ("fused2sub", "none"):
            fused_kd = jnp.zeros_like(fused_kd)
        weight = sigmoid_rampup(jnp.floor(epoch), self.rampup_epochs)
        loss = ce.sum() + fused_ce + weight * (kd.sum() + fused_kd)

        names = (*self.subnetwork_names(), "fused")
        terms = {f"cross_entropy/{name}": x for name, x in zip(names, (*ce, fused_ce), strict=True)}
        terms |= {f"distillation/{name}": x for name, x in zip(names, (*kd, fused_kd), strict=True)}
        return {"loss": loss}, terms | {"distillation_weight": weight}

    def predictions(self, outputs):
        return super().predictions(outputs) | {"fused": outputs["fused_logits"]}
