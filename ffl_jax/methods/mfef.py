"""Multi-scale feature extraction and fusion: Zou, Teng and Niu, ICANN 2022, arXiv 2206.08224."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.errors import ConfigError
from ffl_jax.losses import at_least_float32, sigmoid_rampup
from ffl_jax.methods.base import METHODS, Method, terms
from ffl_jax.methods.ffl import mutual_losses
from ffl_jax.methods.modules import FusionModule, adaptive_average_pool, pool_to_smallest
from ffl_jax.models.base import batch_norm, conv


@METHODS.register("mfef")
class MFEF(Method):
    """The fused map is made of feature maps at several scales, weighted by attention (arXiv 2206.08224).

    Our reconstruction, to be named so beside any number. From the abstract: the last feature map F_k of each
    network is divided into groups of channels that are processed at different scales and joined again,
    attention over channels and space follows, and a classifier (logits z_f) on the fusion of all maps teaches
    the networks. The equations were not at hand and no code was found. What fills the gaps: the split of
    Res2Net (arXiv 1904.01169), the attention of CBAM (arXiv 1807.06521), and from the released code of
    FFL (arXiv 1904.09058) the fusion module, the losses, the ramp and the optimiser's settings:

        loss = sum_k CE(z_k) + CE(z_f) + w(epoch) * [sum_k KL(z_k; z_f) + KL(z_f; mean_k z_k)]

    The gradients of z_f's losses reach the networks' feature maps. Maps of different resolution are
    average-pooled to the smallest one before the fusion (our choice).

    FEFR (Journal of Intelligent & Fuzzy Systems, JIFS-232626) continues the paper; its two additions, in our
    layers again, are `early_fusion` and `reconstruction`.

    Attributes:
      temperature: of both sides of every KL.
      rampup_epochs: the weight w rises over these many epochs; 0 holds it at 1.
      extraction: "res2net", each group after a 3x3 convolution of its sum with the group before;
        "parallel", groups apart, by convolutions of 3x3, 5x5, …; "none" leaves it out.
      groups: of channels; their number must divide the channels of every last feature map.
      attention: over channels, then over space; False leaves it out.
      attention_reduction: channels divided by this is the width of the channel attention, at least 4.
      ensemble_to_fused: whether the mean of the logits teaches the fused classifier.
      feat_loss_weight: of our own loss on feature maps, within the bracket after w: the squared distance of
        each network's normalised spatial energy sum_c F**2 from that of the fused map, a constant (attention
        transfer, arXiv 1612.03928). The abstracts name no such loss; 0 turns it off.
      early_fusion: adds the maps of the earlier stages to F_k first, pooled to its resolution and brought to
        its width. Of a shared trunk only the last map is at hand.
      reconstruction: shuffles the channels between the groups after the extraction.
    """

    temperature: float = 3.0
    rampup_epochs: float = 80.0
    extraction: str = "res2net"
    groups: int = 4
    attention: bool = True
    attention_reduction: int = 16
    ensemble_to_fused: bool = True
    feat_loss_weight: float = 0.0
    early_fusion: bool = False
    reconstruction: bool = False

    fuses = True
    choices: ClassVar = {"extraction": ("res2net", "parallel", "none")}

    @classmethod
    def recipe(cls, data):
        return {"optimizer_rules": (("loss/(?!subnetworks/).*", {"weight_decay": 1e-5}),)}

    def check(self):
        super().check()
        for field in ("groups", "attention_reduction"):
            if getattr(self, field) < 1:
                raise ConfigError(f"method.{field} must be at least 1, got {getattr(self, field)}.")
        if self.reconstruction and self.extraction == "none":
            raise ConfigError(
                "method.reconstruction shuffles the groups of the extraction: set config.method.extraction "
                "to res2net or parallel, got 'none'."
            )

    def setup(self):
        num = self.subnetworks.num
        if self.early_fusion:
            self.early_fusions = [EarlyFusion() for _ in range(num)]
        if self.extraction != "none":
            self.extractions = [
                MultiScaleExtraction(self.extraction, self.groups, self.reconstruction) for _ in range(num)
            ]
        if self.attention:
            self.attentions = [DualAttention(self.attention_reduction) for _ in range(num)]
        self.fusion = FusionModule(self.num_classes)

    def __call__(self, images, train):
        peers = self.subnetworks(images, train)
        # Not stopped: the fused classifier's losses train the sub-networks' feature maps too.
        maps = pool_to_smallest([self._process(k, peer, train) for k, peer in enumerate(peers)])
        fused_logits, fused_map = self.fusion(maps, train)
        outputs = {"logits": jnp.stack([peer.logits for peer in peers]), "fused_logits": fused_logits}
        if self.feat_loss_weight:
            _, height, width, _ = fused_map.shape
            target = _spatial_energy(stop_gradient(fused_map), height, width)
            energies = jnp.stack([_spatial_energy(peer.feature_map, height, width) for peer in peers])
            outputs["feature_distance"] = ((energies - target) ** 2).sum((-1, -2))
        return outputs

    def _process(self, k, peer, train):
        """What sub-network k gives to the fusion, of the shape of its last feature map."""
        x = peer.feature_map
        if self.early_fusion:
            trunk_maps = () if peer.trunk_map is None else (peer.trunk_map,)
            x = self.early_fusions[k](x, (*trunk_maps, *peer.feature_maps[:-1]), train)
        if self.extraction != "none":
            x = self.extractions[k](x, train)
        return self.attentions[k](x) if self.attention else x

    def objectives(self, outputs, labels, epoch):
        ce, kd, logs = mutual_losses(self, outputs, labels, to_fused=self.ensemble_to_fused)
        if self.feat_loss_weight:
            distances = outputs["feature_distance"].mean(-1)
            kd += self.feat_loss_weight * distances.sum()
            logs |= terms("feature", self.subnetwork_names(), distances)
        weight = sigmoid_rampup(jnp.floor(epoch), self.rampup_epochs)
        return {"loss": ce + weight * kd}, logs | {"distillation_weight": weight}


class EarlyFusion(nn.Module):
    """Sum of a map and of those of earlier stages, each pooled, then by conv1x1 and norm of its shape."""

    @nn.compact
    def __call__(self, x: jax.Array, earlier_maps: tuple[jax.Array, ...], train: bool) -> jax.Array:
        """[B, H, W, D] and any number of [B, H_i, W_i, D_i] -> [B, H, W, D]."""
        _, height, width, channels = x.shape
        for index, earlier in enumerate(earlier_maps):
            pooled = adaptive_average_pool(earlier, height, width)
            projected = conv(channels, 1, name=f"conv{index + 1}")(pooled)
            x = x + batch_norm(train, name=f"norm{index + 1}")(projected)
        return x


class MultiScaleExtraction(nn.Module):
    """Divides the channels into groups, convolves each at its own scale, joins, mixes, adds the input.

    Attributes:
      kind: "res2net": the first group stays, each further one is convolved by 3x3, from the third on after
        the result of the group before is added, so that it sees 3, 5, 7, … pixels; "parallel": group i is
        convolved by itself, by 3x3, 5x5, 7x7, ….
      groups: how many, contiguous and of equal width.
      shuffle: interleave the groups' channels before they are mixed.
    """

    kind: str
    groups: int
    shuffle: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, D]; D is a multiple of `groups`."""
        channels = x.shape[-1]
        if channels % self.groups:
            raise ConfigError(
                f"method.groups={self.groups} does not divide the {channels} channels of a feature map: set "
                f"config.method.groups to a divisor of {channels}."
            )

        def convolve(part, kernel):
            part = conv(part.shape[-1], kernel, name=f"group{index + 1}_conv")(part)
            return nn.relu(batch_norm(train, name=f"group{index + 1}_norm")(part))

        parts = []
        for index, part in enumerate(jnp.split(x, self.groups, axis=-1)):
            if self.kind == "parallel":
                part = convolve(part, 2 * index + 3)
            elif index == 1:
                part = convolve(part, 3)
            elif index > 1:
                part = convolve(part + parts[-1], 3)
            parts.append(part)
        y = jnp.stack(parts, axis=-1 if self.shuffle else -2).reshape(x.shape)
        y = batch_norm(train, name="mix_norm")(conv(channels, 1, name="mix_conv")(y))
        return nn.relu(x + y)


class DualAttention(nn.Module):
    """Weights channels, then places, by two sigmoids: CBAM, Woo et al., 2018, arXiv 1807.06521, sec. 3.

    Attributes:
      reduction: the hidden layer of the channel attention has D / reduction units, at least 4.
    """

    reduction: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, D]."""
        batch, *_, channels = x.shape
        hidden = nn.Dense(max(channels // self.reduction, 4), use_bias=False, name="channel_hidden")
        score = nn.Dense(channels, use_bias=False, name="channel_score")
        largest = _largest(x.reshape(batch, -1, channels), axis=1)[:, 0]
        scores = [score(nn.relu(hidden(pooled))) for pooled in (x.mean((1, 2)), largest)]
        x = x * nn.sigmoid(scores[0] + scores[1])[:, None, None]
        pooled = jnp.concatenate([x.mean(-1, keepdims=True), _largest(x, axis=-1)], axis=-1)
        return x * nn.sigmoid(conv(1, 7, name="spatial_conv")(pooled))


def _largest(x, axis):
    """The maximum over an axis, which stays with size 1; its gradient goes to the first of equal values.

    That of `jnp.max` is shared by all that equal the maximum, and NaN if none does: compilers may compute `x`
    anew for the comparison, with another rounding (seen with XLA's CPU backend at optimisation level 0).
    """
    return jnp.take_along_axis(x, x.argmax(axis, keepdims=True), axis)


def _spatial_energy(x, height, width):
    """Energy over the channels, of norm 1 over space: [B, H, W, D] -> [B, height, width]."""
    energy = (at_least_float32(x) ** 2).sum(-1, keepdims=True)
    energy = adaptive_average_pool(energy, height, width)[..., 0]
    # The addend keeps the gradient finite where a map is 0 all over.
    return energy / jnp.sqrt((energy**2).sum((1, 2), keepdims=True) + 1e-12)
