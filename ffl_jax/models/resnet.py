"""ImageNet ResNets with basic blocks: He et al., 2016, sec. 4.1, padded as in PyTorch's torchvision."""

import functools

import flax.linen as nn

from ffl_jax.models.base import NETWORKS, Network, NetworkOutputs, batch_norm, conv, dense
from ffl_jax.models.resnet_cifar import BasicBlock


class ResNet(Network):
    """Stem (conv7x7 of stride 2, max pool) and four stages, 64 to 512 channels wide, strides 1, 2, 2, 2.

    Attributes:
      blocks: basic blocks in each stage.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)

    num_stages = 4

    @nn.compact
    def __call__(self, x, train):
        if self.start == 0:
            x = nn.relu(batch_norm(train, name="stem_norm")(conv(64, 7, stride=2, name="stem_conv")(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        stop = self.num_stages if self.stop is None else self.stop
        feature_maps = []
        for stage in range(self.start, stop):
            for block in range(self.blocks[stage]):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(64 * 2**stage, stride, name=f"stage{stage + 1}_block{block + 1}")(x, train)
            feature_maps.append(x)
        if self.stop is not None:
            return x
        features = x.mean(axis=(1, 2))
        logits = dense(self.num_classes, features.shape[-1], name="head")(features)
        return NetworkOutputs(logits, features, tuple(feature_maps))


for _depth, _blocks in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))):
    NETWORKS.register(f"resnet{_depth}")(functools.partial(ResNet, blocks=_blocks))
