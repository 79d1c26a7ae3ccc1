"""The Dockerfile and what .dockerignore lets through; docs/launch.md says how it was tried."""

import fnmatch
import re
import subprocess
import tomllib

from conftest import ROOT

from ffl_jax import main


def lets_through(path):
    """Docker's rule: the last pattern that matches the path, or a folder that it is in, counts."""
    folders = [str(one) for one in (path, *path.parents)][:-1]
    seen = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            anywhere = line.removeprefix("!").startswith("**/")
            names = [name.rpartition("/")[2] for name in folders] if anywhere else folders
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                seen = line.startswith("!")
    return seen


def test_all_that_is_installed_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tool = project["tool"]["setuptools"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    for package in tool["packages"]:
        source = ROOT / tool["package-dir"].get(package, package.replace(".", "/"))
        for pattern in ("*.py", *tool["package-data"].get(package, ())):
            needed |= {str(path.relative_to(ROOT)) for path in source.glob(pattern)}
    tops = [path for path in ROOT.iterdir() if path.name not in (".git", ".venv", "runs")]
    there = [path for top in tops for path in (top, *top.rglob("*")) if path.is_file()]
    there = [path.relative_to(ROOT) for path in there]
    assert {str(path) for path in there if lets_through(path)} == needed
    for name in (".git/config", ".venv/bin/python", "runs/a/summary.json", "ffl_jax/data/__pycache__/a.pyc"):
        assert not lets_through((ROOT / name).relative_to(ROOT))


def test_the_file():
    """It installs what it copies, with the extras that are asked for, and does not run as root."""
    text = re.sub(r"^ *#.*\n| *\\\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    names = [name for name, _ in steps]
    assert names == ["ARG", "FROM", "ARG", "COPY", "RUN", "WORKDIR", "USER", "CMD"]
    said = dict(steps[2:])
    assert said["COPY"].split() == [".", "/source"]
    assert said["USER"] == "1000"
    assert said["CMD"] == f'["python", "-m", "{main.__name__}"]'
    (shell,) = re.findall(r'pip install "([^"]+)"', said["RUN"])
    for extras, expected in (("", "/source"), ("cuda,onnx", "/source[cuda,onnx]")):
        result = subprocess.run(
            ["sh", "-c", f'EXTRAS={extras}; echo "{shell}"'], capture_output=True, text=True
        )
        assert result.stdout.strip() == expected
