"""A method, a network and a dataset of one's own; docs/extending.md says how they are used.

    cd docs/own
    python -m ffl_jax.main --config=configs/digits.py:method=choir,network=plain --config.modules=choir \
        --config.data.name=stripes --workdir=runs/choir
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from ffl_jax.data import base
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
from ffl_jax.models.base import NETWORKS, Network, batch_norm, conv

NAMES = ("alpha", "omega")


@METHODS.register("choir")
class Choir(Method):
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


@NETWORKS.register("plain")
class Plain(Network):
    """Three stages of one convolution each, 16, 32 and 64 channels wide."""

    def stem(self, x, train):
        return nn.relu(batch_norm(train, name="stem_norm")(conv(16, 3, name="stem_conv")(x)))

    def stage(self, index, x, train):
        x = conv(16 * 2**index, 3, stride=1 if index == 0 else 2, name=f"stage{index + 1}_conv")(x)
        return nn.relu(batch_norm(train, name=f"stage{index + 1}_norm")(x))


@base.SOURCES.register("stripes")
def load(config):
    """Noise with horizontal or vertical stripes: 8x8, two classes."""
    rng = np.random.default_rng(0)

    def split(count):
        labels = rng.integers(2, size=count).astype(np.int32)
        stripes = np.tile(np.array([60, 0], np.uint8), 4)[:, None] * np.ones((8, 8), np.uint8)
        images = rng.integers(150, size=(count, 8, 8, 3)).astype(np.uint8)
        images += np.where(labels[:, None, None] == 0, stripes, stripes.T)[..., None].astype(np.uint8)
        return base.Split(images, labels)

    return split(400), split(100), ("horizontal", "vertical")
