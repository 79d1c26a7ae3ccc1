"""Pre-activation wide ResNets: Zagoruyko and Komodakis, 2016, arXiv 1605.07146, as in FFSD's released code.

There every convolution has a bias; the second convolution of a block has the stride, where the paper gives it
to the first; and a shortcut convolution takes the block's input, where the paper gives it the activated one.
Without biases, as usual elsewhere, WRN-16-2, 40-2 and 28-10 have 703,284, 2,255,156 and 36,536,884 parameters
for 100 classes; here 704,420, 2,258,084 and 36,546,980.

The released WRN-28-10 also drops 30 % of the activations within its blocks while it trains; here none is.
"""

import functools

import flax.linen as nn
import jax

from ffl_jax.models.base import NETWORKS, Network, batch_norm, biased_conv, residual_stage


class WideResNet(Network):
    """Stem conv3x3 and three stages, 16, 32 and 64 times `width` channels wide, strides 1, 2, 2.

    The first two feature maps are sums that no norm or ReLU has seen; the third is after both.

    Attributes:
      blocks: in each stage.
      width: widening factor.
    """

    blocks: int = 2
    width: int = 2

    def stem(self, x, train):
        return biased_conv(x, 16, 3, name="stem_conv")

    def stage(self, index, x, train):
        block = functools.partial(PreActivationBlock, 16 * self.width * 2**index)
        x = residual_stage(x, train, index, self.blocks, block)
        if index == self.num_stages - 1:
            # PyTorch's momentum is 0.9 there: the running statistics are nearly those of the last batch.
            x = nn.relu(batch_norm(train, name=f"stage{index + 1}_norm", momentum=0.1)(x))
        return x


class PreActivationBlock(nn.Module):
    """Norm - ReLU - conv3x3 - norm - ReLU - conv3x3, added to a shortcut.

    The shortcut is the identity, or a 1x1 convolution where width or resolution change.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H / stride, W / stride, features]."""
        y = nn.relu(batch_norm(train, name="norm1")(x))
        y = biased_conv(y, self.features, 3, name="conv1")
        y = nn.relu(batch_norm(train, name="norm2")(y))
        y = biased_conv(y, self.features, 3, self.stride, name="conv2")
        if y.shape != x.shape:
            x = biased_conv(x, self.features, 1, self.stride, name="shortcut_conv")
        return x + y


# Depth 6n + 4.
for _depth, _width in ((16, 2), (40, 2), (28, 10)):
    NETWORKS.register(f"wrn{_depth}_{_width}")(
        functools.partial(WideResNet, blocks=(_depth - 4) // 6, width=_width)
    )
