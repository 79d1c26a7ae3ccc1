"""ImageNet (TFDS `imagenet2012`), streamed: ResNet-18, 224x224, K = 2, shared trunk, 90 epochs, batch 256.

    python -m ffl_jax.main --config=configs/imagenet.py --workdir=runs/imagenet

A folder tree, `DIR/train/<wnid>/*` and `DIR/val/<wnid>/*`: add `--config.data.name=folder
--config.data.data_dir=DIR`; `val` is tested on, also beside a `DIR/test` without labels. TFDS prepares
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, downloaded by hand, from `--config.data.manual_dir`. The
FFL authors' recipe for ImageNet was not found: this is the usual one of ResNets, FFL's fusion module takes
the map of 512 channels at 7x7, its ramp takes 24 epochs. Their numbers were not found either; ResNet-18 alone
reaches 69.76 % (torchvision), with FFSD 70.87 % (README of its released code).
"""

from configs import common


def get_config(arg=None):
    standard = {"epochs": 90, "batch_size": 256, "optimizer.decay_epochs": (30, 60)}
    config = common.get_config(arg, "imagenet", standard, network="resnet18")
    config.data.name = "imagenet2012"
    config.data.streaming = True
    config.data.crop = "resized"
    config.data.image_size = 224
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.checkpoint.every_steps = 1000  # an epoch has 5005
    return config
