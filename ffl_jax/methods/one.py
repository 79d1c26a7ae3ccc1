"""Knowledge distillation by on-the-fly native ensemble: Lan, Zhu and Gong, NeurIPS 2018."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.losses import cross_entropy, kl_divergence, sigmoid_rampup
from ffl_jax.methods.base import KNOWLEDGE, LABELS, METHODS, Method, terms
from ffl_jax.models.base import batch_norm, dense


@METHODS.register("one")
class ONE(Method):
    """A gate on the trunk weighs the branches' logits into a teacher of every branch (arXiv 1806.04606).

    loss = sum_k CE(z_k) + CE(z_f) + w(epoch) sum_k KL(z_k; z_f),   z_f = sum_k g_k z_k

    The gate g, a softmax over the K branches for every example, learns through CE(z_f) alone, which reaches
    the branches too; as a target z_f is constant. The trunk takes the plain sum of the branches' gradients.

    Values and recipe are those of the released code, with K = 3, but for its smoothing of 1e-7; the ramp w is
    in its scripts, not in the paper's formula. OKDDip's re-implementation lets the gradient of the KL into
    z_f, and so to all branches and the gate (`detached_targets=False`). `sub_0` ("ONE") is shipped; `fused`
    is z_f ("ONE-E") and costs all branches.

    Attributes:
      temperature: of both sides of every KL.
      rampup_epochs: the weight w rises over these many epochs; 0 holds it at 1.
      detached_targets: whether z_f is constant as a target.
      smoothing: added to the target's probabilities.
    """

    temperature: float = 3.0
    rampup_epochs: float = 80.0
    detached_targets: bool = True
    smoothing: float = 0.0

    fuses = True
    shares_trunk = True
    needs_trunk = "its gate looks at the shared feature map"
    refuses_mixed = "its sub-networks are branches of one network"

    @classmethod
    def recipe(cls, data):
        small = {"optimizer.decay_epochs": (151, 225), "data.pad_mode": "zero"}
        if data in ("cifar10", "cifar100"):  # the same for both
            small |= {"data.mean": (0.4914, 0.4822, 0.4465), "data.std": (0.2023, 0.1994, 0.2010)}
        return {"subnetworks.num": 3, "optimizer.nesterov": False} | ({} if data == "imagenet" else small)

    def setup(self):
        self.gate = Gate(self.subnetworks.num)

    def __call__(self, images, train):
        branches = self.subnetworks(images, train)
        logits = jnp.stack([branch.logits for branch in branches])
        weights = self.gate(branches[0].trunk_map, train)
        # Not a matrix product: by default an accelerator takes these with 8 or 11 bits.
        fused_logits = (weights.T[..., None] * logits).sum(axis=0)
        return {"logits": logits, "fused_logits": fused_logits, "gate": weights}

    def objectives(self, outputs, labels, epoch):
        logits, fused_logits = outputs["logits"], outputs["fused_logits"]
        ce, fused_ce = cross_entropy(logits, labels).mean(-1), cross_entropy(fused_logits, labels).mean()
        target = stop_gradient(fused_logits) if self.detached_targets else fused_logits
        kd = kl_divergence(logits, target, self.temperature, self.smoothing).mean(-1)
        weight = sigmoid_rampup(jnp.floor(epoch), self.rampup_epochs)
        loss = ce.sum() + fused_ce + weight * kd.sum()

        names = self.subnetwork_names()
        logs = terms("cross_entropy", (*names, "fused"), (*ce, fused_ce), LABELS)
        logs |= terms("distillation", names, kd, KNOWLEDGE) | terms("gate", names, outputs["gate"].mean(0))
        return {"loss": loss}, logs | {"distillation_weight": weight}


class Gate(nn.Module):
    """Average pool, linear, norm, ReLU, softmax.

    Attributes:
      num: K.
    """

    num: int

    @nn.compact
    def __call__(self, trunk_map: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> the branches' weights [B, K], of sum 1."""
        features = trunk_map.mean(axis=(1, 2))
        scores = dense(self.num, features.shape[-1], name="linear")(features)
        return nn.softmax(nn.relu(batch_norm(train, name="norm")(scores)))
