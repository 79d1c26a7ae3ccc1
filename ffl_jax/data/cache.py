"""Decoded datasets on disk, so that an image is decoded once and not at every start."""

import contextlib
import logging
import os
import pathlib
import re
import uuid
from collections.abc import Callable

import numpy as np

from ffl_jax.data import base
from ffl_jax.workdir.paths import cache_directory

Arrays = dict[str, np.ndarray]
_VERSION = "2"  # Part of every key: raise it when decoding changes, so that older files are not read.


def file_state(path: str | os.PathLike) -> str:
    """Size and times of a file. The change time cannot be set by hand: a restored old time is seen, too."""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def cached(name: str, source: str, cache_dir: str, build: Callable[[], Arrays]) -> Arrays:
    """Returns what `build()` returns, from the cache if it is there and undamaged.

    Args:
      name: a readable start for the file's name.
      source: states everything that the arrays depend on: files, their sizes and times, settings.
      cache_dir: as for `cache_directory`.
      build: makes the arrays; called if there is no cache file for this source or it is damaged. A cache that
        cannot be written costs a warning, never the run.
    """
    key = base.digest(_VERSION, source)
    try:
        path = cache_directory(cache_dir) / f"{re.sub('[^A-Za-z0-9._-]+', '-', name)}-{key[:16]}.npz"
        arrays = _read(path, key)
    except RuntimeError:  # There is no home folder.
        path, arrays = None, None
    if arrays is None:
        arrays = build()
        _write(path, key, arrays)
    return arrays


def _checksum(key: str, arrays: Arrays) -> str:
    return base.digest(key, *(part for name in sorted(arrays) for part in (name, arrays[name])))


def _read(path: pathlib.Path, key: str) -> Arrays | None:
    """The arrays of a cache file; None if it is missing, or damaged in any way."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays.pop("checksum")) != _checksum(key, arrays):
            raise ValueError("its checksum does not match its content")
    except Exception as error:  # Damage shows as zip, zlib, value, key or system errors.
        logging.warning("The cache file %s is damaged and is made again: %s", path, error)
        return None
    logging.info("Read %s", path)
    return arrays


def _write(path: pathlib.Path | None, key: str, arrays: Arrays):
    temporary = None
    try:
        if path is None:
            raise OSError("there is no home folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, checksum=np.array(_checksum(key, arrays)), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        logging.warning(
            "Cannot write the decoded dataset to %s (%s): it is decoded again at the next start. "
            "Set config.data.cache_dir to a folder with room.",
            path.parent if path else "a cache",
            error,
        )
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink()
