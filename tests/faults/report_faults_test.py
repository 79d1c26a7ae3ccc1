"""One damaged run does not end the report of all; a name of any kind stands where it belongs."""

import json
import os
import random
import warnings

import pytest
from report_test import rows_of, write_run

from ffl_jax.errors import ConfigError
from ffl_jax.reporting import by_class, drawing, groups, report, results, runs

ABSURD = (None, True, -1, 0, 1e308, -1e308, float("inf"), float("nan"), 10**400, "", "é\nnew", "$a_{", [], {})
ABSURD += ([1], {"a": 1}, [[]], [{}], "0.5", "x" * 3000, "\udcff", "<script>", [float("nan")], {"": ""})


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.fixture
def not_rendered(monkeypatch):
    """Pictures are made up to where they become pixels."""
    monkeypatch.setattr(drawing.Figure, "savefig", lambda figure, data, **_: data.write(bytes(24)))


@pytest.fixture
def folder(tmp_path):
    for name, method, seed, top1 in (("a", "ffl", 0, 53), ("b", "ffl", 1, 54), ("c", "independent", 0, 50)):
        write_run(tmp_path / "runs" / name, method, seed, float(top1), new=True)
    return tmp_path


def change(path, keys, value):
    """Sets one value in a JSON file."""
    tree = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("keys", "value", "text"),
    [
        (("predictors", "sub_0", "top1"), float("inf"), "no test scores of sub_0"),
        (("predictors", "sub_0", "top1"), 10**400, "no test scores of sub_0"),
        (("predictors",), [], "has 'predictors' of another kind"),
        (("status",), "é\nnew", "é\\\\nnew at step 20"),
        (("seed",), None, "has 'seed' of another kind"),
    ],
)
def test_a_damaged_run_is_named_and_left_out(keys, value, text, folder, not_rendered):
    change(folder / "runs" / "b" / "summary.json", keys, value)
    report.write([str(folder / "runs")], folder / "out")
    assert text in (folder / "out" / "report.md").read_text()
    assert {row["runs"] for row in rows_of(folder / "out").values()} == {"1"}


def test_names_of_any_kind(folder):
    """A folder that is no UTF-8; Markdown, mathematics and a line break in a dataset; two that look alike."""
    bad = folder / "runs" / os.fsdecode(b"b\xff`\n")
    (folder / "runs" / "b").rename(bad)
    (bad / "metrics.jsonl").unlink()
    change(folder / "runs" / "a" / "summary.json", ("dataset",), "$a_{ **b** | 数\n")
    change(bad / "summary.json", ("dataset",), "$a_{ **b** | 字\n")
    report.write([str(folder / "runs")], folder / "out")
    text = (folder / "out" / "report.md").read_text()
    assert "## $a_{ \\*\\*b\\*\\* \\| 数\\\\n\n" in text
    assert "b\\xff'\\n` (no metrics.jsonl)" in text
    drawn = {path.name for path in (folder / "out").glob("*_accuracy.png")}
    assert len(drawn) == 3


def test_all_score_the_same(folder, not_rendered):
    for name in "abc":
        summary = folder / "runs" / name / "summary.json"
        for predictor in ("ensemble", "sub_0", "sub_1"):
            change(summary, ("predictors", predictor, "top1"), 0.5)
    report.write([str(folder / "runs")], folder / "out")
    assert (folder / "out" / "cifar10_cost.png").is_file()


def test_random_values(folder, not_rendered):
    """Anything anywhere in the files of a run."""
    rng, runs = random.Random(0), folder / "runs"
    files = {name: (runs / "a" / name).read_text() for name in ("summary.json", "config.json")}
    files["metrics.jsonl"] = (runs / "a" / "metrics.jsonl").read_text()
    for _ in range(300 if os.environ.get("FFL_LONG_FAULTS") else 10):
        name = rng.choice(sorted(files))
        lines = [json.loads(line) for line in files[name].splitlines()] if "jsonl" in name else None
        tree = lines or json.loads(files[name])
        keys = rng.choice(list(_leaves(tree)))
        inner = tree
        for key in keys[:-1]:
            inner = inner[key]
        value = rng.choice(ABSURD)
        if isinstance(inner, dict) and rng.random() < 0.2:
            del inner[keys[-1]]
        if isinstance(inner, dict) and rng.random() < 0.2:
            inner[rng.choice(["é\nnew", "|", "`", "\udcff", ""])] = value
        else:
            inner[keys[-1]] = value
        text = "".join(f"{json.dumps(line)}\n" for line in lines) if lines else json.dumps(tree)
        (runs / "a" / name).write_text(text)
        try:
            report.write([str(runs)], folder / "out")
        except ConfigError as error:
            assert "two runs of" in str(error), (name, keys, value)  # noqa: PT017
        except Exception as error:
            raise AssertionError((name, keys, value)) from error
        (runs / "a" / name).write_text(files[name])


HEAD = "true,cat,dog\n"
BAD_MATRICES = {
    "empty": b"",
    "blank": b"\n\n",
    "binary": b"\x80" * 99,
    "torn": f"{HEAD}cat,1,0\ndog,0".encode(),
    "a row is missing": f"{HEAD}cat,1,0\n".encode(),
    "a row too many": f"{HEAD}cat,1,0\ndog,0,1\ncow,0,0\n".encode(),
    "a blank row": f"{HEAD}cat,1,0\n\n".encode(),
    "a column too many": f"{HEAD}cat,1,0,0\ndog,0,1,0\n".encode(),
    "other names": f"{HEAD}dog,1,0\ncat,0,1\n".encode(),
    "no numbers": f"{HEAD}cat,1,x\ndog,0,1\n".encode(),
    "no number": f"{HEAD}cat,1,nan\ndog,0,1\n".encode(),
    "infinite": f"{HEAD}cat,1,inf\ndog,0,1\n".encode(),
    "negative": f"{HEAD}cat,1,-1\ndog,0,1\n".encode(),
    "absurd": f"{HEAD}cat,1,1e15\ndog,0,1\n".encode(),
    "very long": f"{HEAD}cat,1,{'9' * 5000}\ndog,0,1\n".encode(),
    "a large field": f"{HEAD}cat,1,{'9' * 10**6}\ndog,0,1\n".encode(),
    "an open quote": f'{HEAD}cat,1,"0\ndog,0,1\n'.encode(),
    "no classes": b"true\n",
    "too many classes": f"true{',c' * 2001}\n".encode(),
    "one line of commas": b"," * 10**6,
    "NUL": f"{HEAD}cat,1,\0\ndog,0,1\n".encode(),
}


@pytest.mark.parametrize("content", BAD_MATRICES.values(), ids=BAD_MATRICES)
def test_a_damaged_matrix_counts_as_missing(content, folder):
    (folder / "runs" / "b" / "confusion.csv").write_bytes(content)
    assert [group.method for group in by_class.confusions(_groups(folder))] == ["independent"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_no_matrix(make, folder):
    path = folder / "runs" / "b" / "confusion.csv"
    path.unlink()
    make(path)
    assert [group.method for group in by_class.confusions(_groups(folder))] == ["independent"]


def test_matrices_of_any_numbers(folder, not_rendered):
    """No images at all, no errors, one class, and names that are a figure's or a table's own signs."""
    for name in "abc":
        (folder / "runs" / name / "confusion.csv").write_text("x,$a_{,é|<b>\n$a_{,0,0\né|<b>,0,0\n")
    report.write([str(folder / "runs")], folder / "out")
    for name in "abc":
        (folder / "runs" / name / "confusion.csv").write_text("x,$\n$,3\n")
    report.write([str(folder / "runs")], folder / "out")
    assert (folder / "out" / "cifar10_confusion.png").is_file()


@pytest.mark.parametrize("key", ["names", "accuracy", ""])
def test_classes_of_any_kind(key, folder):
    for value in (*ABSURD, [[1, 2, 3]], [1, 2], [1e29] * 3, ["x", 1, None], ["0.5", "a", "b"], {"names": 1}):
        summary = folder / "runs" / "a" / "summary.json"
        kept = summary.read_text()
        change(summary, ("per_class", key) if key else ("per_class",), value)
        found = _groups(folder)
        table = by_class.table(found, by_class.confusions(found))
        assert [row[0].text for row in table.rows] == ["ffl", "independent"], value
        change(summary, ("balanced_accuracy",), value)
        results.text({"cifar10": _groups(folder)})
        summary.write_text(kept)


def _groups(folder):
    found, unusable, _ = runs.read([str(folder / "runs")])
    (members,) = groups.group(found, unusable).values()
    return members


def _leaves(tree, path=()):
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from _leaves(value, (*path, key))
