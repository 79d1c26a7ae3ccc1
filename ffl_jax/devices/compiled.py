"""The cache of compiled programs, which JAX reads, writes, and never mends. Light on imports."""

import logging
import sys
import warnings
from pathlib import Path


def mend():
    """From now on, when JAX warns of its cache, damaged entries are removed, and one line is told, once.

    JAX itself compiles again where an entry is damaged, but leaves it there, and warns at every start.
    """
    show, told = warnings.showwarning, []

    def mended(message, category, filename, lineno, file=None, line=None):
        if getattr(sys.modules.get("jax._src.compiler"), "__file__", "") != filename:
            show(message, category, filename, lineno, file, line)
            return
        removed = _remove_damaged()
        if not told:
            told.append(message)
            what = f"{removed} damaged entries removed" if removed else str(message)
            logging.warning("Programs are compiled anew, for the cache of compiled ones fails: %s", what)

    warnings.showwarning = mended


def _remove_damaged() -> int:
    """How many entries of the cache were not whole."""
    import jax
    from jax._src import compilation_cache  # the format is known to nobody else

    removed = 0
    for entry in Path(jax.config.jax_compilation_cache_dir or "").glob("*-cache"):
        try:
            compilation_cache.decompress_executable(entry.read_bytes())
        except Exception:
            try:
                entry.unlink()
                removed += 1
            except OSError:  # a folder, or not ours
                continue
    return removed
