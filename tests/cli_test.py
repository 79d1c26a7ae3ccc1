"""What every command shares."""

import os
import sys

import pytest

from ffl_jax import cli, errors
from ffl_jax.workdir import paths


@pytest.mark.parametrize(
    ("setting", "tunables", "expected"),
    [
        ("always [madvise] never", "", "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),  # the user's choice, or begun anew before
        ("[always] madvise never", "", None),
        ("always madvise [never]", "", None),
    ],
)
def test_a_command_begins_anew_with_huge_pages(setting, tunables, expected, monkeypatch):
    """The same command line, once, and only where the kernel gives such pages on request."""
    monkeypatch.setattr(cli.Path, "read_text", lambda path: setting)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    begun = []
    monkeypatch.setattr(os, "execv", lambda *arguments: begun.append(arguments))
    cli._use_huge_pages()
    again = (sys.executable, [sys.executable, *sys.orig_argv[1:]])
    assert begun == ([again] if expected else [])
    assert os.environ["GLIBC_TUNABLES"] == (expected or tunables)


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/y")
    cli._keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/y"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli._keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(paths.programs_directory())
    assert paths.programs_directory().is_dir()


def test_a_cache_that_cannot_be_written_is_left_alone(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/there/is/none")
    cli._keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize(("huge_pages", "expected"), [(False, ""), (True, "anew\n")])
def test_only_what_trains_begins_anew_and_any_terminal_will_do(huge_pages, expected, commands):
    """One that knows ASCII alone, as under LC_ALL=C of some systems, shows other characters escaped."""
    script = "from ffl_jax import cli; cli._use_huge_pages = lambda: print('anew'); "
    script += f"cli.run(lambda argv: print('97.1 ± 0.2 – \\udcff'), huge_pages={huge_pages})"
    result = commands.run("-c", script, env={"PYTHONIOENCODING": "ascii"})
    assert result.stdout == expected + "97.1 \\xb1 0.2 \\u2013 \\udcff\n"


@pytest.mark.parametrize("code", [0, 1, "bye"])
def test_who_else_ends_the_process_is_no_success(code, commands):
    script = f"import sys; from ffl_jax import cli; cli.run(lambda argv: sys.exit({code!r}))"
    result = commands.run("-c", script, code=2)
    assert result.stderr == f"error: a module called sys.exit({code!r}): only the command ends itself.\n"


def test_the_folder_it_is_started_in_may_be_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OSError, match="No such file") as gone:
        os.getcwd()
    assert str(errors.of_system(gone.value)).startswith("cannot use the current folder: it is gone;")
