"""ImageNet ResNets with basic blocks: He et al., 2016, sec. 4.1, padded as in PyTorch's torchvision."""

import functools

import flax.linen as nn

from ffl_jax.models.base import NETWORKS, BasicBlock, Network, batch_norm, conv


class ResNet(Network):
    """Stem (conv7x7 of stride 2, max pool) and four stages, 64 to 512 channels wide, strides 1, 2, 2, 2.

    Attributes:
      blocks: basic blocks in each stage.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)

    num_stages = 4

    def stem(self, x, train):
        x = nn.relu(batch_norm(train, name="stem_norm")(conv(64, 7, stride=2, name="stem_conv")(x)))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def stage(self, index, x, train):
        for block in range(self.blocks[index]):
            stride = 2 if index > 0 and block == 0 else 1
            x = BasicBlock(64 * 2**index, stride, name=f"stage{index + 1}_block{block + 1}")(x, train)
        return x


for _depth, _blocks in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))):
    NETWORKS.register(f"resnet{_depth}")(functools.partial(ResNet, blocks=_blocks))
