"""VGG for small images: Simonyan and Zisserman, 2015, arXiv 1409.1556, with norms and one linear layer."""

import functools

import flax.linen as nn

from ffl_jax.errors import ConfigError
from ffl_jax.models.base import NETWORKS, Network, batch_norm, conv


class VGG(Network):
    """Five stages of conv3x3 (with a bias, from 0) - norm - ReLU, 64 to 512 wide, and 2x2 max pools between.

    The form of the CRD benchmark (Tian et al., 2020, arXiv 1910.10699; layers from its released code), but
    for the pool before the last stage: there only images of 64 pixels have it, here all of 64 or more. Images
    of 32 pixels and those of 64 end at 4x4.

    Attributes:
      convolutions: in each stage.
    """

    convolutions: tuple[int, ...] = (1, 1, 1, 1, 1)

    num_stages = 5

    def stem(self, x, train):
        return x

    def stage(self, index, x, train):
        side = min(x.shape[1:3])
        # Asks the map, since a branch never sees the image: after three pools 64 pixels are 8.
        if 0 < index < 4 or (index == 4 and side >= 8):
            if side < 2:
                raise ConfigError(
                    f"VGG halves images three times, but stage {index + 1} got a map of {side} pixel a side: "
                    "give it images of at least 8, or choose another config.subnetworks.network."
                )
            x = nn.max_pool(x, (2, 2), (2, 2))
        for layer in range(self.convolutions[index]):
            stage, width = f"stage{index + 1}", 64 * min(2**index, 8)
            x = conv(width, 3, bias_init=nn.initializers.zeros, name=f"{stage}_conv{layer + 1}")(x)
            x = nn.relu(batch_norm(train, name=f"{stage}_norm{layer + 1}")(x))
        return x


for _depth, _convolutions in ((8, (1, 1, 1, 1, 1)), (13, (2, 2, 2, 2, 2)), (16, (2, 2, 3, 3, 3))):
    NETWORKS.register(f"vgg{_depth}")(functools.partial(VGG, convolutions=_convolutions))
