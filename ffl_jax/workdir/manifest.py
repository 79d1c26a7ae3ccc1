"""The manifest of a folder: size and SHA-256 of each file, to find damage before anything is loaded."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

NAME = "MANIFEST.json"
FORMAT = 1


def seal(folder: Path, step: int) -> None:
    """Writes the manifest of checkpoint `step`, and sees to it that the whole folder is on disk."""
    files = {}
    for path, size in _sizes(folder).items():
        fsync(folder / path)
        files[path] = [size, _sha256(folder / path)]
    (folder / NAME).write_text(_text(step, files))
    fsync(folder / NAME)
    for parent, _, _ in os.walk(folder, topdown=False):
        fsync(parent)


def problem(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with the step in `folder`, naming the file; None if all is as it was sealed.

    Args:
      folder: named by its step.
      contents: compare contents too, not only names and sizes. Links are refused before anything is opened.
    """
    try:
        if folder.is_symlink():
            return "the step is a link"
        sizes = _sizes(folder)
        if sizes.pop(NAME, None) is None:
            return f"{NAME} is missing"
        text = (folder / NAME).read_text()
        files = json.loads(text)["files"]
        if text != _text(int(folder.name), files):
            return f"{NAME} is damaged, or of another step or version"
        for path in sorted(sizes.keys() | files.keys()):
            if path not in sizes:
                return f"{path} is missing"
            if path not in files:
                return f"{path} does not belong to it"
            size, digest = files[path]
            if sizes[path] != size:
                return f"{path} has {sizes[path]} bytes instead of {size}"
            if contents and _sha256(folder / path) != digest:
                return f"{path} has changed"
    except OSError as error:
        return str(error)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{NAME} is damaged"
    return None


def fsync(path: str | os.PathLike) -> None:
    """Forces a file, or the names in a folder, to disk, where the file system knows how to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _text(step: int, files: dict[str, list]) -> str:
    """The one way to write it: any other byte is damage."""
    return json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1, sort_keys=True)


def _sizes(folder: Path, prefix: str = "") -> dict[str, int]:
    """{relative path: bytes} of the files below `folder`; OSError on a link, a pipe or a socket."""
    sizes = {}
    for path in folder.iterdir():
        name, status = f"{prefix}{path.name}", path.lstat()
        if stat.S_ISDIR(status.st_mode):
            sizes |= _sizes(path, f"{name}/")
        elif stat.S_ISREG(status.st_mode):
            sizes[name] = status.st_size
        else:
            raise OSError(f"{name} is a link or not a plain file")
    return sizes


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
