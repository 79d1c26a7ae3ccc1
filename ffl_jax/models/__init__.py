"""Network families, one file each. Importing a family registers its networks' names."""

from ffl_jax.models import resnet, resnet_cifar  # noqa: F401
from ffl_jax.models.base import NETWORKS, Network, NetworkOutputs

__all__ = ["NETWORKS", "Network", "NetworkOutputs"]
