"""CIFAR-10, recipe as on CIFAR-100: ResNet-32, K = 2 on a shared trunk, 300 epochs, batch 128.

    python -m ffl_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

Others report 94.01 % +- 0.11 for FFL's sub-network (table of PCL, Wu and Gong, AAAI 2021).
"""

from configs import common


def get_config(arg=None):
    channels = {
        "data.mean": (125.3 / 255, 123.0 / 255, 113.9 / 255),
        "data.std": (63.0 / 255, 62.1 / 255, 66.7 / 255),
    }
    config = common.get_config(arg, "cifar10", channels)
    config.data.name = "cifar10"
    return config
