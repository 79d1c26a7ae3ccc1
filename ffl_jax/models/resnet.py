"""ImageNet ResNets: He et al., 2016, sec. 4.1, padded and strided as in PyTorch's torchvision."""

import functools

import flax.linen as nn

from ffl_jax.models.base import NETWORKS, BasicBlock, Bottleneck, Network, batch_norm, conv


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
        x = nn.relu(batch_norm(train, name="stem_norm")(conv(64, 7, stride=2, name="stem_conv")(x)))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def stage(self, index, x, train):
        planes = 64 * 2**index
        for block in range(self.blocks[index]):
            stride = 2 if index > 0 and block == 0 else 1
            name = f"stage{index + 1}_block{block + 1}"
            if self.bottleneck:
                x = Bottleneck(4 * planes, planes, stride, name=name)(x, train)
            else:
                x = BasicBlock(planes, stride, name=name)(x, train)
        return x


for _depth, _blocks in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))):
    NETWORKS.register(f"resnet{_depth}")(functools.partial(ResNet, blocks=_blocks))
NETWORKS.register("resnet50")(functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True))
