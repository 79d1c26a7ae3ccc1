"""docs/own: a method, a network and a dataset from outside the package, through every command.

Its terms and predictions have names of their own.
"""

import csv
import json
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from ffl_jax.data import base
from ffl_jax.methods import METHODS, subnetworks
from ffl_jax.methods.base import KNOWLEDGE
from ffl_jax.models import NETWORKS
from ffl_jax.training import steps
from ffl_jax.workdir import alarms

OWN = ROOT / "docs" / "own"
sys.path.append(str(OWN))
import choir  # noqa: E402

# Else all tests of all methods would take it for one of ours.
for registry, name in ((METHODS, "choir"), (NETWORKS, "plain"), (base.SOURCES, "stripes")):
    del registry[name]


@pytest.fixture(scope="module")
def run(commands, tmp_path_factory):
    """Its workdir."""
    workdir = tmp_path_factory.mktemp("runs") / "choir"
    config = ("--config=configs/digits.py:method=choir,network=plain,epochs=4", "--config.modules=choir")
    more = ("--config.data.name=stripes", "--config.evaluation.every_epochs=4", f"--workdir={workdir}")
    commands.run("-m", "ffl_jax.main", *config, *more, cwd=OWN)
    return workdir


def test_it_is_logged_and_drawn(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"truth/blend", "harmony/alpha", "patience", "omega/top1", "choir/nll"} <= rows[0].keys()
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["deploy"], summary["dataset"]) == ("omega", "stripes")
    assert summary["roles"]["blend"] == {"kind": "fused", "network": None}
    assert summary["roles"]["omega"] == {"kind": "network", "network": "plain"}
    assert summary["predictors"]["omega"]["top1"] > 0.8  # by chance 0.5
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_its_own_terms_are_watched(monkeypatch):
    """Those that it calls knowledge, and no others, by the name that it gave them."""
    monkeypatch.setitem(NETWORKS, "plain", choir.Plain)
    method = choir.Choir(subnetworks.build("plain", 2, 10), 10)
    variables = jax.eval_shape(lambda: steps.init_variables(method, jax.random.key(0), (8, 8, 3)))
    logged = steps.terms(method, *variables, (8, 8, 3))
    kinds = {name: (term.kind, term.learner) for name, term in logged.items()}
    assert kinds["harmony/omega"] == ("knowledge", "omega")
    assert kinds["truth/blend"] == ("labels", "blend")
    assert kinds["patience"] == kinds["loss"] == ("", "")
    knowledge = [name for name, (kind, _) in kinds.items() if kind == KNOWLEDGE]
    rows = [
        {"split": "train", "epoch": float(epoch), "harmony/alpha": 10.0 + epoch, "truth/alpha": 10.0 + epoch}
        for epoch in range(1, 6)
    ]
    assert list(alarms.growing(rows, 10, knowledge)) == ["growing harmony/alpha"]


def test_it_is_reported(run, commands, tmp_path):
    """Where the module is not: a report reads files alone."""
    commands.run("-m", "ffl_jax.report", run, f"--output={tmp_path}", cwd=tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = {row["prediction"]: row for row in csv.DictReader(file)}
    assert list(rows)[:2] == ["omega", "alpha"]
    assert rows.keys() == {"omega", "alpha", "choir", "blend"}
    assert rows["omega"]["ships"] == "yes"
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    (line,) = [line for line in table.splitlines() if line.startswith("| choir |") and "alpha" in line]
    one_network, ensemble, fused = (cell.strip() for cell in line.split("|")[2:5])
    assert one_network.startswith("omega")
    assert ensemble.startswith("choir")
    assert fused.startswith("blend")


def test_it_is_exported_and_predicts(run, commands, tmp_path):
    """Each export is checked by a process of its own; weights need the module again, a program does not."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "x.png")
    for name, form, folder in (("omega", "safetensors", OWN), ("blend", "onnx", tmp_path)):
        output = tmp_path / f"{name}.{form}"
        commands.run(
            *("-m", "ffl_jax.export", f"--workdir={run}", f"--predictor={name}"),
            *(f"--format={form}", f"--output={output}"),
            cwd=OWN,
        )
        found = commands.run("-m", "ffl_jax.predict", f"--model={output}", tmp_path / "x.png", cwd=folder)
        assert "vertical" in found.stdout
    arguments = ("-m", "ffl_jax.predict", f"--model={tmp_path}/omega.safetensors", tmp_path / "x.png")
    result = commands.run(*arguments, code=4, cwd=tmp_path)
    assert "config.modules: 'choir' cannot be imported" in result.stderr


def test_it_is_scored_where_the_module_is(run, commands, tmp_path):
    assert "| omega |" in commands.run("-m", "ffl_jax.evaluate", f"--workdir={run}", cwd=OWN).stdout
    result = commands.run("-m", "ffl_jax.evaluate", f"--workdir={run}", code=2, cwd=tmp_path)
    assert "config.modules: 'choir' cannot be imported (ModuleNotFoundError" in result.stderr
