"""Collaborative learning with intermediate-level representation sharing: Song and Chai, NeurIPS 2018."""

import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.losses import cross_entropy, kl_divergence, of_others, sigmoid_rampup
from ffl_jax.methods.base import KNOWLEDGE, LABELS, METHODS, Method, terms


@METHODS.register("cl_ilr")
class CLILR(Method):
    """Heads on one trunk learn from the mean of the other heads (arXiv 1805.11761).

    loss = sum_k [b CE(z_k) + a KL(z_k; mean_{l != k} z_l)],   times w(epoch) in the second term

    Where paths part, the gradient that comes from n of them is divided by n: what is shared learns as fast
    as in one network, however many heads it carries. No gradient flows into a target.

    That all heads meet at one place is OKDDip's released re-implementation. Weights, temperature and recipe
    are those of MCL-OKD's, with K = 4, which has a tree: `config.subnetworks.shared_stages=1` and
    `limbs=(2,)`. OKDDip's has `cross_entropy_weight=1 distillation_weight=1 temperature=3 rampup_epochs=80
    detached_targets=False smoothing=1e-7`.

    Attributes:
      temperature: of both sides of every KL.
      cross_entropy_weight: b.
      distillation_weight: a.
      rampup_epochs: the weight w rises over these many epochs; 0 holds it at 1.
      detached_targets: whether no gradient flows into a target, as in MCL-OKD; OKDDip's script stops none.
      smoothing: added to every target probability; OKDDip's script has 1e-7.
    """

    temperature: float = 2.0
    cross_entropy_weight: float = 0.5
    distillation_weight: float = 0.5
    rampup_epochs: float = 0.0
    detached_targets: bool = True
    smoothing: float = 0.0

    shares_trunk = True
    needs_trunk = "its heads rescale the gradient of the layers that they share"
    refuses_mixed = "its heads are branches of one network"

    @classmethod
    def recipe(cls, data):
        small = {"optimizer.weight_decay": 5e-4, "optimizer.schedule": "cosine", "data.pad_mode": "zero"}
        return {"subnetworks.num": 4} | ({} if data == "imagenet" else small)

    def __call__(self, images, train):
        heads = self.subnetworks(images, train, mean_gradient=True)
        return {"logits": jnp.stack([head.logits for head in heads])}

    def objectives(self, outputs, labels, epoch):
        logits = outputs["logits"]
        ce = cross_entropy(logits, labels).mean(-1)
        target = of_others(stop_gradient(logits) if self.detached_targets else logits).mean(axis=1)
        kd = kl_divergence(logits, target, self.temperature, self.smoothing).mean(-1)
        weight = self.distillation_weight * sigmoid_rampup(jnp.floor(epoch), self.rampup_epochs)
        names = self.subnetwork_names()
        logs = terms("cross_entropy", names, ce, LABELS) | terms("distillation", names, kd, KNOWLEDGE)
        loss = self.cross_entropy_weight * ce.sum() + weight * kd.sum()
        return {"loss": loss}, logs | {"distillation_weight": weight}
