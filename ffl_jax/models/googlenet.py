"""GoogLeNet for CIFAR: Szegedy et al., 2015, arXiv 1409.4842, table 1, as in FFSD's released code.

One conv3x3 replaces the stem, norms follow all convolutions (which keep their biases), two conv3x3 stand in
for the conv5x5, and there are no auxiliary classifiers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffl_jax.models.base import NETWORKS, Network, batch_norm, biased_conv


@NETWORKS.register("googlenet")
class GoogLeNet(Network):
    """Stem of 192 channels and three stages of inception blocks, the later two after a max pool.

    Attributes:
      widths: of every block of every stage, see `Inception`; the paper's blocks 3a to 5b.
    """

    widths: tuple = (
        (
            ((64,), (96, 128), (16, 32, 32), (32,)),
            ((128,), (128, 192), (32, 96, 96), (64,)),
        ),
        (
            ((192,), (96, 208), (16, 48, 48), (64,)),
            ((160,), (112, 224), (24, 64, 64), (64,)),
            ((128,), (128, 256), (24, 64, 64), (64,)),
            ((112,), (144, 288), (32, 64, 64), (64,)),
            ((256,), (160, 320), (32, 128, 128), (128,)),
        ),
        (
            ((256,), (160, 320), (32, 128, 128), (128,)),
            ((384,), (192, 384), (48, 128, 128), (128,)),
        ),
    )

    def stem(self, x, train):
        return _conv_norm_relu(x, 192, 3, train, "stem_conv", "stem_norm")

    def stage(self, index, x, train):
        if index > 0:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block, widths in enumerate(self.widths[index]):
            x = Inception(widths, name=f"stage{index + 1}_block{block + 1}")(x, train)
        return x


class Inception(nn.Module):
    """Four branches side by side, each of convolutions with norm and ReLU; their outputs are joined.

    Attributes:
      widths: channels of the convolutions in each branch: 1x1; 1x1, 3x3; 1x1, 3x3, 3x3; max pool, 1x1.
    """

    widths: tuple[tuple[int, ...], ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, sum of the branches' last widths]."""
        inputs = [x, x, x, nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))]
        outputs = []
        for branch, (y, widths) in enumerate(zip(inputs, self.widths, strict=True), start=1):
            for layer, width in enumerate(widths, start=1):
                names = f"branch{branch}_conv{layer}", f"branch{branch}_norm{layer}"
                y = _conv_norm_relu(y, width, 1 if layer == 1 else 3, train, *names)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1)


def _conv_norm_relu(x, features, kernel, train, conv_name, norm_name):
    x = biased_conv(x, features, kernel, name=conv_name)
    return nn.relu(batch_norm(train, name=norm_name)(x))
