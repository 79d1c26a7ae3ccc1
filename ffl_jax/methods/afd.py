"""Online adversarial feature-map distillation: Chung, Park, Kim and Kwak, ICML 2020, arXiv 2002.01775."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.errors import ConfigError
from ffl_jax.losses import at_least_float32, cross_entropy, kl_divergence
from ffl_jax.methods.base import KNOWLEDGE, LABELS, METHODS, Method, terms
from ffl_jax.methods.modules import pool_to_smallest
from ffl_jax.models.base import batch_norm, conv
from ffl_jax.models.convolutions import Conv


@METHODS.register("afd")
class AFD(Method):
    """Every network learns the logits of the one before it, and to pass its feature map off as that one's.

    The networks stand in a cycle: p = k - 1, and the first learns from the last. F_k is a last feature map,
    T_k brings it to the width of the widest one, and the discriminator D_k scores it between 0 and 1:

        logit:          sum_k CE(z_k) + KL(z_k; z_p)
        feature:        sum_k mean (1 - D_k(T_k(F_k)))**2
        discriminator:  sum_k mean (1 - D_k(T_p(F_p)))**2 + mean D_k(T_k(F_k))**2

    Each objective has an optimiser of its own. SGD takes the first, over whole networks; Adam with a far
    smaller rate takes the second, over networks without their heads and over T, and the third, over D. The
    second's gradient passes through D to the map and leaves D alone, the third's stops at the maps, and none
    crosses from one network to another.

    Losses and cycle are the paper's, the order of the cycle that of the configuration. No code was released:
    the temperature and the optimisers' settings are those of a reimplementation by others. Our choices: the
    layers of T, the discriminator's kernels ("image"), one forward pass for all three gradients, average
    pooling to the smallest map, and that "feature" leaves the heads alone, to which it gives no gradient but
    would apply weight decay. That decay of 0.1 goes through Adam's scaling and moves every weight by up to
    the rate per step: `optimizer_rules` can turn it off.

    Attributes:
      temperature: of both sides of every KL.
      discriminator: "image", one score for a whole map of any size, or "patch", the reimplementation's 2x2
        kernels, one score for every second 3x3 window, of which the losses take the mean.
      slope: of the discriminators' leaky ReLU below 0 (our choice).
    """

    temperature: float = 3.0
    discriminator: str = "image"
    slope: float = 0.01

    choices: ClassVar = {"discriminator": ("image", "patch")}
    trains: ClassVar[dict[str, str]] = {
        "logit": "subnetworks/.*",
        "feature": "subnetworks/(?!.*head/).*|transfers_.*",
        "discriminator": "discriminators_.*",
    }

    @classmethod
    def recipe(cls, data):
        adam = {"name": "adam", "learning_rate": 2e-5, "weight_decay": 0.1, "decay_epochs": (75, 150)}
        recipe = {"optimizer.nesterov": False}
        if data == "imagenet":  # the same quarter and half of the run
            adam["decay_epochs"] = (22, 45)
            recipe["epochs"] = 90
        return recipe | {"optimizer_rules": (("(feature|discriminator)/.*", adam),)}

    def setup(self):
        num = self.subnetworks.num
        self.transfers = [Transfer() for _ in range(num)]
        self.discriminators = [Discriminator(self.discriminator, self.slope) for _ in range(num)]

    def __call__(self, images, train):
        peers = self.subnetworks(images, train)
        maps = pool_to_smallest([peer.feature_map for peer in peers])
        features = max(x.shape[-1] for x in maps)
        maps = [transfer(x, features, train) for transfer, x in zip(self.transfers, maps, strict=True)]
        scores = {"real_scores": [], "fake_scores": [], "adversarial_scores": []}
        for k, discriminator in enumerate(self.discriminators):
            # Each batch is normalised by itself; running statistics take in the real one first.
            scores["real_scores"].append(discriminator(stop_gradient(maps[k - 1]), train))
            scores["fake_scores"].append(discriminator(stop_gradient(maps[k]), train))
            scores["adversarial_scores"].append(_score_by_constants(discriminator, maps[k], train))
        outputs = {name: jnp.stack(values) for name, values in scores.items()}
        outputs["similarity"] = jnp.stack([_cosine(x, maps[k - 1]) for k, x in enumerate(maps)])
        return outputs | {"logits": jnp.stack([peer.logits for peer in peers])}

    def objectives(self, outputs, labels, epoch):
        logits = outputs["logits"]
        before = stop_gradient(jnp.roll(logits, 1, axis=0))
        real, fake = outputs["real_scores"], outputs["fake_scores"]  # [K, B, P]
        ce = cross_entropy(logits, labels).mean(-1)
        kd = kl_divergence(logits, before, self.temperature).mean(-1)
        adversarial = ((1 - outputs["adversarial_scores"]) ** 2).mean((1, 2))
        discrimination = ((1 - real) ** 2 + fake**2).mean((1, 2))
        objectives = {
            "logit": (ce + kd).sum(),
            "feature": adversarial.sum(),
            "discriminator": discrimination.sum(),
        }
        names = self.subnetwork_names()
        logs = terms("cross_entropy", names, ce, LABELS) | terms("distillation", names, kd, KNOWLEDGE)
        logs |= terms("adversarial", names, adversarial) | terms("discrimination", names, discrimination)
        # To watch: both scores should leave 0.5 and not stay at 1 and 0; the maps should stay unequal.
        logs |= terms("real_score", names, real.mean((1, 2))) | terms("fake_score", names, fake.mean((1, 2)))
        return objectives, logs | terms("similarity", names, outputs["similarity"].mean(-1))


class Discriminator(nn.Module):
    """Scores feature maps between 0 (its own network's) and 1 (those of the network before).

    conv - norm - leaky ReLU - conv - sigmoid; the first convolution halves the channels.

    Attributes:
      kind: "image": the first convolution is 3x3 with stride 2, without bias, and the second as large as the
        map that it meets; "patch": both are 2x2, unpadded, with bias, and the second has stride 2.
      slope: of the leaky ReLU.
    """

    kind: str
    slope: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> scores [B, P]; P is 1 for "image"."""
        height, width, channels = x.shape[1:]
        is_patch = self.kind == "patch"
        if is_patch and min(height, width) < 3:
            raise ConfigError(
                f"method.discriminator='patch' needs feature maps of 3x3 or more, got {height}x{width}: set "
                "config.method.discriminator=image."
            )
        features = max(1, channels // 2)
        kernel, stride, padding = ((2, 2), 1, 0) if is_patch else ((3, 3), 2, 1)
        options = {"use_bias": is_patch, "kernel_init": nn.initializers.he_normal()}
        x = Conv(features, kernel, stride, padding, name="conv1", **options)(x)
        x = nn.leaky_relu(batch_norm(train, name="norm")(x), self.slope)
        kernel, stride = ((2, 2), 2) if is_patch else (x.shape[1:3], 1)
        x = Conv(1, kernel, stride, padding=0, name="conv2")(x)
        return nn.sigmoid(at_least_float32(x.reshape(x.shape[0], -1)))


class Transfer(nn.Module):
    """Brings a map to a number of channels by conv1x1, norm and ReLU; has no parameters if it has them."""

    @nn.compact
    def __call__(self, x: jax.Array, features: int, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, features]."""
        if x.shape[-1] == features:
            return x
        return nn.relu(batch_norm(train, name="norm")(conv(features, 1, name="conv")(x)))


def _score_by_constants(discriminator, x, train):
    """The scores of a map whose gradient reaches the map only; the running statistics stay as they are."""
    variables = stop_gradient(discriminator.variables)
    scores, _ = discriminator.clone(parent=None).apply(variables, x, train, mutable=["batch_stats"])
    return scores


def _cosine(x, y):
    """Cosine similarity of maps, example by example: 2 x [B, H, W, D] -> [B]; 0 where one is 0."""
    x, y = (at_least_float32(z.reshape(z.shape[0], -1)) for z in (x, y))
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (x * y).sum(-1) / jnp.maximum(norms, 1e-12)
