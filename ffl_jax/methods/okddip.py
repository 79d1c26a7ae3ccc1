"""Online knowledge distillation with diverse peers: Chen, Mei, Wang, Feng and Chen, AAAI 2020."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.losses import cross_entropy, kl_divergence, sigmoid_rampup
from ffl_jax.methods.base import KNOWLEDGE, LABELS, METHODS, Method, terms
from ffl_jax.models.base import uniform


@METHODS.register("okddip")
class OKDDip(Method):
    """Auxiliary peers teach one another by attention, and their mean teaches a leader (arXiv 1912.00350).

    loss = sum_a CE(z_a) + CE(z_l) + d w(epoch) [sum_a KL(z_a; t_a) + KL(z_l; t_l)]

    The last of the K sub-networks is the leader l, the one to ship; the others are the peers a. Peer a learns
    from t_a = sum_b alpha_ab z_b over all peers, itself included, where alpha_ab is the softmax over b of the
    product of two projections, (W_A h_a)(W_E h_b), of their pooled features, different for every example. The
    leader learns from t_l = mean_a z_a.

    The released code stops no gradient into a target: the projections learn through it alone. Its values and
    recipe are ours, with K = 4, but for its smoothing of 1e-7. `ensemble` is the mean of the peers
    ("OKDDip-E").

    Attributes:
      temperature: of both sides of every KL.
      rampup_epochs: the weight w rises over these many epochs; 0 holds it at 1.
      distillation_weight: d.
      target_grad: "full" lets the gradient flow into targets as the released code does; "attention" lets it
        reach alpha, and the features behind, but not the logits that alpha or the mean mixes; "none" stops
        it, and the projections learn nothing. The last two are ours.
      smoothing: added to every target probability.
    """

    temperature: float = 3.0
    rampup_epochs: float = 80.0
    distillation_weight: float = 1.0
    target_grad: str = "full"
    smoothing: float = 0.0

    choices: ClassVar = {"target_grad": ("full", "attention", "none")}
    headline = "leader"
    num = (3, None)
    shares_trunk = True
    refuses_mixed = "its projections are shared by all peers"

    @classmethod
    def recipe(cls, data):
        small = {"optimizer.weight_decay": 5e-4, "data.pad_mode": "zero"}
        return {"subnetworks.num": 4} | ({} if data == "imagenet" else small)

    def subnetwork_names(self):
        return (*super().subnetwork_names()[:-1], "leader")

    def setup(self):
        self.attention = PeerAttention()

    def __call__(self, images, train):
        *peers, leader = self.subnetworks(images, train)
        return {
            "logits": jnp.stack([*(peer.logits for peer in peers), leader.logits]),
            # Not taken from `logits`: it costs nothing of the leader.
            "ensemble_logits": sum(peer.logits for peer in peers) / len(peers),
            "attention": self.attention(jnp.stack([peer.features for peer in peers])),
        }

    def objectives(self, outputs, labels, epoch):
        logits, attention = outputs["logits"], outputs["attention"]
        peer_logits, leader_target = logits[:-1], outputs["ensemble_logits"]
        if self.target_grad != "full":
            peer_logits, leader_target = stop_gradient((peer_logits, leader_target))
        if self.target_grad == "none":
            attention = stop_gradient(attention)
        # x counts examples, y the peers that are mixed. By default an accelerator takes 8 or 11 bits of each.
        peer_targets = jnp.einsum("xay,yxc->axc", attention, peer_logits, precision="highest")
        targets = jnp.concatenate([peer_targets, leader_target[None]])

        ce = cross_entropy(logits, labels).mean(-1)
        kd = kl_divergence(logits, targets, self.temperature, self.smoothing).mean(-1)
        weight = self.distillation_weight * sigmoid_rampup(jnp.floor(epoch), self.rampup_epochs)
        names = self.subnetwork_names()
        logs = terms("cross_entropy", names, ce, LABELS) | terms("distillation", names, kd, KNOWLEDGE)
        # What a peer gives to itself: 1 / (K - 1) for even attention.
        logs |= terms("self_attention", names[:-1], jnp.diagonal(outputs["attention"].mean(axis=0)))
        return {"loss": ce.sum() + weight * kd.sum()}, logs | {"distillation_weight": weight}


class PeerAttention(nn.Module):
    """How much of every peer goes into each peer's target: two linear projections and a softmax."""

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Peers' pooled features [K, B, D] -> [B, K, K], of sum 1 over the last axis."""
        width = features.shape[-1]

        def project(name):
            layer = nn.Dense(max(1, width // 8), use_bias=False, kernel_init=uniform(width), name=name)
            return layer(features)

        scores = jnp.einsum("abd,cbd->bac", project("query"), project("key"))
        return nn.softmax(scores)
