"""CIFAR DenseNets: Huang et al., 2017, arXiv 1608.06993.

"DenseNet-40-12" names two networks in the literature: the plain one with 12 layers a block (`densenet40_12`;
FFSD, 1,100,428 parameters for 100 classes), and one with 6 bottlenecks a block and half the channels after it
(`densenet_bc40_12`; OKDDip, MCL-OKD, PCL, 188,092 parameters). What bottlenecked ones start from is that of
OKDDip's released code.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffl_jax.models.base import FAN_IN, FAN_OUT, NETWORKS, Network, batch_norm, conv, dense


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

    @property
    def kernel_init(self):
        return FAN_IN if self.bottleneck else FAN_OUT

    def stem(self, x, train):
        return conv(2 * self.growth, 3, name="stem_conv", kernel_init=self.kernel_init)(x)

    def stage(self, index, x, train):
        stage = f"stage{index + 1}"
        if index > 0:
            x = nn.relu(batch_norm(train, name=f"{stage}_transition_norm")(x))
            width, name = int(self.compression * x.shape[-1]), f"{stage}_transition_conv"
            x = conv(width, 1, name=name, kernel_init=self.kernel_init)(x)
            x = nn.avg_pool(x, (2, 2), (2, 2))
        for layer in range(self.layers):
            x = DenseLayer(self.growth, self.bottleneck, name=f"{stage}_layer{layer + 1}")(x, train)
        if index == self.num_stages - 1:
            x = nn.relu(batch_norm(train, name=f"{stage}_norm")(x))
        return x

    def classify(self, features):
        bias_init = nn.initializers.zeros if self.bottleneck else None
        return dense(self.num_classes, features.shape[-1], name="head", bias_init=bias_init)(features)


class DenseLayer(nn.Module):
    """Norm - ReLU - conv3x3, with norm - ReLU - conv1x1 before it in a bottleneck; joined to its input."""

    growth: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, D + growth], the input first."""
        y = nn.relu(batch_norm(train, name="norm1")(x))
        if self.bottleneck:
            y = conv(4 * self.growth, 1, name="conv1", kernel_init=FAN_IN)(y)
            y = nn.relu(batch_norm(train, name="norm2")(y))
        name, kernel_init = ("conv2", FAN_IN) if self.bottleneck else ("conv1", FAN_OUT)
        y = conv(self.growth, 3, name=name, kernel_init=kernel_init)(y)
        return jnp.concatenate([x, y], axis=-1)


NETWORKS.register("densenet40_12")(DenseNet)
# (depth - 4) / 6 layers a block.
for _depth in (40, 100):
    NETWORKS.register(f"densenet_bc{_depth}_12")(
        functools.partial(DenseNet, layers=(_depth - 4) // 6, bottleneck=True, compression=0.5)
    )
