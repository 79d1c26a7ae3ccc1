"""SVHN, cropped digits, in its original MATLAB files (Netzer et al., 2011)."""

import io
import pathlib

import numpy as np

from ffl_jax.data import base, images, originals
from ffl_jax.data.originals import Download

_HOST = "http://ufldl.stanford.edu/housenumbers"
_DOWNLOADS = [
    Download(
        f"{_HOST}/train_32x32.mat",
        182040794,
        "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    ),
    Download(
        f"{_HOST}/test_32x32.mat",
        64275384,
        "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    ),
]


@base.SOURCES.register("svhn_cropped")
def load(config):
    """Reads it from `config.data_dir`, from TFDS, or downloads it. Its extra images are not used."""
    return originals.load(config, _read, _DOWNLOADS, "both beside one another")


def _read(folder: pathlib.Path):
    if not (folder / "train_32x32.mat").is_file():
        return None
    return *(_split(folder / f"{name}_32x32.mat") for name in ("train", "test")), tuple(map(str, range(10)))


def _split(path: pathlib.Path) -> base.Split:
    import scipy.io

    with originals.damage_named(path):
        values = scipy.io.loadmat(io.BytesIO(images.read_file(path)), variable_names=["X", "y"])
        pixels, labels = values["X"].transpose(3, 0, 1, 2), values["y"].reshape(-1)
        return base.Split(np.ascontiguousarray(pixels), (labels % 10).astype(np.int32))  # the digit 0 is 10
