"""Decoded datasets on disk, so that an image is decoded once and not at every start."""

import collections
import contextlib
import dataclasses
import datetime
import logging
import os
import pathlib
import re
import time
import uuid
from collections.abc import Callable

import numpy as np

from ffl_jax.data import base
from ffl_jax.workdir.paths import cache_directory

Arrays = dict[str, np.ndarray]
_VERSION = "3"  # Part of every key: raise it when decoding changes, so that older files are not read.
_OURS = re.compile(r".*-[0-9a-f]{16}(\.[0-9a-f]{32})?\.(npz|tmp)")
_ABANDONED = 3600.0  # seconds after which an unfinished file that nobody writes is nobody's
_in_use = collections.deque()  # open files, whose locks last as long as this process, however it ends
_MOST_IN_USE = 32  # far more than a training has


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file of the cache: its size in bytes, when it was last used (s since 1970), and whether it is now."""

    path: pathlib.Path
    size: int
    used: float
    in_use: bool

    def __str__(self):
        day = datetime.datetime.fromtimestamp(self.used).isoformat(" ", "minutes")
        return f"{self.path.name}: {self.size / 1e9:.3f} GB, last used {day}" + ", in use" * self.in_use


def file_state(path: str | os.PathLike) -> str:
    """Size and times of a file. The change time cannot be set by hand: a restored old time is seen, too."""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def cached(
    name: str, source: str, cache_dir: str, build: Callable[[], Arrays], gigabytes: float = 50.0
) -> Arrays:
    """Returns what `build()` returns, from the cache if it is there and undamaged.

    Args:
      name: a readable start for the file's name.
      source: states everything that the arrays depend on: files, their sizes and times, settings.
      cache_dir: as for `cache_directory`.
      build: makes the arrays; called if there is no cache file for this source or it is damaged. A cache that
        cannot be written costs a warning, never the run.
      gigabytes: of all files together; those that were not used for the longest time make room for a new one.
    """
    key = base.digest(_VERSION, source)
    try:
        path = cache_directory(cache_dir) / f"{re.sub('[^A-Za-z0-9._-]+', '-', name)}-{key[:16]}.npz"
        arrays = _read(path, key)
    except RuntimeError:  # There is no home folder.
        path, arrays = None, None
    if arrays is None:
        arrays = build()
        _write(path, key, arrays, gigabytes)
    return arrays


def entries(folder: pathlib.Path) -> list[Entry]:
    """The files of decoded images in a folder, those that were used last first; others are not ours."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # gone meanwhile
                if _OURS.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                    state = path.stat()
                    found.append(Entry(path, state.st_size, state.st_mtime, _is_locked(path)))
    return sorted(found, key=lambda one: -one.used)


def prune(folder: pathlib.Path, gigabytes: float, spared: pathlib.Path | None = None) -> list[Entry]:
    """Removes files of decoded images until at most so many gigabytes are left, and what was never finished.

    Those that were not used for the longest time go first, and none that a running program has loaded.

    Returns: what was removed.
    """
    there, gone = entries(folder), []
    total = sum(one.size for one in there)
    for one in reversed(there):
        unfinished = one.path.suffix == ".tmp" and time.time() - one.used > _ABANDONED
        over = total > gigabytes * 1e9 and one.path.suffix == ".npz"
        if (unfinished or over) and not one.in_use and one.path != spared:
            with contextlib.suppress(OSError):
                one.path.unlink()
                gone.append(one)
                total -= one.size
    return gone


def _is_locked(path: pathlib.Path) -> bool:
    import fcntl  # here and below, for `predict` needs none of it, and runs where it is missing

    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # some file systems know no locks
            pass
    return False


def _hold(file):
    """Says to all others that this process uses an open file: it must be there when a run continues."""
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH)
        _in_use.append(os.fdopen(os.dup(file.fileno()), "rb"))
    while len(_in_use) > _MOST_IN_USE:
        _in_use.popleft().close()


def _checksum(key: str, arrays: Arrays) -> str:
    return base.digest(key, *(part for name in sorted(arrays) for part in (name, arrays[name])))


def _read(path: pathlib.Path, key: str) -> Arrays | None:
    """The arrays of a cache file; None if it is missing, or damaged in any way."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return None
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            if str(arrays.pop("checksum")) != _checksum(key, arrays):
                raise ValueError("its checksum does not match its content")
            _hold(opened)
            with contextlib.suppress(OSError):  # another user's, perhaps
                os.utime(path)
    except Exception as error:  # Damage shows as zip, zlib, value, key or system errors.
        logging.warning("The cache file %s is damaged and is made again: %s", path, error)
        return None
    logging.info("Read %s", path)
    return arrays


def _write(path: pathlib.Path | None, key: str, arrays: Arrays, gigabytes: float):
    if not gigabytes:
        return
    temporary = None
    size = sum(array.nbytes for array in arrays.values())
    try:
        if path is None:
            raise OSError("there is no home folder")
        if size > gigabytes * 1e9:
            raise OSError(f"it takes {size / 1e9:.1f} GB, and config.data.cache_gigabytes={gigabytes:g}")
        path.parent.mkdir(parents=True, exist_ok=True)
        prune(path.parent, gigabytes - size / 1e9, spared=path)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, checksum=np.array(_checksum(key, arrays)), **arrays)
            file.flush()
            os.fsync(file.fileno())
            _hold(file)
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
