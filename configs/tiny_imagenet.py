"""Tiny ImageNet, 200 classes of 64x64 pixels: ResNet-18, K = 2 on a shared trunk, the recipe of CIFAR-100.

    python -m ffl_jax.main --config=configs/tiny_imagenet.py --config.data.data_dir=DIR --workdir=runs/tiny

DIR is the unpacked tiny-imagenet-200.zip; the test split is its `val`, sorted into classes or not. ResNet-18
has the stem of ImageNet, which leaves a last map of 2x2 pixels; CIFAR's networks (`:network=wrn16_2`) keep
16x16. Others report, by a recipe and a stem that they do not state, 65.30 % for ResNet-18 alone and 68.89 %
with FFL (README of CMFF).
"""

from configs import common


def get_config(arg=None):
    config = common.get_config(arg, "tiny_imagenet", network="resnet18")
    config.data.name = "tiny_imagenet"
    config.data.pad = 8
    return config
