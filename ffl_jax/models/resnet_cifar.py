"""CIFAR ResNets of depth 6n + 2: He et al., 2016, sec. 4.2, with the details of FFL's released code."""

import functools

import flax.linen as nn
import jax

from ffl_jax.models.base import NETWORKS, Network, NetworkOutputs, batch_norm, conv, dense


class BasicBlock(nn.Module):
    """conv3x3 - norm - ReLU - conv3x3 - norm, added to a shortcut, then ReLU.

    The shortcut is the identity, or a 1x1 convolution and norm (option B) where width or resolution change.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = conv(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(batch_norm(train, name="norm1")(y))
        y = conv(self.features, 3, name="conv2")(y)
        y = batch_norm(train, name="norm2")(y)
        if y.shape != x.shape:
            x = conv(self.features, 1, self.stride, name="shortcut_conv")(x)
            x = batch_norm(train, name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNetCifar(Network):
    """Stem and three stages of `blocks` basic blocks, 16, 32 and 64 channels wide, strides 1, 2, 2."""

    blocks: int = 3

    @nn.compact
    def __call__(self, x, train):
        if self.start == 0:
            x = nn.relu(batch_norm(train, name="stem_norm")(conv(16, 3, name="stem_conv")(x)))
        stop = self.num_stages if self.stop is None else self.stop
        feature_maps = []
        for stage in range(self.start, stop):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(16 * 2**stage, stride, name=f"stage{stage + 1}_block{block + 1}")(x, train)
            feature_maps.append(x)
        if self.stop is not None:
            return x
        features = x.mean(axis=(1, 2))
        logits = dense(self.num_classes, features.shape[-1], name="head")(features)
        return NetworkOutputs(logits, features, tuple(feature_maps))


for _depth in (8, 14, 20, 32, 44, 56, 110):
    NETWORKS.register(f"resnet{_depth}")(functools.partial(ResNetCifar, blocks=(_depth - 2) // 6))
