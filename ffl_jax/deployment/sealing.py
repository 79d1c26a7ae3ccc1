"""Each exported file carries the SHA-256 of all its other bytes, and is read whole or not at all."""

import errno
import hashlib
import os
import stat
from pathlib import Path

from ffl_jax.errors import CheckpointError

KEY = "digest"  # of the metadata that holds the seal, where a format has keys
MAX_BYTES = 2**31  # of a file; no ONNX file can be larger
_MARK = b"ffl_jax sha256 "
_DIGITS = 64
# What a format writes in its metadata; `write` fills in the digits.
EMPTY = (_MARK + b"0" * _DIGITS).decode()
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def write(path: Path, data: bytes):
    """Writes the bytes of a file that holds `EMPTY`, sealed."""
    place = data.rindex(EMPTY.encode()) + len(_MARK)
    path.write_bytes(data[:place] + _digest(data, place) + data[place + _DIGITS :])


def check(data: bytes):
    """Raises CheckpointError unless it is what `write` wrote, to the bit: no parser sees anything else."""
    place = data.rfind(_MARK) + len(_MARK)
    if place < len(_MARK):
        raise CheckpointError(
            "it has no digest: an older version wrote it, or it is damaged; export it again."
        )
    if data[place : place + _DIGITS] != _digest(data, place):
        raise CheckpointError("it is not what was exported: card or weights have changed; export it again.")


def _digest(data, place) -> bytes:
    sha, view = hashlib.sha256(), memoryview(data)
    for part in (view[:place], b"0" * _DIGITS, view[place + _DIGITS :]):
        sha.update(part)
    return sha.hexdigest().encode()


def read_regular(path: str | os.PathLike, limit: int) -> bytes:
    """The bytes of a regular file; a pipe or a device could keep its reader waiting for ever.

    Raises:
      OSError: it cannot be read, is something else, or larger than `limit` bytes.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
    if status.st_size > limit:
        sizes = f"it has {status.st_size:,} bytes, and at most {limit:,} are read"
        raise OSError(errno.EFBIG, sizes, os.fspath(path))
    with open(path, "rb") as file:
        return file.read(status.st_size)
