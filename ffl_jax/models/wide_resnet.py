"""Pre-activation wide ResNets: Zagoruyko and Komodakis, 2016, arXiv 1605.07146, in two forms.

`wrn16_2` and its like are those of FFSD's released code: every convolution has a bias; the second convolution
of a block has the stride, where the paper gives it to the first; and a shortcut convolution takes the block's
input, where the paper gives it the activated one. `wrn16_2_unbiased` and its like are the paper's, as in the
CRD benchmark (RepDistiller) and MCL: WRN-16-2 and 40-2 have 703,284 and 2,255,156 parameters for 100 classes
there, and 704,420 and 2,258,084 in FFSD's.

FFSD's WRN-28-10 also drops 30 % of the activations within its blocks while it trains; here none is.
"""

import functools

import flax.linen as nn
import jax

from ffl_jax.models.base import NETWORKS, Network, batch_norm, biased_conv, conv, dense, residual_stage


class WideResNet(Network):
    """Stem conv3x3 and three stages, 16, 32 and 64 times `width` channels wide, strides 1, 2, 2.

    The first two feature maps are sums that no norm or ReLU has seen; the third is after both.

    Attributes:
      blocks: in each stage.
      width: widening factor.
      biased: FFSD's form; else the paper's.
    """

    blocks: int = 2
    width: int = 2
    biased: bool = True

    def stem(self, x, train):
        return _conv(self.biased)(x, 16, 3, name="stem_conv")

    def stage(self, index, x, train):
        block = functools.partial(PreActivationBlock, 16 * self.width * 2**index, biased=self.biased)
        x = residual_stage(x, train, index, self.blocks, block)
        if index == self.num_stages - 1:
            # PyTorch's momentum is 0.9 in FFSD's: the running statistics are nearly those of the last batch.
            momentum = 0.1 if self.biased else 0.9
            x = nn.relu(batch_norm(train, name=f"stage{index + 1}_norm", momentum=momentum)(x))
        return x

    def classify(self, features):
        bias_init = None if self.biased else nn.initializers.zeros
        return dense(self.num_classes, features.shape[-1], name="head", bias_init=bias_init)(features)


class PreActivationBlock(nn.Module):
    """Norm - ReLU - conv3x3 - norm - ReLU - conv3x3, added to a shortcut.

    The shortcut is the identity, or a 1x1 convolution where width or resolution change.

    Attributes:
      features: channels of the output.
      stride: of one 3x3 convolution and of the shortcut.
      biased: as in `WideResNet`.
    """

    features: int
    stride: int = 1
    biased: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H / stride, W / stride, features]."""
        convolve = _conv(self.biased)
        first, second = (1, self.stride) if self.biased else (self.stride, 1)
        activated = nn.relu(batch_norm(train, name="norm1")(x))
        y = convolve(activated, self.features, 3, first, name="conv1")
        y = nn.relu(batch_norm(train, name="norm2")(y))
        y = convolve(y, self.features, 3, second, name="conv2")
        if y.shape != x.shape:
            x = convolve(x if self.biased else activated, self.features, 1, self.stride, name="shortcut_conv")
        return x + y


def _conv(biased):
    if biased:
        return biased_conv
    return lambda x, *sizes, name: conv(*sizes, name=name)(x)


# Depth 6n + 4.
for _depth, _width, _suffix in (
    *((16, 2, ""), (40, 2, ""), (28, 10, "")),
    *((16, 1, "_unbiased"), (16, 2, "_unbiased"), (40, 2, "_unbiased")),
):
    NETWORKS.register(f"wrn{_depth}_{_width}{_suffix}")(
        functools.partial(WideResNet, blocks=(_depth - 4) // 6, width=_width, biased=not _suffix)
    )
