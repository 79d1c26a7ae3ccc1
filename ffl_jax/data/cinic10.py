"""CINIC-10: 270 000 images of 32x32 pixels, CIFAR-10's and downsampled ImageNet's (arXiv 1810.03505)."""

import logging

from ffl_jax.data import base, folder, roles
from ffl_jax.errors import DatasetError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_LAYOUT = (
    "it must hold the folders train and test of CINIC-10.tar.gz (doi 10.7488/ds/2448), each with its ten "
    "class folders"
)


@base.SOURCES.register("cinic10")
def load(config):
    """Reads the published tree in `config.data_dir`; its third folder, `valid`, is left out."""
    top = folder.root(config, "CINIC-10", _LAYOUT)
    logging.info("The split valid of CINIC-10 is not used.")
    train, test, class_names = folder.load_tree(config, top, {"train": "train", "test": "test"}, _LAYOUT)
    if class_names != CLASSES:
        raise DatasetError(
            f"{top} is not CINIC-10: its classes are {roles.some(list(class_names))}; {_LAYOUT}."
        )
    return train, test, class_names
