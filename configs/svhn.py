"""SVHN, cropped digits: ResNet-32 with the CIFAR recipe, without flips.

    python -m ffl_jax.main --config=configs/svhn.py --workdir=runs/svhn

No published FFL number was found.
"""

from configs import common


def get_config(arg=None):
    config = common.get_config(arg, "svhn")
    config.data.name = "svhn_cropped"
    config.data.flip = False
    return config
