"""ShuffleNets: v1 of Zhang et al., 2018, arXiv 1707.01083; v2 of Ma et al., 2018, arXiv 1807.11164.

All convolutions start from PyTorch's default, as in the CRD benchmark's and torchvision's code.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffl_jax.models import base
from ffl_jax.models.base import NETWORKS, UNIFORM, Network, early_stride

conv_norm = functools.partial(base.conv_norm, kernel_init=UNIFORM)

_BLOCKS = (4, 8, 4)  # in each stage, of both versions
_GROUPS = 3  # of the pointwise convolutions, version 1


@NETWORKS.register("shufflenetv1")
class ShuffleNetV1(Network):
    """Stem and three stages of units, 240, 480 and 960 channels wide, each of stride 2; three groups.

    The CIFAR form of the CRD benchmark (Tian et al., 2020, arXiv 1910.10699; layers from its released code):
    the stem is a conv1x1 of stride 1 without a pool, so that images of 32 pixels end at 4x4.
    """

    def stem(self, x, train):
        return conv_norm(x, train, 24, 1, name="stem_*")

    def stage(self, index, x, train):
        for block in range(_BLOCKS[index]):
            x = UnitV1(
                240 * 2**index,
                stride=2 if block == 0 else 1,
                # The paper too finds the 24 channels of the stem too few for groups.
                groups=1 if index == block == 0 else _GROUPS,
                name=f"stage{index + 1}_block{block + 1}",
            )(x, train)
        return x


@NETWORKS.register("shufflenetv2")
class ShuffleNetV2(Network):
    """Stem and three stages of units, 116, 232 and 464 channels wide, then a conv1x1 to 1024 in the last.

    The layers are those of PyTorch's torchvision (x1.0): a conv3x3 of stride 2 and a max pool, then stages
    of stride 2. `early_stride` spares small maps the first two of these five halvings: images of 127 pixels
    or more end at 1/32 of their size, as published, and images of 32 pixels at 4x4.

    With 100 classes it has 1,356,104 parameters; the CRD benchmark's has 1,355,528, since its stem is a
    conv1x1.
    """

    def stem(self, x, train):
        x = conv_norm(x, train, 24, 3, early_stride(x), name="stem_*")
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if early_stride(x) == 2 else x

    def stage(self, index, x, train):
        for block in range(_BLOCKS[index]):
            name = f"stage{index + 1}_block{block + 1}"
            x = UnitV2(116 * 2**index, stride=2 if block == 0 else 1, name=name)(x, train)
        if index == self.num_stages - 1:
            x = conv_norm(x, train, 1024, 1, name=f"stage{index + 1}_*")
        return x


class UnitV1(nn.Module):
    """Grouped conv1x1 - shuffle - depthwise conv3x3 - grouped conv1x1: Zhang et al., 2018, fig. 2b and 2c.

    The result is added to the input; at stride 2 the input is average-pooled and stands beside it. A norm
    follows each convolution, and ReLU each but the last, which has it after the shortcut. The paper has none
    after the depthwise one: this is the CRD benchmark's.

    Attributes:
      features: channels of the output; the convolutions between have a quarter of what they add to it.
      stride: of the depthwise convolution, 1 or 2.
      groups: of the first convolution and the shuffle; the last convolution always has three.
    """

    features: int
    stride: int = 1
    groups: int = _GROUPS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H / stride, W / stride, features]."""
        features = self.features - x.shape[-1] if self.stride == 2 else self.features
        y = conv_norm(x, train, features // 4, 1, groups=self.groups, name="reduce_*")
        y = channel_shuffle(y, self.groups)
        y = conv_norm(y, train, features // 4, 3, self.stride, features // 4, name="depthwise_*")
        y = conv_norm(y, train, features, 1, groups=_GROUPS, name="expand_*", activation=None)
        if self.stride == 1:
            return nn.relu(x + y)
        # At the border too the sum of a window is divided by 9, as in PyTorch.
        shortcut = nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=True)
        return nn.relu(jnp.concatenate([y, shortcut], axis=-1))


class UnitV2(nn.Module):
    """Half the channels pass, half go through conv1x1 - depthwise conv3x3 - conv1x1; then all are shuffled.

    Ma et al., 2018, fig. 3c and 3d. At stride 2 all channels go both ways, and the first way is a depthwise
    conv3x3 and a conv1x1. A norm follows each convolution, and ReLU each conv1x1.

    Attributes:
      features: channels of the output, half of them from either way.
      stride: of the depthwise convolutions, 1 or 2.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H / stride, W / stride, features]."""

        def pointwise(x, name):
            return conv_norm(x, train, self.features // 2, 1, name=f"{name}_*")

        def depthwise(x, name):
            width, name = x.shape[-1], f"{name}_*"
            return conv_norm(x, train, width, 3, self.stride, width, name=name, activation=None)

        if self.stride == 1:
            shortcut, y = jnp.split(x, 2, axis=-1)
        else:
            shortcut, y = pointwise(depthwise(x, "shortcut_depthwise"), "shortcut_pointwise"), x
        y = pointwise(depthwise(pointwise(y, "pointwise1"), "depthwise"), "pointwise2")
        return channel_shuffle(jnp.concatenate([shortcut, y], axis=-1), 2)


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """[..., D] -> [..., D]: channel i of group g, D / groups to a group, becomes channel i * groups + g."""
    grouped = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return grouped.swapaxes(-1, -2).reshape(x.shape)
