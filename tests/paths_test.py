"""Folders for what can be made again."""

import pathlib
import platform

from ffl_jax.workdir import paths


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(paths.cache_directory()) == "/x/ffl_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(paths.cache_directory()) == "/home/someone/.cache/ffl_jax"
    assert str(paths.cache_directory("~/c")) == "/home/someone/c"


def test_programs_of_another_processor_are_kept_apart(monkeypatch):
    """Its speed and its number of cores do not matter."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")

    def folder(cpuinfo):
        monkeypatch.setattr(pathlib.Path, "read_text", lambda path: cpuinfo)
        return paths.programs_directory()

    one = folder("flags\t: sse avx\ncpu MHz\t: 2000\n")
    assert one.parent == pathlib.Path("/x/ffl_jax")
    assert one == folder("flags\t: sse avx\ncpu MHz\t: 1999\n\nflags\t: sse avx\n")
    assert one != folder("flags\t: sse avx avx512f\n")
    monkeypatch.setattr(platform, "machine", lambda: "other")
    assert one != folder("flags\t: sse avx\n")
