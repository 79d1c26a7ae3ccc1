"""MobileNetV2: Sandler et al., 2018, arXiv 1801.04381, table 2."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from ffl_jax.models.base import NETWORKS, Network, conv_norm, early_stride, small_dense

# Widths of the inverted residuals in each stage. All but the first stage expand by 6.
_WIDTHS = ((16,), (24,) * 2, (32,) * 3, (64,) * 4 + (96,) * 3, (160,) * 3 + (320,))


class MobileNetV2(Network):
    """Stem (conv3x3) and five stages of inverted residuals, then a conv1x1 to 1280 channels in the last.

    The layers are those of PyTorch's torchvision, but for the dropout before the head, which is left out. The
    stem and every stage but the first halve the map, except that `early_stride` spares small ones: images of
    127 pixels or more end at 1/32 of their size, as published, and images of 32 pixels at 4x4.

    Maps of the first four stages come from linear bottlenecks, so they hold negative values too.

    Attributes:
      width: multiplies all widths but that of the last map.
      early_strides: of the stem and of the second stage; None takes `early_stride`.
      expand_first: give the first stage's block, which does not expand, its first conv1x1 all the same.
      activation: what stands for ReLU.
    """

    width: float = 1.0
    early_strides: tuple[int, int] | None = None
    expand_first: bool = False
    activation: Callable[[jax.Array], jax.Array] = nn.relu6

    num_stages = 5

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many are in each stage."""
        return tuple(map(len, _WIDTHS))

    def stem(self, x, train):
        stride = self.early_strides[0] if self.early_strides else early_stride(x)
        width, activation = int(32 * self.width), self.activation
        return conv_norm(x, train, width, 3, stride, name="stem_*", activation=activation)

    def stage(self, index, x, train):
        if index == 1:
            stride = self.early_strides[1] if self.early_strides else early_stride(x)
        else:
            stride = 1 if index == 0 else 2
        expansion = 6 if index > 0 else int(self.expand_first)
        for block, width in enumerate(_WIDTHS[index]):
            x = InvertedResidual(
                int(width * self.width),
                stride if block == 0 else 1,
                expansion,
                self.activation,
                name=f"stage{index + 1}_block{block + 1}",
            )(x, train)
        if index == self.num_stages - 1:
            x = conv_norm(x, train, 1280, 1, name=f"stage{index + 1}_*", activation=self.activation)
        return x

    def classify(self, features):
        return small_dense(self.num_classes, name="head")(features)


class InvertedResidual(nn.Module):
    """conv1x1 that expands - depthwise conv3x3 - linear conv1x1, added to the input where shapes agree.

    Sandler et al., 2018, table 1 and fig. 4d. A norm follows each convolution, an activation the first two.

    Attributes:
      features: channels of the output.
      stride: of the depthwise convolution.
      expansion: channels of the first convolution over those of the input; 0 leaves it out.
      activation: ReLU6 in the paper.
    """

    features: int
    stride: int = 1
    expansion: int = 6
    activation: Callable[[jax.Array], jax.Array] = nn.relu6

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H / stride, W / stride, features]."""
        y, layer = x, functools.partial(conv_norm, activation=self.activation)
        if self.expansion:
            y = layer(y, train, self.expansion * x.shape[-1], 1, name="expand_*")
        width = y.shape[-1]
        y = layer(y, train, width, 3, self.stride, groups=width, name="depthwise_*")
        y = conv_norm(y, train, self.features, 1, name="project_*", activation=None)
        return x + y if self.stride == 1 and self.features == x.shape[-1] else y


NETWORKS.register("mobilenetv2")(MobileNetV2)
# The CIFAR form of the CRD benchmark (Tian et al., 2020, arXiv 1910.10699; layers from its released code):
# 32 pixels end at 2x2, and ReLU is not cut off at 6.
NETWORKS.register("mobilenetv2_x0_5")(
    functools.partial(MobileNetV2, width=0.5, early_strides=(2, 1), expand_first=True, activation=nn.relu)
)
