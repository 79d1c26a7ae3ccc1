"""PCL: "Peer Collaborative Learning for Online Knowledge Distillation", Wu and Gong, AAAI 2021."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.errors import ConfigError
from ffl_jax.losses import cross_entropy, kl_divergence, of_others, sigmoid_rampup
from ffl_jax.methods.base import FUSED, KNOWLEDGE, LABELS, METHODS, NETWORK, Method, Role, terms
from ffl_jax.models.base import dense


@METHODS.register("pcl")
class PCL(Method):
    """An ensemble head and temporal means of the peers teach every peer (arXiv 2006.04147).

    loss = CE(z_f) + sum_k [CE(z_k) + w(epoch) KL(z_k; z_f) + w(epoch) mean_{l != k} KL(z_k; m_l)]

    z_f is a linear layer on the features of all peers, concatenated; m_l are the logits of peer l in a copy
    of everything, ensemble head included, whose parameters are the means of those trained: after step
    t = 0, 1, ... they become d old + (1 - d) new with d = min(1 - 1 / (t + 1), ema_decay). Peer and copy see
    the same augmentation, each peer one of its own. No gradient flows into a teacher, and the ensemble head
    learns from its own cross-entropy alone, which reaches all peers through their features.

    `ema_0` ("PCL" in the paper's tables) is what one would ship; `ema_fused` ("PCL-E") is stronger and costs
    all peers. Recipe and what the paper leaves open follow a public re-implementation
    (shaoeric/Peer-Collaborative-Learning-for-Online-Knowledge-Distillation), but for its ramp-up, which
    divides the epoch by the weight of the loss in place of the ramp's 80 epochs. Also different there:

    - The trunk runs on one view after another, where ours takes their batch statistics over all views
      together (`joint_statistics=False` does as it does). Its running statistics so move three times a step.
    - The linear layers of its three peers start equal (but for VGG's), and its averaged copy starts from a
      draw of its own, which the first step replaces; our peers start apart, and the copy as a copy.
    - Its DenseNet lacks the norm before the last ReLU: 187,828 parameters a peer for 100 classes.

    The copy is the collection "ema" of the model state, which holds variables of the same names as ours.

    Attributes:
      temperature: of both sides of every KL.
      rampup_epochs: the weight w rises over these many epochs; 0 holds it at 1.
      ema_decay: the most that the means keep of their old value in one step.
      average_statistics: whether batch statistics are averaged as the parameters are (our choice); else the
        copy collects its own in training.
      joint_statistics: whether the trunk's batch statistics are those of all views together, else of one
        after another; the running ones then move K times a step.
    """

    temperature: float = 3.0
    rampup_epochs: float = 80.0
    ema_decay: float = 0.999
    average_statistics: bool = False
    joint_statistics: bool = True

    fuses = True
    headline = "ema_0"
    views = True
    averages = ("ema",)
    shares_trunk = True
    needs_trunk = "its peers are branches of one network"
    refuses_mixed = "its peers are branches of one network"

    @classmethod
    def recipe(cls, data):
        small = {"optimizer.weight_decay": 5e-4, "data.pad_mode": "zero"}
        return {"subnetworks.num": 3} | ({} if data == "imagenet" else small)

    def check(self):
        super().check()
        if not 0 <= self.ema_decay <= 1:
            raise ConfigError(f"method.ema_decay must be in [0, 1], got {self.ema_decay}.")

    def setup(self):
        self.ensemble_head = EnsembleHead(self.num_classes)

    def __call__(self, images, train):
        outputs = self.classify(images, train)
        copy, variables = self.unbind()
        if self.is_initializing():
            for kind in ("params", "batch_stats"):
                if kind in variables:
                    self.put_variable("ema", kind, variables[kind])
        rngs = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else {}
        ema, updates = copy.apply(
            dict(self.variables["ema"]), images, train, method="classify", mutable=["batch_stats"], rngs=rngs
        )
        if train and not self.average_statistics and "batch_stats" in updates:
            self.put_variable("ema", "batch_stats", updates["batch_stats"])
        return outputs | {f"ema_{name}": logits for name, logits in ema.items()}

    def classify(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """The `logits` of the peers [K, B, C], and `fused_logits` [B, C]; images as for `__call__`."""
        peers = self.subnetworks(images, train, joint_statistics=self.joint_statistics)
        fused_logits = self.ensemble_head([peer.features for peer in peers])
        return {"logits": jnp.stack([peer.logits for peer in peers]), "fused_logits": fused_logits}

    def objectives(self, outputs, labels, epoch):
        logits, fused_logits = outputs["logits"], outputs["fused_logits"]
        teachers = of_others(stop_gradient(outputs["ema_logits"]))  # [K, K - 1, B, C]

        ce, fused_ce = cross_entropy(logits, labels).mean(-1), cross_entropy(fused_logits, labels).mean()
        ensemble_kd = kl_divergence(logits, stop_gradient(fused_logits), self.temperature).mean(-1)
        teacher_kd = kl_divergence(logits[:, None], teachers, self.temperature).mean((1, 2))
        weight = sigmoid_rampup(jnp.floor(epoch), self.rampup_epochs)
        loss = ce.sum() + fused_ce + weight * (ensemble_kd.sum() + teacher_kd.sum())

        names = self.subnetwork_names()
        logs = terms("cross_entropy", (*names, "fused"), (*ce, fused_ce), LABELS)
        logs |= terms("ensemble_distillation", names, ensemble_kd, KNOWLEDGE)
        logs |= terms("mean_teacher_distillation", names, teacher_kd, KNOWLEDGE)
        return {"loss": loss}, logs | {"distillation_weight": weight}

    def predictions(self, outputs):
        logits = (*outputs["ema_logits"], outputs["ema_fused_logits"])
        return super().predictions(outputs) | dict(zip(self._ema_roles(), logits, strict=True))

    def roles(self):
        return super().roles() | self._ema_roles()

    def _ema_roles(self):
        networks = {f"ema_{k}": Role(NETWORK, k) for k in range(self.subnetworks.num)}
        return networks | {"ema_fused": Role(FUSED)}

    def extract(self, variables, name):
        return super().extract(variables["ema"] if name in self._ema_roles() else variables, name)

    def after_step(self, params, model_state, step):
        decay = jnp.minimum(1 - 1 / (step + 1), self.ema_decay)

        def mean(old, new):
            between = decay * old + (1 - decay) * new
            # The mean of two equal numbers may be rounded; what is kept, or frozen, stays to the bit.
            return jnp.where(old == new, old, between) if self.subnetworks.statistics == "kept" else between

        def average(old, new):
            return jax.tree.map(mean, old, new)

        ema = {**model_state["ema"], "params": average(model_state["ema"]["params"], params)}
        if self.average_statistics and "batch_stats" in ema:
            ema["batch_stats"] = average(ema["batch_stats"], model_state["batch_stats"])
        return {**model_state, "ema": ema}


class EnsembleHead(nn.Module):
    """Linear classifier on concatenated features: K times [B, D] -> logits [B, C]."""

    num_classes: int

    @nn.compact
    def __call__(self, features: list[jax.Array]) -> jax.Array:
        joined = jnp.concatenate(features, axis=-1)
        return dense(self.num_classes, joined.shape[-1], name="head")(joined)
