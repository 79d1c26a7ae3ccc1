"""Files of a run that are replaced whole, and read whatever they hold."""

import itertools
import json
import logging
import os
import stat
from pathlib import Path

_LARGEST = 1 << 30  # bytes of a file that is read at once


def write_json(path: Path, values: dict):
    """Writes `values` so that a reader sees the old file or the new one, never a part."""
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes):
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    for place in (path, temporary):
        make_way(place)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """What `write_json` wrote; {} if the file is missing or not ours."""
    try:
        values = json.loads(read_bytes(path).decode())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def read_bytes(path: str | os.PathLike, most: int = _LARGEST) -> bytes:
    """The content of a plain file; OSError for all else, above all for a pipe, which would be waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a plain file")
        if status.st_size > most:
            raise OSError(f"{path} has {status.st_size} bytes, which no such file has")
        return file.read(status.st_size)  # some of /proc say 0, and wait or never end


def make_way(path: Path):
    """Sets aside what stands in the way of a plain file."""
    if os.path.lexists(path) and not path.is_file():
        set_aside(path)


def make_folder(path: Path):
    """Makes a folder inside a run's own; sets aside what stands in its way."""
    if os.path.lexists(path) and not path.is_dir():
        set_aside(path)
    path.mkdir(parents=True, exist_ok=True)


def free_name(path: Path) -> Path:
    """The path itself, or with the first number behind it that nothing has."""
    others = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not os.path.lexists(name))


def set_aside(path: Path):
    """Renames what is damaged to `NAME.damaged`, and says so."""
    target = free_name(path.with_name(f"{path.name}.damaged"))
    os.rename(path, target)
    logging.warning("%s is damaged: it is kept as %s and made anew.", path, target.name)
