"""K networks that learn nothing from one another: the lower bound, and its ensemble an upper reference."""

import jax.numpy as jnp

from ffl_jax.losses import cross_entropy
from ffl_jax.methods.base import METHODS, Method


@METHODS.register("independent")
class Independent(Method):
    """Plain training: loss = sum_k CE(z_k). One sub-network is enough, and more of them cost as many runs."""

    num = (1, None)
    refuses_trunk = "networks that share one are not trained alone"

    def __call__(self, images, train):
        return {"logits": jnp.stack([peer.logits for peer in self.subnetworks(images, train)])}

    def objectives(self, outputs, labels, epoch):
        ce = cross_entropy(outputs["logits"], labels).mean(-1)
        terms = {f"cross_entropy/{name}": x for name, x in zip(self.subnetwork_names(), ce, strict=True)}
        return {"loss": ce.sum()}, terms
