"""ConvNeXts: Liu et al., 2022, arXiv 2201.03545, as torchvision's and timm's `convnext_tiny` are."""

import functools

import flax.linen as nn
import jax

from ffl_jax.models.base import (
    NETWORKS,
    SMALL_NORMAL,
    Dropout,
    Network,
    conv,
    drop_path_rates,
    layer_norm,
    mlp,
    patch_conv,
)


class ConvNeXt(Network):
    """Patches and a layer norm, then four stages, each at half the sides of the one before.

    A layer norm and a convolution of 2x2 patches are between two stages, and a layer norm is between the
    pooled features and the linear layer.

    Attributes:
      widths: channels of each stage.
      blocks: in each stage.
      patch: side of the first patches, in pixels; with 4 images of 32 pixels end at 1x1.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    blocks: tuple[int, ...] = (3, 3, 9, 3)
    patch: int = 4

    drops = ("drop_path",)

    @property
    def num_stages(self):
        return len(self.blocks)

    def stem(self, x, train):
        return layer_norm("stem_norm")(patch_conv(x, self.widths[0], self.patch, name="stem_conv"))

    def stage(self, index, x, train):
        stage = f"stage{index + 1}"
        if index > 0:
            x = layer_norm(f"{stage}_halving_norm")(x)
            x = patch_conv(x, self.widths[index], 2, name=f"{stage}_halving_conv")
        for number, rate in enumerate(drop_path_rates(self.drop_path, self.blocks)[index]):
            x = Block(rate, name=f"{stage}_block{number + 1}")(x, train)
        return x

    def classify(self, features):
        features = layer_norm("norm_head")(features)
        return nn.Dense(self.num_classes, kernel_init=SMALL_NORMAL, name="head")(features)


class Block(nn.Module):
    """Depthwise conv7x7, layer norm and two linear layers, scaled by channel and added to the input: fig. 4.

    Attributes:
      drop_path: see `Network`.
    """

    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, D]."""
        width, start = x.shape[-1], {"bias_init": nn.initializers.zeros, "kernel_init": SMALL_NORMAL}
        y = conv(width, 7, groups=width, name="depthwise_conv", **start)(x)
        y = mlp(layer_norm("norm")(y), train)
        y = y * self.param("layer_scale", nn.initializers.constant(1e-6), (width,))
        return x + Dropout(self.drop_path, examples=True)(y, train)


NETWORKS.register("convnext_tiny")(ConvNeXt)
# For images of 32 pixels: it ends at 2x2.
NETWORKS.register("convnext_tiny_patch2")(functools.partial(ConvNeXt, patch=2))
