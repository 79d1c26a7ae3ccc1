"""NumPy archives of images and labels, as MedMNIST, Keras and many others write them: FILE.npz."""

import io
import logging
import math
import pathlib
import unicodedata
import zipfile

import numpy as np

from ffl_jax.data import base, images, limits, roles
from ffl_jax.errors import ConfigError, DatasetError, FFLError

_NAMES = (("{}_images", "{}_labels"), ("x_{}", "y_{}"))
_HEADER_BYTES = 10_000  # that NumPy itself reads of one, before it asks
_MOST_DEFLATED = 1032  # bytes that one may become
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_REMEDY = "write it again with numpy.savez"


@base.FILES.register(".npz")
def load(config, path: pathlib.Path):
    """Reads `train_images` and `train_labels`, or `x_train` and `y_train`, and so on for `roles.SPLITS`.

    Images are uint8, [N, H, W], [N, H, W, 1] or [N, H, W, 3], or greys in uint16, scaled by
    `config.max_value`; labels are numbers or texts, [N] or [N, 1]. Classes are called by their labels and
    sorted, numbers by value. Nothing is unpickled, and headers are looked at before memory is taken.
    """
    roles.refuse_keys(config, path)
    if config.streaming:
        raise ConfigError(f"{path} is always held in memory: set config.data.streaming=False.")
    images.check_regular(path, path.stat(), limits.MAX_ARRAY_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:
            return _load(config, path, archive)
    except (FFLError, MemoryError):
        raise
    except Exception as error:  # Damage shows as zip, zlib, value, key or system errors.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{path} cannot be read: {reason}; {_REMEDY}.") from error


def _load(config, path, archive):
    members = {one.filename.removesuffix(".npy").casefold(): one for one in archive.infolist()}
    found = {}
    for split in roles.SPLITS:
        for names in _NAMES:
            pair = [name.format(split) for name in names]
            there = [name for name in pair if name in members]
            if len(there) == 1 and split == "train":
                raise DatasetError(f"{path} has {there[0]}, but of {' and '.join(pair)} both are needed.")
            if len(there) == 2:  # others lack labels perhaps, as of a contest
                found.setdefault(split, pair)
    if "train" not in found:
        pairs = " or ".join(" and ".join(names).format("train", "train") for names in _NAMES)
        raise DatasetError(f"{path} has no {pairs}: it has {roles.some(sorted(members)) or 'nothing'}.")
    beside = members.keys() - {name for pair in found.values() for name in pair}
    if beside:
        logging.warning("Arrays of %s that are not used: %s.", path, roles.some(sorted(beside)))
    chosen = roles.choose(config, path, found, found, "Splits")
    arrays = {
        split: [_Array(path, archive, members[name]) for name in found[split]] for split in chosen.values()
    }
    needed = sum(3 * pixels.size + labels.size for pixels, labels in arrays.values())
    base.check_memory(needed, str(path))
    for pixels, labels in arrays.values():
        _check_shapes(pixels, labels)
    read = {split: (pixels.pixels(config), labels.labels()) for split, (pixels, labels) in arrays.items()}
    names = tuple(map(str, np.unique(read["train"][1]).tolist()))
    label_of, splits = {name: label for label, name in enumerate(names)}, []
    for split, (pixels, labels) in read.items():
        texts = list(map(str, labels.tolist()))
        roles.check_classes(config, path, split, names, set(texts))
        splits.append(base.Split(pixels, np.array([label_of[text] for text in texts], np.int32)))
    train, test, *validation = splits if len(splits) > 1 else (*splits, None)
    return train, test, names, *validation


class _Array:
    """An array of an archive, of which no more than the header is read at first.

    Attributes: shape; dtype; size: bytes in memory; where: for errors.
    """

    def __init__(self, path, archive, member):
        """Raises DatasetError for one that would have to be unpickled, or is not of the size that it says."""
        self._archive, self._member = archive, member
        self.where = f"{member.filename.removesuffix('.npy')} of {path}"
        with archive.open(member) as file:
            head = io.BytesIO(file.read(_HEADER_BYTES))
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{self.where} is packed as NumPy does not")
        version = np.lib.format.read_magic(head)
        if version not in _READERS:
            raise ValueError(f"{self.where} is of version {version} of NumPy's format")
        self.shape, _, self.dtype = _READERS[version](head)
        if self.dtype.hasobject:
            raise DatasetError(
                f"{self.where} holds pickled objects, which could run anything and are not read: save it as "
                "whole numbers or texts, of one shape."
            )
        self.size = math.prod(self.shape) * self.dtype.itemsize
        packed = member.compress_size * (_MOST_DEFLATED if member.compress_type else 1)
        if self.size + head.tell() != member.file_size or member.file_size > max(packed, _MOST_DEFLATED):
            raise ValueError(f"{self.where} is not as large as it says")

    def _read(self) -> np.ndarray:
        with self._archive.open(self._member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):  # at the end the checksum is looked at
                raise ValueError(f"{self.where} is larger than it says")
        return array

    def pixels(self, config) -> np.ndarray:
        """uint8 [N, H, W, 3], brought to the size that the configuration says."""
        array = self._read()
        if self.dtype == np.uint16:
            try:
                array = np.stack([images.grey_levels(one, config.max_value) for one in array])
            except ValueError as error:
                raise DatasetError(f"{self.where} cannot be used: {error}.") from error
        if array.ndim == 3:
            array = array[..., None]
        array = np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:3], 3)))
        return images.resize_all(array, config.image_size, self.where)

    def labels(self) -> np.ndarray:
        """[N] of numbers or of texts."""
        labels = self._read().reshape(-1)
        if self.dtype.kind == "U":
            labels = np.array([unicodedata.normalize("NFC", text) for text in labels.tolist()])
        return labels


def _check_shapes(pixels: _Array, labels: _Array):
    """Raises DatasetError unless these are images and their labels, one each."""
    shape, count = list(pixels.shape), len(pixels.shape) and pixels.shape[0]
    fine = pixels.dtype == np.uint8 and (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3)))
    fine |= pixels.dtype == np.uint16 and (len(shape) == 3 or (len(shape) == 4 and shape[3] == 1))
    if not fine:
        first = " Channels come last: array.transpose(0, 2, 3, 1)." if shape[1:2] in ([1], [3]) else ""
        raise DatasetError(
            f"{pixels.where} is {pixels.dtype} {shape}: images must be uint8, 0 to 255, [N, H, W], "
            f"[N, H, W, 1] or [N, H, W, 3], or greys in uint16.{first}"
        )
    if count and not 0 < shape[1] * shape[2] <= limits.MAX_PIXELS:
        most = f"{limits.MAX_PIXELS / 1e6:.0f} million"
        raise DatasetError(f"{pixels.where} has {shape[2]}x{shape[1]} pixels; 1 to {most} are allowed.")
    if len(labels.shape) == 2 and labels.shape[1] != 1:
        raise DatasetError(
            f"{labels.where} has {labels.shape[1]} values for each image (several labels, or one-hot): one "
            "label is needed, [N] or [N, 1]; for one-hot ones save array.argmax(axis=1)."
        )
    if labels.dtype.kind not in "biuU" or labels.shape not in ((count,), (count, 1)):
        raise DatasetError(
            f"{labels.where} is {labels.dtype} {list(labels.shape)}: labels must be whole numbers or texts, "
            f"one for each of the {count} images of {pixels.where}."
        )
