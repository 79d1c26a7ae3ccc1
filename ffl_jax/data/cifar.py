"""CIFAR-10 and CIFAR-100 in their original files: Python and binary version, packed or unpacked."""

import functools
import io
import pathlib
import pickle
from dataclasses import dataclass

import numpy as np

from ffl_jax.data import base, originals
from ffl_jax.data.originals import Download, Files

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class Version:
    """How one version of a dataset is laid out.

    Attributes:
      folder: of its files; the archive has the same name.
      archive: its name.
      train, test, names: the files of the splits and of the class names.
      labels, class_names: the keys of the Python version's dictionaries; of the binary version, which of
        the bytes before an image is its label, and how many there are.
    """

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    names: str
    labels: bytes | int
    class_names: bytes | int

    def read(self, files: Files) -> tuple[base.Split, base.Split, tuple[str, ...]]:
        """(train, test, class names)."""
        splits, parse = [], _binary if isinstance(self.labels, int) else _python
        for names in (self.train, (self.test,)):
            parts = []
            for name in names:
                with originals.damage_named(files.path / name):
                    parts.append(parse(files.read(name), self.labels, self.class_names))
            pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            pixels = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
            splits.append(base.Split(np.ascontiguousarray(pixels), labels.astype(np.int32)))
        with originals.damage_named(files.path / self.names):
            content = files.read(self.names)
            if isinstance(self.labels, int):
                class_names = content.split()
            else:
                class_names = _unpickle(content)[self.class_names]
            return *splits, tuple(name if isinstance(name, str) else name.decode() for name in class_names)


_VERSIONS = {
    "cifar10": (
        Version(
            *("cifar-10-batches-py", "cifar-10-python.tar.gz"),
            *(tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
            *(b"labels", b"label_names"),
        ),
        Version(
            *("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
            *(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", 0, 1),
        ),
    ),
    "cifar100": (
        Version(
            *("cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "meta"),
            *(b"fine_labels", b"fine_label_names"),
        ),
        Version(
            *("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), "test.bin"),
            *("fine_label_names.txt", 1, 2),
        ),
    ),
}
_DOWNLOADS = {
    "cifar10": Download(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170052171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    "cifar100": Download(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        168513733,
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
}


@base.SOURCES.register("cifar10", "cifar100")
def load(config):
    """Reads them from `config.data_dir`, packed or unpacked, from TFDS, or downloads them."""
    versions = _VERSIONS[config.name]
    layout = f"{versions[0].archive}, or the folder {' or '.join(version.folder for version in versions)}"
    return originals.load(config, functools.partial(_read, versions), [_DOWNLOADS[config.name]], layout)


def _read(versions, folder: pathlib.Path):
    for version in versions:  # unpacked, or named itself; then packed
        for place in (folder / version.folder, folder):
            if (place / version.test).is_file() and (place / version.train[0]).exists():
                return version.read(Files(place))
    for version in versions:
        for place in (folder / version.archive, folder):
            if place.is_file() and place.name == version.archive:
                return version.read(Files(place))
    return None


def _python(content: bytes, labels_key: bytes, _) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(content)
    pixels, labels = batch[b"data"].array, np.array(batch[labels_key])
    if pixels.shape != (len(labels), _PIXELS) or labels.dtype.kind != "i":
        raise ValueError(f"it has pixels {pixels.shape} and {labels.dtype} labels {labels.shape}")
    return pixels, labels


def _binary(content: bytes, place: int, before: int) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % (before + _PIXELS):
        raise ValueError(f"its {len(content)} bytes are not a whole number of images")
    rows = np.frombuffer(content, np.uint8).reshape(-1, before + _PIXELS)
    return rows[:, before:], rows[:, place]


class _Array:
    """Stands for NumPy's arrays in a pickle: takes 8-bit numbers from it, and nothing else."""

    def __init__(self, *_):
        self.array = np.zeros(0, np.uint8)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if dtype.name not in ("u1", b"u1") or not isinstance(data, bytes):
            raise ValueError(f"it holds numbers of type {dtype.name}")
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Type:
    """Stands for NumPy's types of numbers."""

    def __init__(self, name="", *_):
        self.name = name

    def __setstate__(self, state):
        pass


def _from_buffer(data, dtype, shape, order) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


# For what files that Python 2 or 3 wrote, by any protocol, ask.
_STANDS_FOR = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}
for _core in ("numpy.core", "numpy._core"):
    _STANDS_FOR |= {(f"{_core}.multiarray", "_reconstruct"): _Array}
    _STANDS_FOR |= {(f"{_core}.numeric", "_frombuffer"): _from_buffer}


class _Unpickler(pickle.Unpickler):
    """Makes dictionaries, lists, text, numbers, and what stands for NumPy's arrays: it runs no other code."""

    def find_class(self, module, name):
        if (module, name) not in _STANDS_FOR:
            raise ValueError(f"it asks for {module}.{name}, which no file of CIFAR does")
        return _STANDS_FOR[module, name]


def _unpickle(content: bytes) -> dict:
    try:
        values = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except (pickle.UnpicklingError, AttributeError, MemoryError, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no pickle of CIFAR ({error})") from error
    if not isinstance(values, dict):
        raise ValueError("it is no dictionary")
    return {key.encode() if isinstance(key, str) else key: value for key, value in values.items()}
