"""CINIC-10 (arXiv 1810.03505), recipe of CIFAR-10: ResNet-32, K = 2 on a shared trunk, 300 epochs, batch 128.

    python -m ffl_jax.main --config=configs/cinic10.py --config.data.data_dir=DIR --workdir=runs/cinic10

DIR is the unpacked CINIC-10.tar.gz (doi 10.7488/ds/2448). Trained on `train`, tested on `test`, 90 000 images
each; `valid` is left out. Channels' values as its authors give them. No published FFL number was found.
"""

from configs import common


def get_config(arg=None):
    config = common.get_config(arg, "cinic10")
    config.data.name = "cinic10"
    config.data.mean = (0.47889522, 0.47227842, 0.43047404)
    config.data.std = (0.24205776, 0.23828046, 0.25874835)
    return config
