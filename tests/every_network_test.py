"""The sweep over networks and methods: some cells of it, and the table that it prints."""

import json
import runpy

import conftest
import pytest

from ffl_jax.deployment import exporting


@pytest.fixture(scope="module")
def sweep():
    return runpy.run_path(str(conftest.ROOT / "benchmarks" / "every_network.py"))


def test_cells(sweep, monkeypatch):
    """One works, one is refused by what a user would read, and one finds an export of other weights."""
    cell, globals_ = sweep["cell"], sweep["cell"].__globals__
    assert cell("one", "tiny")["outcome"] == "works"
    monkeypatch.setitem(globals_, "SIDES", {"vit_tiny_patch4": 10})
    refused = cell("ffl", "vit_tiny_patch4")
    assert refused["outcome"] == "refused"
    assert "patches of 4x4 pixels do not divide images of 10x10" in refused["reason"]
    reference = exporting.reference
    monkeypatch.setattr(exporting, "reference", lambda *given: reference(*given) + 1e-3)
    failed = cell("independent", "tiny")
    assert failed["outcome"] == "failed"
    assert "the exported logits differ by" in failed["reason"]


def test_the_table(sweep, tmp_path):
    lines = [
        {"method": "ffl", "network": "a", "outcome": "failed", "reason": "it was mended"},
        {"method": "ffl", "network": "a", "outcome": "works"},
        {"method": "one", "network": "a", "outcome": "refused", "reason": "no trunk"},
    ]
    path = tmp_path / "cells.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sweep["table"](sweep["read"](path), ["ffl", "one"], ["a", "b"]).splitlines() == [
        "| network | `ffl` | `one` |",
        "| --- | --- | --- |",
        "| `a` | yes | refused (1) |",
        "| `b` |  |  |",
        "",
        "1. no trunk",
    ]


def test_the_order(sweep):
    cells = sweep["order"](["one", "ffl"], ["vgg13", "vgg8"])
    assert cells == [("ffl", "vgg13"), ("ffl", "vgg8"), ("one", "vgg8"), ("one", "vgg13")]
