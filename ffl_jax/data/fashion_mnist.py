"""Fashion-MNIST in its four original files, IDX with or without gzip (arXiv 1708.07747)."""

import pathlib

import numpy as np

from ffl_jax.data import base, images, originals
from ffl_jax.data.originals import Download

# Of its README, in the order of the labels; as TFDS spells them.
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"),
    "Ankle boot",
)
_SPLITS = {"train": "train", "test": "t10k"}
_KINDS = {"images-idx3-ubyte": 3, "labels-idx1-ubyte": 1}  # how many axes its array has
_HOST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_DOWNLOADS = [
    Download(f"{_HOST}/{name}.gz", size, sha256)
    for name, size, sha256 in (
        (
            "train-images-idx3-ubyte",
            26421880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        (
            "train-labels-idx1-ubyte",
            29515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        (
            "t10k-images-idx3-ubyte",
            4422102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        ("t10k-labels-idx1-ubyte", 5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    )
]


@base.SOURCES.register("fashion_mnist")
def load(config):
    """Reads it from `config.data_dir`, from TFDS, or downloads it."""
    return originals.load(config, _read, _DOWNLOADS, "the same without .gz")


def _read(folder: pathlib.Path):
    if not any((folder / f"train-images-idx3-ubyte{suffix}").is_file() for suffix in ("", ".gz")):
        return None
    splits = []
    for name in _SPLITS.values():
        grey, labels = (_array(folder, f"{name}-{kind}", axes) for kind, axes in _KINDS.items())
        splits.append(base.Split(np.repeat(grey[..., None], 3, axis=-1), labels.astype(np.int32)))
    return *splits, CLASSES


def _array(folder: pathlib.Path, name: str, axes: int) -> np.ndarray:
    """An array of bytes as IDX has it: 0, 0, 8, the number of axes, their lengths, the numbers."""
    path = folder / name
    with originals.damage_named(path):
        content = images.read_file(path) if path.is_file() else originals.unzip(folder / f"{name}.gz")
        shape = np.frombuffer(content[4 : 4 + 4 * axes], ">u4")
        if content[:4] != bytes((0, 0, 8, axes)):
            raise ValueError(f"it is no IDX file of {axes} axes")
        return np.frombuffer(content[4 + 4 * axes :], np.uint8).reshape([int(length) for length in shape])
