"""Vision transformers: Dosovitskiy et al., 2021, arXiv 2010.11929; small and tiny ones of DeiT, 2012.12877.

The layers are those of timm's `vit_*_patch16_224`, and of torchvision's `vit_b_16`, here `vit_base_patch16`.
Patches of 4 pixels are for images of 32. All weights start from timm's Normal(0, 0.02).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffl_jax.errors import ConfigError
from ffl_jax.models.base import (
    NETWORKS,
    SMALL_NORMAL,
    Dropout,
    Network,
    drop_path_rates,
    layer_norm,
    mlp,
    patch_conv,
)


class ViT(Network):
    """Patches and a class token with learned positions, and blocks of attention, in stages of three.

    From stage to stage go the tokens of the patches as a map, [B, H / patch, W / patch, D], and the class
    token, [B, D]. Feature maps are the former, the last one after the last layer norm; the head gets the
    class token. Positions are learned for the images' size alone: a start that was trained at another one
    has them interpolated (`ffl_jax/pytorch/names.py`).

    Attributes:
      patch: side of a patch, in pixels.
      width: D.
      heads: of the attention.
      blocks: in each stage.
    """

    patch: int = 16
    width: int = 192
    heads: int = 3
    blocks: tuple[int, ...] = (3, 3, 3, 3)

    drops = ("dropout", "drop_path")

    @property
    def num_stages(self):
        return len(self.blocks)

    def grid(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image [H, W, 3]."""
        return image_shape[0] // self.patch, image_shape[1] // self.patch

    def stem(self, x, train):
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ConfigError(
                f"config.subnetworks.network: patches of {self.patch}x{self.patch} pixels do not divide "
                f"images of {x.shape[1]}x{x.shape[2]}: set config.data.image_size to a multiple of "
                f"{self.patch}, or take a network of other patches."
            )
        patches = patch_conv(x, self.width, self.patch, name="stem_conv")
        token = self.param("stem_class_token", SMALL_NORMAL, (1, 1, self.width))
        tokens = _joined(patches, jnp.broadcast_to(token[0], (x.shape[0], self.width)))
        positions = self.param("stem_positions", SMALL_NORMAL, (1, *tokens.shape[1:]))
        return _divided(Dropout(self.dropout)(tokens + positions, train), patches.shape)

    def stage(self, index, x, train):
        tokens, stage = _joined(*x), f"stage{index + 1}"
        for number, rate in enumerate(drop_path_rates(self.drop_path, self.blocks)[index]):
            block = Block(self.heads, self.dropout, rate, name=f"{stage}_block{number + 1}")
            tokens = block(tokens, train)
        if index == self.num_stages - 1:
            tokens = layer_norm(f"{stage}_norm")(tokens)
        return _divided(tokens, x[0].shape)

    def feature_map(self, x):
        return x[0]

    def pool(self, x):
        return x[1]

    def classify(self, features):
        return nn.Dense(self.num_classes, kernel_init=SMALL_NORMAL, name="head")(features)


def _joined(feature_map, class_token):
    """[B, H, W, D] and [B, D] -> [B, 1 + HW, D]."""
    batch, height, width, channels = feature_map.shape  # an export does not know the batch's size
    patches = feature_map.reshape(batch, height * width, channels)
    return jnp.concatenate([class_token[:, None], patches], axis=1)


def _divided(tokens, shape):
    """[B, 1 + HW, D] -> [B, H, W, D] of that shape and [B, D]."""
    class_token, patches = jnp.split(tokens, [1], axis=1)
    return patches.reshape(shape), class_token.squeeze(1)


class Block(nn.Module):
    """Layer norm and attention, then layer norm and two linear layers, each added to its input.

    Attributes:
      heads: of the attention.
      dropout, drop_path: see `Network`; of what is added.
    """

    heads: int
    dropout: float = 0.0
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""

        def add(x, y):
            return x + Dropout(self.drop_path, examples=True)(y, train)

        y = Attention(self.heads, name="attention")(layer_norm("norm1")(x))
        x = add(x, Dropout(self.dropout)(y, train))
        return add(x, mlp(layer_norm("norm2")(x), train, self.dropout))


class Attention(nn.Module):
    """Softmax attention of every token to all: Vaswani et al., 2017, arXiv 1706.03762, sec. 3.2.

    Attributes:
      heads: of D / heads channels each.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        *place, width = x.shape
        heads = (*place, self.heads, width // self.heads)
        joined = nn.Dense(3 * width, kernel_init=SMALL_NORMAL, name="query_key_value")(x)
        query, key, value = (part.reshape(heads) for part in jnp.split(joined, 3, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
        weights = nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
        return nn.Dense(width, kernel_init=SMALL_NORMAL, name="project")(mixed.reshape(x.shape))


for _name, _width, _heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)):
    for _patch in (16, 4):
        NETWORKS.register(f"vit_{_name}_patch{_patch}")(
            functools.partial(ViT, patch=_patch, width=_width, heads=_heads)
        )
