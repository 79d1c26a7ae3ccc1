"""Where this project lies, and where this machine keeps what can be made again. Light on imports."""

import hashlib
import os
import pathlib
import platform

ROOT = (
    pathlib.Path(__file__).resolve().parent.parent.parent
)  # of a clone; where it is installed, of all packages
# A wheel holds them inside the package.
CONFIGS = next(
    path for path in (ROOT / "configs", ROOT / "ffl_jax" / "configs") if (path / "digits.py").is_file()
)


def cache_directory(cache_dir: str = "") -> pathlib.Path:
    """The folder for cache files: `cache_dir`, else `$XDG_CACHE_HOME/ffl_jax`, else `~/.cache/ffl_jax`.

    It may be deleted at any time: everything in it is made again from its source.
    """
    if cache_dir:
        return pathlib.Path(cache_dir).expanduser()
    base_dir = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base_dir) if base_dir else pathlib.Path.home() / ".cache") / "ffl_jax"


def programs_directory() -> pathlib.Path:
    """The folder for compiled programs: one for each kind of processor, for some cannot run another's."""
    kind = platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind += "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
    except OSError:  # no Linux
        kind += platform.processor()
    return cache_directory() / f"programs-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
