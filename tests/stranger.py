"""A method from outside the package, with terms and predictions of its own names."""

import flax.linen as nn
import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.losses import cross_entropy, kl_divergence
from ffl_jax.methods.base import (
    ENSEMBLE,
    FUSED,
    KNOWLEDGE,
    LABELS,
    METHODS,
    NETWORK,
    Method,
    Role,
    Term,
    terms,
)

NAMES = ("alpha", "omega")


class Stranger(Method):
    """Two networks and a linear blend of their features; what they agree on is called harmony here."""

    headline = "omega"

    def setup(self):
        self.blend = nn.Dense(self.num_classes)

    def __call__(self, images, train):
        peers = self.subnetworks(images, train)
        blend = self.blend(jnp.concatenate([stop_gradient(peer.features) for peer in peers], axis=-1))
        return {"logits": jnp.stack([peer.logits for peer in peers]), "blend": blend}

    def objectives(self, outputs, labels, epoch):
        logits, blend = outputs["logits"], outputs["blend"]
        ce, blend_ce = cross_entropy(logits, labels).mean(-1), cross_entropy(blend, labels).mean()
        kd = kl_divergence(logits, stop_gradient(blend), 1.0).mean(-1)
        logged = terms("truth", (*NAMES, "blend"), (*ce, blend_ce), LABELS)
        logged |= terms("harmony", NAMES, kd, KNOWLEDGE) | {"patience": Term(epoch)}
        return {"loss": ce.sum() + blend_ce + kd.sum()}, logged

    def predictions(self, outputs):
        alpha, omega = outputs["logits"]
        return {"alpha": alpha, "omega": omega, "choir": (alpha + omega) / 2, "blend": outputs["blend"]}

    def roles(self):
        networks = {name: Role(NETWORK, k) for k, name in enumerate(NAMES)}
        return networks | {"choir": Role(ENSEMBLE), "blend": Role(FUSED)}

    def subnetwork_names(self):
        return NAMES


def register():
    """Not on import, which would make every test of all methods take it for one of ours."""
    METHODS.register("stranger")(Stranger)
