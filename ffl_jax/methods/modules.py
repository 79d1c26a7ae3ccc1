"""Linen modules that several methods use."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ffl_jax.models.base import batch_norm, conv, dense


class FusionModule(nn.Module):
    """Classifier over the sub-networks' feature maps: depthwise 3x3, pointwise 1x1, average pool, linear.

    Kim et al., 2019, arXiv 1904.09058; layers and initialisation from its released code. Maps of different
    resolution are first brought to the smallest one (our choice: the released code does not meet the case).

    Attributes:
      num_classes: C.
      features: channels after the pointwise convolution; 0 takes the widest of the maps.
    """

    num_classes: int
    features: int = 0

    @nn.compact
    def __call__(self, feature_maps: Sequence[jax.Array], train: bool) -> tuple[jax.Array, jax.Array]:
        """K maps [B, H_k, W_k, D_k] -> fused logits [B, C] and the fused map [B, H, W, features]."""
        height, width = smallest(feature_maps)
        resized = [
            ResolutionAdaptor(height, width, name=f"adaptor_{k}")(x, train)
            for k, x in enumerate(feature_maps)
        ]
        features = self.features or max(feature_map.shape[-1] for feature_map in feature_maps)
        fused_map = separable_conv(jnp.concatenate(resized, axis=-1), features, train)
        return dense(self.num_classes, features, name="head")(fused_map.mean(axis=(1, 2))), fused_map


def separable_conv(x: jax.Array, features: int, train: bool) -> jax.Array:
    """Depthwise 3x3, norm, ReLU, pointwise 1x1, norm, ReLU, within a compact module: channels -> features."""
    x = conv(x.shape[-1], 3, groups=x.shape[-1], name="depthwise_conv")(x)
    x = nn.relu(batch_norm(train, name="depthwise_norm")(x))
    x = conv(features, 1, name="pointwise_conv")(x)
    return nn.relu(batch_norm(train, name="pointwise_norm")(x))


class ResolutionAdaptor(nn.Module):
    """Brings a map down to height x width; has no parameters where it is there already.

    Where height and width shrink by the same power of two, each halving is a conv3x3 of stride 2, norm and
    ReLU; any other ratio is one adaptive average pool.
    """

    height: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, height, width, D]."""
        ratio = x.shape[1] / self.height
        halvings = math.log2(ratio)
        if ratio != x.shape[2] / self.width or not halvings.is_integer():
            return adaptive_average_pool(x, self.height, self.width)
        for step in range(int(halvings)):
            x = conv(x.shape[-1], 3, stride=2, name=f"conv{step + 1}")(x)
            x = nn.relu(batch_norm(train, name=f"norm{step + 1}")(x))
        return x


def smallest(maps: Sequence[jax.Array]) -> tuple[int, int]:
    """The least height and the least width of maps [B, H_k, W_k, D_k]."""
    return min(x.shape[1] for x in maps), min(x.shape[2] for x in maps)


def pool_to_smallest(maps: Sequence[jax.Array]) -> list[jax.Array]:
    """Maps [B, H_k, W_k, D_k], each average-pooled to the `smallest` height and width."""
    return [adaptive_average_pool(x, *smallest(maps)) for x in maps]


def adaptive_average_pool(x: jax.Array, height: int, width: int) -> jax.Array:
    """[B, H, W, D] -> [B, height, width, D]; row i averages rows floor(iH/height) to ceil((i+1)H/height)."""
    if x.shape[1:3] == (height, width):
        return x

    def weights(size, cells):
        matrix = np.zeros((cells, size), np.float32)
        for i in range(cells):
            low, high = i * size // cells, -((i + 1) * -size // cells)
            matrix[i, low:high] = 1 / (high - low)
        return matrix

    return jnp.einsum("ph,qw,bhwd->bpqd", weights(x.shape[1], height), weights(x.shape[2], width), x)
