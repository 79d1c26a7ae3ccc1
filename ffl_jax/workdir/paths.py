"""Where this project lies, and where this machine keeps what can be made again. Light on imports."""

import functools
import hashlib
import os
import pathlib
import platform
import tempfile

ROOT = (
    pathlib.Path(__file__).resolve().parent.parent.parent
)  # of a clone; where it is installed, of all packages
# A wheel holds them inside the package.
CONFIGS = next(
    path for path in (ROOT / "configs", ROOT / "ffl_jax" / "configs") if (path / "digits.py").is_file()
)


def cache_directory(cache_dir: str = "") -> pathlib.Path:
    """The folder for cache files: `cache_dir`, else `$XDG_CACHE_HOME/ffl_jax`, else `~/.cache/ffl_jax`.

    It may be deleted at any time: everything in it is made again from its source. A user without a home
    folder, as in some containers, has one among the temporary files.
    """
    if cache_dir:
        return expanded(cache_dir)
    base_dir = os.environ.get("XDG_CACHE_HOME")
    if base_dir:
        return pathlib.Path(base_dir) / "ffl_jax"
    home = expanded("~")
    return home / ".cache" / "ffl_jax" if home.is_absolute() else _without_home()


def expanded(path: str | os.PathLike) -> pathlib.Path:
    """A path with the home folder for `~`, which stays as it is where there is none."""
    return pathlib.Path(os.path.expanduser(path))


@functools.cache
def _without_home() -> pathlib.Path:
    """One for all programs of this user if it is truly theirs, for what is in it is run; else a new one."""
    folder = pathlib.Path(tempfile.gettempdir()) / f"ffl_jax-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid == os.getuid() and status.st_mode & 0o777 == 0o700:
            return folder
    except OSError:
        pass
    return pathlib.Path(tempfile.mkdtemp(prefix="ffl_jax-"))


def programs_directory() -> pathlib.Path:
    """The folder for compiled programs: one for each kind of processor, for some cannot run another's."""
    kind = platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind += "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
    except OSError:  # no Linux
        kind += platform.processor()
    return cache_directory() / f"programs-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
