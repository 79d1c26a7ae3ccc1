"""Network families, one file each. Importing a family registers its networks' names."""

from ffl_jax.models import (  # noqa: F401
    convnext,
    densenet,
    googlenet,
    mobilenet,
    resnet,
    resnet_cifar,
    shufflenet,
    vgg,
    vit,
    wide_resnet,
)
from ffl_jax.models.base import NETWORKS, Network, NetworkOutputs

__all__ = ["NETWORKS", "Network", "NetworkOutputs"]
