"""CIFAR ResNets: He et al., 2016, sec. 4.2, with the details of the released code of FFL, ONE and OKDDip.

"ResNet-110" names three networks in the literature, of 1,736,564, 1,170,868 and 1,727,284 parameters for 100
classes: 18 basic blocks a stage (`resnet110`; FFL, RepDistiller), 12 bottleneck blocks a stage
(`resnet110_bottleneck`; OKDDip, MCL-OKD, PCL), and 18 bottleneck blocks a stage (`resnet164_bottleneck`; ONE,
whose code takes bottlenecks from depth 44 on).
"""

import functools

from ffl_jax.models.base import NETWORKS, BasicBlock, Bottleneck, Network, conv_norm, residual_stage


class ResNetCifar(Network):
    """Stem and three stages of `blocks` blocks, 16, 32 and 64 channels wide, strides 1, 2, 2.

    Attributes:
      blocks: in each stage.
      bottleneck_width: 0 for basic blocks; else the stages are of bottleneck blocks, put out 64, 128 and 256
        channels, and their 3x3 convolutions are `bottleneck_width` times 16, 32 and 64 channels wide.
    """

    blocks: int = 3
    bottleneck_width: int = 0

    def stem(self, x, train):
        return conv_norm(x, train, 16, 3, name="stem_*")

    def stage(self, index, x, train):
        planes = 16 * 2**index
        block = functools.partial(BasicBlock, planes)
        if self.bottleneck_width:
            block = functools.partial(Bottleneck, 4 * planes, self.bottleneck_width * planes)
        return residual_stage(x, train, index, self.blocks, block)


# Depth 6n + 2.
for _depth in (8, 14, 20, 32, 44, 56, 110):
    NETWORKS.register(f"resnet{_depth}")(functools.partial(ResNetCifar, blocks=(_depth - 2) // 6))
# Depth 9n + 2.
for _depth in (110, 164):
    NETWORKS.register(f"resnet{_depth}_bottleneck")(
        functools.partial(ResNetCifar, blocks=(_depth - 2) // 9, bottleneck_width=1)
    )
# The wide network of OKDDip and PCL (torchvision's width_per_group=512), no pre-activation network as in
# `wide_resnet`.
NETWORKS.register("wrn20_8")(functools.partial(ResNetCifar, blocks=2, bottleneck_width=8))
