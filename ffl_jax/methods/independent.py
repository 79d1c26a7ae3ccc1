"""K networks that learn nothing from one another: the lower bound, and its ensemble an upper reference."""

from ffl_jax.losses import cross_entropy
from ffl_jax.methods.base import LABELS, METHODS, Method, terms


@METHODS.register("independent")
class Independent(Method):
    """Plain training: loss = sum_k CE(z_k). One sub-network is enough, and more of them cost as many runs."""

    num = (1, None)
    refuses_trunk = "networks that share one are not trained alone"

    def objectives(self, outputs, labels, epoch):
        ce = cross_entropy(outputs["logits"], labels).mean(-1)
        return {"loss": ce.sum()}, terms("cross_entropy", self.subnetwork_names(), ce, LABELS)
