"""A method from outside the package, with terms and predictions of its own names, through every command."""

import csv
import json

import jax
import pytest
from stranger import Stranger

from ffl_jax.methods import subnetworks
from ffl_jax.methods.base import KNOWLEDGE
from ffl_jax.training import steps
from ffl_jax.workdir import alarms


@pytest.fixture(scope="module")
def run(commands, tmp_path_factory):
    """Its workdir."""
    workdir = tmp_path_factory.mktemp("runs") / "stranger"
    command(commands, "main", *("--config=configs/digits.py:method=stranger,network=tiny,epochs=2",))(
        f"--workdir={workdir}", "--config.evaluation.every_epochs=1"
    )
    return workdir


def command(commands, module, *given):
    """`python -m ffl_jax.MODULE` where this method is known."""
    code = "import conftest, stranger; stranger.register(); "
    code += f"from ffl_jax import cli, {module}; cli.run({module}.command)"
    return lambda *more, **options: commands.run("-c", code, *given, *more, **options)


def test_it_is_logged_and_drawn(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"truth/blend", "harmony/alpha", "patience", "omega/top1", "choir/nll"} <= rows[0].keys()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["deploy"] == "omega"
    assert summary["roles"]["blend"] == {"kind": "fused", "network": None}
    assert summary["roles"]["omega"] == {"kind": "network", "network": "tiny"}
    assert summary["predictors"]["omega"]["top1"] > 0.25  # by chance 0.1
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_its_own_terms_are_watched():
    """Those that it calls knowledge, and no others, by the name that it gave them."""
    method = Stranger(subnetworks.build("tiny", 2, 10), 10)
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
    command(commands, "report")(run, f"--output={tmp_path}")
    with open(tmp_path / "results.csv", newline="") as file:
        rows = {row["prediction"]: row for row in csv.DictReader(file)}
    assert list(rows)[:2] == ["omega", "alpha"]
    assert rows.keys() == {"omega", "alpha", "choir", "blend"}
    assert rows["omega"]["ships"] == "yes"
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    (line,) = [line for line in table.splitlines() if line.startswith("| stranger |") and "alpha" in line]
    one_network, ensemble, fused = (cell.strip() for cell in line.split("|")[2:5])
    assert one_network.startswith("omega")
    assert ensemble.startswith("choir")
    assert fused.startswith("blend")


def test_it_is_exported(run, commands, tmp_path):
    for name in ("omega", "blend"):
        output = tmp_path / f"{name}.stablehlo"
        command(commands, "export")(f"--workdir={run}", f"--predictor={name}", f"--output={output}")
        assert output.stat().st_size > 1000
