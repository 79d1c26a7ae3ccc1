"""Fashion-MNIST, 28x28 grey: ResNet-20 with the CIFAR recipe, shortened to 60 epochs.

    python -m ffl_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

No published FFL number was found.
"""

from configs import common


def get_config(arg=None):
    config = common.get_config(arg, "fashion_mnist", network="resnet20", epochs=60)
    config.data.name = "fashion_mnist"
    return config
