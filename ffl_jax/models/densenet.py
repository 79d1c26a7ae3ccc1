"""CIFAR DenseNets: Huang et al., 2017, arXiv 1608.06993; DenseNet-40 as in FFSD's released code."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffl_jax.models.base import NETWORKS, Network, batch_norm, conv


class DenseNet(Network):
    """Stem conv3x3 of 2 `growth` channels and three dense blocks, transitions to half the sides between.

    A stage is a dense block and the transition before it. The first two feature maps are concatenations that
    no norm has seen as a whole; the third is after a norm and a ReLU.

    Attributes:
      layers: in each dense block.
      growth: channels that a layer adds.
      bottleneck: each layer first narrows its input to 4 `growth` channels (DenseNet-B).
      compression: share of the channels that a transition keeps (DenseNet-C where it is below 1).
    """

    layers: int = 12
    growth: int = 12
    bottleneck: bool = False
    compression: float = 1.0

    def stem(self, x, train):
        return conv(2 * self.growth, 3, name="stem_conv")(x)

    def stage(self, index, x, train):
        stage = f"stage{index + 1}"
        if index > 0:
            x = nn.relu(batch_norm(train, name=f"{stage}_transition_norm")(x))
            x = conv(int(self.compression * x.shape[-1]), 1, name=f"{stage}_transition_conv")(x)
            x = nn.avg_pool(x, (2, 2), (2, 2))
        for layer in range(self.layers):
            x = DenseLayer(self.growth, self.bottleneck, name=f"{stage}_layer{layer + 1}")(x, train)
        if index == self.num_stages - 1:
            x = nn.relu(batch_norm(train, name=f"{stage}_norm")(x))
        return x


class DenseLayer(nn.Module):
    """Norm - ReLU - conv3x3, with norm - ReLU - conv1x1 before it in a bottleneck; joined to its input."""

    growth: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, D + growth], the input first."""
        y = nn.relu(batch_norm(train, name="norm1")(x))
        if self.bottleneck:
            y = conv(4 * self.growth, 1, name="conv1")(y)
            y = nn.relu(batch_norm(train, name="norm2")(y))
        y = conv(self.growth, 3, name="conv2" if self.bottleneck else "conv1")(y)
        return jnp.concatenate([x, y], axis=-1)


NETWORKS.register("densenet40_12")(DenseNet)
# (100 - 4) / 6 layers a block.
NETWORKS.register("densenet_bc100_12")(
    functools.partial(DenseNet, layers=16, bottleneck=True, compression=0.5)
)
