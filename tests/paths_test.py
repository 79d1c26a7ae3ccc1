"""Folders for what can be made again."""

import os
import pathlib
import platform
import pwd
import tempfile

from ffl_jax.workdir import paths


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(paths.cache_directory()) == "/x/ffl_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(paths.cache_directory()) == "/home/someone/.cache/ffl_jax"
    assert str(paths.cache_directory("~/c")) == "/home/someone/c"


def test_cache_folder_without_a_home(monkeypatch, tmp_path):
    """No HOME and no entry in /etc/passwd, as in some containers. A folder of another user is not taken."""

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for mode, same in ((0o700, True), (0o777, False)):
        paths._without_home.cache_clear()
        (tmp_path / f"ffl_jax-{os.getuid()}").mkdir(exist_ok=True)
        (tmp_path / f"ffl_jax-{os.getuid()}").chmod(mode)
        folder = paths.cache_directory()
        assert (folder == tmp_path / f"ffl_jax-{os.getuid()}") is same
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
    paths._without_home.cache_clear()
    assert str(paths.expanded("~/x")) == "~/x"


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
