"""CIFAR ResNets of depth 6n + 2: He et al., 2016, sec. 4.2, with the details of FFL's released code."""

import functools

import flax.linen as nn

from ffl_jax.models.base import NETWORKS, BasicBlock, Network, batch_norm, conv


class ResNetCifar(Network):
    """Stem and three stages of `blocks` basic blocks, 16, 32 and 64 channels wide, strides 1, 2, 2."""

    blocks: int = 3

    def stem(self, x, train):
        return nn.relu(batch_norm(train, name="stem_norm")(conv(16, 3, name="stem_conv")(x)))

    def stage(self, index, x, train):
        for block in range(self.blocks):
            stride = 2 if index > 0 and block == 0 else 1
            x = BasicBlock(16 * 2**index, stride, name=f"stage{index + 1}_block{block + 1}")(x, train)
        return x


for _depth in (8, 14, 20, 32, 44, 56, 110):
    NETWORKS.register(f"resnet{_depth}")(functools.partial(ResNetCifar, blocks=(_depth - 2) // 6))
