"""VGG for small images: Simonyan and Zisserman, 2015, arXiv 1409.1556, with norms.

"VGG-16" names three networks in the literature: that of the CRD benchmark (`vgg16`), whose last maps of 32
pixels are 4x4; that of MCL-OKD (`vgg16_pool5`), with the same 14,774,436 parameters for 100 classes but five
pools, so that they are 1x1; and that of OKDDip and PCL (`vgg16_pool5_linear3`), with five pools and three
linear layers: 15,299,748 parameters.
"""

import functools

import flax.linen as nn

from ffl_jax.errors import ConfigError
from ffl_jax.models.base import NETWORKS, Network, batch_norm, conv, small_dense


class VGG(Network):
    """Five stages of conv3x3 (with a bias, from 0) - norm - ReLU, 64 to 512 wide, and 2x2 max pools between.

    The form of the CRD benchmark (Tian et al., 2020, arXiv 1910.10699; layers from its released code), but
    for the pool before the last stage: there only images of 64 pixels have it, here all of 64 or more. Images
    of 32 pixels and those of 64 end at 4x4.

    Attributes:
      convolutions: in each stage.
      five_pools: always pool before the last stage, and in it at its end: images of 32 pixels end at 1x1.
      hidden: linear layers of 512 before the last one.
    """

    convolutions: tuple[int, ...] = (1, 1, 1, 1, 1)
    five_pools: bool = False
    hidden: int = 0

    num_stages = 5

    def stem(self, x, train):
        return x

    def stage(self, index, x, train):
        # Asks the map, since a branch never sees the image: after three pools 64 pixels are 8.
        if index > 0 and (index < 4 or self.five_pools or min(x.shape[1:3]) >= 8):
            x = self._halve(x, index)
        for layer in range(self.convolutions[index]):
            stage, width = f"stage{index + 1}", 64 * min(2**index, 8)
            x = conv(width, 3, bias_init=nn.initializers.zeros, name=f"{stage}_conv{layer + 1}")(x)
            x = nn.relu(batch_norm(train, name=f"{stage}_norm{layer + 1}")(x))
        return self._halve(x, index) if self.five_pools and index == 4 else x

    def _halve(self, x, index):
        side = min(x.shape[1:3])
        if side < 2:
            times, least = ("five", 32) if self.five_pools else ("three", 8)
            raise ConfigError(
                f"VGG halves images {times} times, but stage {index + 1} got a map of {side} pixel a side: "
                f"give it images of at least {least}, or choose another config.subnetworks.network."
            )
        return nn.max_pool(x, (2, 2), (2, 2))

    def classify(self, features):
        for layer in range(self.hidden):
            features = nn.relu(small_dense(512, name=f"hidden{layer + 1}_head")(features))
        return small_dense(self.num_classes, name="head")(features)


for _depth, _convolutions in ((8, (1, 1, 1, 1, 1)), (13, (2, 2, 2, 2, 2)), (16, (2, 2, 3, 3, 3))):
    NETWORKS.register(f"vgg{_depth}")(functools.partial(VGG, convolutions=_convolutions))
for _suffix, _hidden in (("", 0), ("_linear3", 2)):
    NETWORKS.register(f"vgg16_pool5{_suffix}")(
        functools.partial(VGG, convolutions=(2, 2, 3, 3, 3), five_pools=True, hidden=_hidden)
    )
