"""The callback of `train`, what a notebook sees, and the rates, norms and HParams of a whole run."""

import contextlib
import io
import json
import logging
import math
import re
import sys
import types

import pytest
from conftest import ROOT

from configs import digits
from ffl_jax.training import loop
from ffl_jax.workdir.log import read_metrics
from ffl_jax.workdir.progress import Progress


def configuration():
    config = digits.get_config("method=independent,network=tiny,epochs=1")
    config.subnetworks.num = 1
    config.batch_size = 256
    config.log_every_steps = 4
    return config


@pytest.fixture(scope="module")
def heard(tmp_path_factory, traced_once):
    """A run, its summary, and all that a callback was told, which spoils what it is given."""
    workdir, lines = tmp_path_factory.mktemp("run"), []

    def callback(line):
        lines.append(json.loads(json.dumps(line)))
        line.clear()

    return workdir, loop.train(configuration(), workdir, callback=callback), lines


def test_every_line_and_the_end(heard):
    workdir, summary, lines = heard
    rows, damaged = read_metrics(workdir / "metrics.jsonl")
    assert damaged == 0
    assert [row["step"] for row in rows] == [4, 6, 6]
    assert lines[:-1] == [row | {"seed": 0} for row in rows]
    assert lines[-1] == json.loads(json.dumps(summary)) | {"split": "end"}
    assert lines[-1]["status"] == "completed"


def test_a_complete_run_has_an_end_alone(heard):
    workdir, summary, _ = heard
    lines = []
    assert loop.train(configuration(), workdir, callback=lines.append) == summary
    assert lines == [summary | {"split": "end"}]


def test_rates_and_norms_are_behind_the_terms(heard):
    """Cosine from 0.1 over 6 steps: a line at step n has the rate of the step before, by the formula."""
    _, _, lines = heard
    trained = [line for line in lines if line["split"] == "train"]
    expected = [0.05 * (1 + math.cos(math.pi * step / 6)) for step in (3, 5)]
    assert [line["learning_rate"] for line in trained] == pytest.approx(expected, rel=1e-5)
    assert all(line["gradient_norm"] > 0 for line in trained)
    assert set(list(trained[0])[-3:]) == {"gradient_norm", "learning_rate", "seed"}


def test_a_callback_that_fails_is_said_once(tmp_path, caplog):
    called = []

    def callback(line):
        called.append(line)
        raise RuntimeError("no server")

    assert loop.train(configuration(), tmp_path, callback=callback)["status"] == "completed"
    assert len(called) == 1
    assert caplog.text.count("callback fails, and the run goes on without it: no server") == 1


def test_mlflow_by_the_lines_of_the_docs(monkeypatch, tmp_path):
    """A stand-in for the parts of its interface that are used; it keeps the contract of its types."""
    metrics, about = [], {}

    def log_metrics(numbers, step):
        assert isinstance(step, int)
        assert all(isinstance(x, float) and re.fullmatch(r"[\w/ .-]+", name) for name, x in numbers.items())
        metrics.append((step, numbers))

    run = contextlib.nullcontext
    module = types.SimpleNamespace(
        start_run=run, log_metrics=log_metrics, log_params=about.update, set_tag=about.__setitem__
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(import mlflow.*?)```", (ROOT / "docs/reading.md").read_text(), re.S)
    small = configuration()
    monkeypatch.setattr("ffl_jax.training.config_file.read", lambda chosen: small)
    exec(block, {})
    assert about["status"] == "completed"
    assert about["optimizer.learning_rate"] == 0.1
    assert [step for step, _ in metrics] == [4, 6, 6]
    assert {"train/loss", "train/gradient_norm"} <= metrics[0][1].keys()
    assert "test/sub_0/top1" in metrics[-1][1]


@pytest.mark.parametrize(("handlers", "shown"), [([], True), ([logging.NullHandler()], False)])
def test_scores_are_printed_where_nobody_has_set_up_a_log(handlers, shown, monkeypatch):
    """As in a notebook; the commands have a log, and a user's own has the line too."""
    monkeypatch.setattr(logging.root, "handlers", handlers)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress(10, 0, 1, 10)
    progress.tell("epoch 1, test: sub_0 90.00%")
    progress.close()
    assert sys.stderr.getvalue() == ("epoch 1, test: sub_0 90.00%\n" if shown else "")
