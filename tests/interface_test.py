"""What programs take from `ffl_jax` itself, as docs/interface.md has it."""

import inspect
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import ffl_jax

PAGE = (ROOT / "docs/interface.md").read_text()


def test_importing_costs_nothing():
    code = "import ffl_jax, sys; dir(ffl_jax); print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "ffl_jax" in result.stdout.split()
    assert not {"jax", "numpy", "absl", "ml_collections"} & set(result.stdout.split())


@pytest.mark.parametrize("name", ffl_jax.__all__)
def test_names(name):
    """Each is explained, has types, and stands on the page with its arguments and their defaults."""
    thing = getattr(ffl_jax, name)
    assert inspect.getdoc(thing)
    assert name in dir(ffl_jax)
    if not inspect.isfunction(thing):
        assert f"`{name}`" in PAGE
        return
    parameters = inspect.signature(thing).parameters.values()
    assert all(one.annotation is not one.empty for one in parameters)
    assert inspect.signature(thing).return_annotation is not inspect.Signature.empty
    said = re.search(rf"^\| `{name}\((.*?)\)`", PAGE, re.M).group(1).replace('"', "'").split(", ")
    there = [one.name if one.default is one.empty else f"{one.name}={one.default!r}" for one in parameters]
    assert said == there[: len(said)]
    assert len(said) == len(there) or name == "train"


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    found = {}
    exec(block.replace("epochs=2", "epochs=2,network=tiny"), found)
    assert (found["summary"]["status"], found["summary"]["epoch"], found["summary"]["seed"]) == (
        "completed",
        2,
        1,
    )
    assert found["step"] == found["summary"]["step"] == found["model"].card["step"]
    top1 = found["scores"]["predictions"]["sub_0"]["top1"]
    assert top1 == pytest.approx(found["summary"]["predictors"]["sub_0"]["top1"], abs=1e-6)
    assert found["probabilities"].shape == (5, 10)
    for call in (
        lambda: ffl_jax.export_checkpoint("runs/python", "a", format="pickle"),
        lambda: ffl_jax.evaluate_checkpoint("runs/python", split="all"),
        lambda: ffl_jax.get_config("configs/digit.py"),
    ):
        with pytest.raises(ffl_jax.errors.ConfigError):
            call()


def test_what_is_not_there_and_what_was():
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; it has Model, .*train"):
        ffl_jax.trian  # noqa: B018
    assert ffl_jax.train.train is ffl_jax.train
    for name in ("checkpoint", "config", "evaluation", "steps"):
        assert inspect.ismodule(getattr(ffl_jax, name))
