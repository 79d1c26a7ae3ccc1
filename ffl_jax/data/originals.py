"""Datasets in the files that their authors publish: read where a user has them, or downloaded once."""

import contextlib
import gzip
import hashlib
import http.client
import io
import logging
import os
import pathlib
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ffl_jax.data import base, images, limits, tfds
from ffl_jax.errors import DatasetError
from ffl_jax.workdir.paths import cache_directory, expanded

_ATTEMPTS = 5
_TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Download:
    """A file of the authors: its address, size in bytes, and SHA-256."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


class Files:
    """Files by name, of a folder, or of a `.tar.gz` archive, all of which is read and checked first."""

    def __init__(self, path: pathlib.Path):
        """Raises DatasetError where an archive is damaged."""
        self.path = path
        self._members = None
        if not path.is_dir():
            with damage_named(path), tarfile.open(fileobj=io.BytesIO(unzip(path))) as archive:
                members = {pathlib.PurePath(one.name).name: one for one in archive if one.isfile()}
                self._members = {name: archive.extractfile(one).read() for name, one in members.items()}

    def read(self, name: str) -> bytes:
        """Raises DatasetError where there is no such file."""
        try:
            return images.read_file(self.path / name) if self._members is None else self._members[name]
        except (FileNotFoundError, KeyError) as error:
            raise DatasetError(
                f"{self.path} has no {name}: unpack or download it again, all of it."
            ) from error


def load(config, read: Callable[[pathlib.Path], tuple | None], downloads: Sequence[Download], layout: str):
    """Reads a dataset from the first place that has it.

    These are the folders `config.data_dir` and `config.manual_dir`, what TFDS has prepared, and a folder in
    the cache, to which it is downloaded if need be.

    Args:
      config: the `data` section.
      read: of its images [N, H, W, 3], a folder -> (train split, test split, class names), None where its
        files are not in it.
      downloads: what is put into a folder for `read`.
      layout: what else a folder may hold, for errors.
    """
    for key in ("data_dir", "manual_dir"):
        if config[key] and (found := read(expanded(config[key]))):
            return _sized(config, *found)
    home = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    prepared = expanded(config.data_dir or home) / config.name
    if any(prepared.glob("*/dataset_info.json")):
        return tfds.load(config)
    names = ", ".join(one.name for one in downloads)
    if config.data_dir:
        raise DatasetError(
            f"config.data.data_dir {config.data_dir} has no {config.name}: it must hold {names}, {layout}, "
            "or what TFDS prepares; leave it empty to download the dataset."
        )
    folder = cache_directory(config.cache_dir) / "downloads" / config.name
    for one in downloads:
        fetch(one, folder, f"put {names}, or {layout}, into a folder, and name that by config.data.data_dir")
    return _sized(config, *read(folder))


def _sized(config, train, test, class_names):
    train, test = (
        base.Split(images.resize_all(split.images, config.image_size, config.name), split.labels)
        for split in (train, test)
    )
    return train, test, class_names


@contextlib.contextmanager
def damage_named(path: pathlib.Path):
    """Turns what goes wrong while a file is taken apart inside into one line."""
    try:
        yield
    except DatasetError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        zlib.error,
        tarfile.TarError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{path} is damaged: {reason}; download it again.") from error


def unzip(path: pathlib.Path) -> bytes:
    """The content of a `.gz` file, whose checksum holds."""
    with damage_named(path), gzip.open(io.BytesIO(images.read_file(path))) as file:
        content = file.read(limits.MAX_FILE_BYTES + 1)
        if len(content) > limits.MAX_FILE_BYTES:
            raise ValueError(f"it unpacks to more than {limits.MAX_FILE_BYTES / 1e9:.1f} GB")
        return content


def fetch(one: Download, folder: pathlib.Path, otherwise: str):
    """Downloads a file to a folder, unless it is there. What has come of it is kept when that breaks off.

    Args: otherwise: what a user can do who has no network, for the error.

    Raises:
      DatasetError: it cannot be had, or is not what its authors published.
      OSError: it cannot be written.
    """
    import fcntl  # here and below, for `predict` needs none of it, and runs where some is missing

    path, part = folder / one.name, folder / f"{one.name}.part"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(part, "a+b") as file:
        with contextlib.suppress(OSError):  # some file systems know no locks
            fcntl.flock(file, fcntl.LOCK_EX)  # Of several processes one downloads, the others wait.
        if path.exists():
            return
        for attempt in range(_ATTEMPTS):
            time.sleep(0 if not attempt else 2**attempt / 2)
            reason = _append(one, file)
            file.seek(0)
            if not reason and hashlib.file_digest(file, "sha256").hexdigest() == one.sha256:
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, path)
                logging.info("Downloaded %s", path)
                return
            if not reason:
                reason = "what came is not what its authors published"
                file.truncate(0)
    raise DatasetError(f"Cannot download {one.url}: {reason}. Try again later, or {otherwise}.")


def _append(one: Download, file) -> str:
    """Appends what is missing of it to a file; returns why that was not all, or ""."""
    import tqdm

    there = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(one.url, headers={"Range": f"bytes={there}-"} if there else {})
    failures = (OSError, http.client.HTTPException, ValueError)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is nothing behind what is there already
            file.truncate(0)
        return f"the server says {error.code} {error.reason}"
    except failures as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    with response, tqdm.tqdm(total=one.size, unit="B", unit_scale=True, desc=one.name, disable=None) as bar:
        if response.status != 206:  # It sends all of it.
            there = file.truncate(0)
        bar.update(there)
        while there < one.size:
            try:
                piece = response.read(min(2**18, one.size - there))
            except failures as error:
                return str(error) or type(error).__name__
            if not piece:
                return f"the connection ended after {there} of {one.size} bytes"
            there += file.write(piece)
            bar.update(len(piece))
    return ""
