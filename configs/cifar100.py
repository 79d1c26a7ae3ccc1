"""CIFAR-100 by FFL's released recipe: ResNet-32, K = 2 on a shared trunk, 300 epochs, batch 128.

    python -m ffl_jax.main --config=configs/cifar100.py --workdir=runs/cifar100

The released code's loop runs 301 epochs where it says 300: `--config.epochs=301` for exactly that. Others
report 72.18 % +- 0.11 for FFL's sub-network (table of PCL, Wu and Gong, AAAI 2021); the authors' own table
was not found.
"""

from configs import common


def get_config(arg=None):
    channels = {
        "data.mean": (129.3 / 255, 124.1 / 255, 112.4 / 255),
        "data.std": (68.2 / 255, 65.4 / 255, 70.4 / 255),
    }
    config = common.get_config(arg, "cifar100", channels)
    config.data.name = "cifar100"
    return config
