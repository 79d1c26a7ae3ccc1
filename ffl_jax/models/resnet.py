"""ImageNet ResNets: He et al., 2016, sec. 4.1, padded and strided as in PyTorch's torchvision."""

import functools

import flax.linen as nn

from ffl_jax.models.base import NETWORKS, BasicBlock, Bottleneck, Network, conv_norm, residual_stage


class ResNet(Network):
    """Stem (conv7x7 of stride 2, max pool) and four stages, 64 to 512 channels wide, strides 1, 2, 2, 2.

    Attributes:
      blocks: in each stage.
      bottleneck: blocks are bottleneck blocks of that width, which put out 256 to 2048 channels.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False

    num_stages = 4

    def stem(self, x, train):
        x = conv_norm(x, train, 64, 7, stride=2, name="stem_*")
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def stage(self, index, x, train):
        planes = 64 * 2**index
        block = functools.partial(BasicBlock, planes)
        if self.bottleneck:
            block = functools.partial(Bottleneck, 4 * planes, planes)
        return residual_stage(x, train, index, self.blocks[index], block)


for _depth, _blocks in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))):
    NETWORKS.register(f"resnet{_depth}")(functools.partial(ResNet, blocks=_blocks))
NETWORKS.register("resnet50")(functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True))
