"""As from an installed wheel: what `pyproject.toml` names is all that is there, and the folder is another."""

import re
import shutil
import tomllib

import pytest
import yaml
from conftest import ROOT

import ffl_jax

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What goes into the wheel."""
    folder, tool = tmp_path_factory.mktemp("installed"), PROJECT["tool"]["setuptools"]
    for package in tool["packages"]:
        source = ROOT / tool["package-dir"].get(package, package.replace(".", "/"))
        for pattern in ("*.py", *tool["package-data"].get(package, ())):
            for path in source.glob(pattern):
                (folder / package.replace(".", "/")).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / package.replace(".", "/") / path.name)
    return folder


def test_nothing_is_missing(installed):
    """All that the package holds in the repository."""
    there = {path.relative_to(ROOT) for path in (ROOT / "ffl_jax").rglob("*") if path.is_file()}
    there = {path for path in there if path.suffix != ".pyc"}
    assert there <= {path.relative_to(installed) for path in installed.rglob("*")}


def test_a_configuration_of_ones_own_in_any_folder(installed, commands, tmp_path):
    """It builds on this project's, and has the same name for its folder."""
    (tmp_path / "configs").mkdir()
    text = (
        "from configs import common, digits\ndef get_config(arg=None):\n    return digits.get_config(arg)\n"
    )
    (tmp_path / "configs" / "mine.py").write_text(text)
    script = "import ffl_jax, sys; from ffl_jax import doctor; doctor.run()"
    arguments = ("-c", script, "--config=configs/mine.py:method=dml,network=resnet8", "--config.epochs=3")
    result = commands.run(*arguments, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert "dml with resnet8 + resnet8, 3 epochs" in result.stdout
    arguments = ("-m", "ffl_jax.main", "--config=configs/cifar.py")
    result = commands.run(*arguments, code=2, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert "did you mean configs/cifar10.py or" in result.stderr


def test_one_version_everywhere():
    """The package's, the newest of the changes, and the one to cite; Pythons that the set-up looks for."""
    (newest, *_) = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == cited["version"] == ffl_jax.__version__
    assert cited["license"] == PROJECT["project"]["license"]
    looked_for = re.findall(r"python(3\.\d+)", (ROOT / "launch/setup.sh").read_text())
    named = [name.rpartition(" ")[2] for name in PROJECT["project"]["classifiers"] if " :: 3." in name]
    assert looked_for == named[::-1]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize("name", sorted(PROJECT["project"]["scripts"]))
def test_commands(name):
    module, _, function = PROJECT["project"]["scripts"][name].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


METHOD = """
from ffl_jax.methods.base import METHODS
from ffl_jax.methods.dml import DML
METHODS.register("mine")(type("Mine", (DML,), {"__module__": __name__}))
"""


@pytest.mark.parametrize(
    ("modules", "code", "text"),
    [
        ("mything", 0, "mine with resnet8 + resnet8"),
        (
            "other",
            2,
            "error: config.modules: 'other' cannot be imported (ModuleNotFoundError: No module named",
        ),
    ],
)
def test_a_module_of_ones_own(modules, code, text, commands, tmp_path):
    (tmp_path / "mything.py").write_text(METHOD)
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    arguments = ("--config=configs/digits.py:method=mine,network=resnet8", "--config.modules", modules)
    result = commands.run("-m", "ffl_jax.doctor", *arguments, code=code, cwd=tmp_path)
    assert text in result.stdout + result.stderr
