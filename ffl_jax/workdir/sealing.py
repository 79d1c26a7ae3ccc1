"""Each exported file carries the SHA-256 of all its other bytes, and is read whole or not at all."""

import hashlib
from pathlib import Path

from ffl_jax.errors import CheckpointError

KEY = "digest"  # of the metadata that holds the seal, where a format has keys
MAX_BYTES = 2**31  # of a file; no ONNX file can be larger
_MARK = b"ffl_jax sha256 "
_DIGITS = 64
# What a format writes in its metadata; `write` fills in the digits.
EMPTY = (_MARK + b"0" * _DIGITS).decode()


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
