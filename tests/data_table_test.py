import os
import sys
import unicodedata

import numpy as np
import pytest
from conftest import data_section
from data_folder_test import BLUE, GREEN, RED, save

from ffl_jax import data
from ffl_jax.errors import ConfigError, DatasetError

STREAMED = {"streaming": True, "image_size": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3}
ROWS = (
    *(("a.png", "bee", "train"), ("deep/b.png", "ant", "Train"), ("c.png", "bee", "train")),
    *(("d.png", "ant", "test"), ("e.png", "bee", "TEST"), ("f.png", "ant", "val")),
    *(("g.png", "bee", "val"),),
)
COLOURS = dict(zip((row[0] for row in ROWS), (RED, GREEN, BLUE, RED, GREEN, BLUE, RED), strict=True))


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        save(tmp_path / name, colour)
    return tmp_path


def write(path, rows=ROWS, header=("path", "label", "split"), delimiter=",", encoding="utf-8"):
    lines = [delimiter.join(row) for row in (header, *rows) if row]
    path.write_bytes("\r\n".join(lines).encode(encoding))
    return path


def load(path, **settings):
    settings = {"name": "folder", "data_dir": str(path), "cache_dir": f"{path}_cache"} | settings
    return data.load(data_section(**settings))


def check(dataset):
    assert dataset.class_names == ("ant", "bee")
    for split, colours, labels in (
        ("train", (RED, GREEN, BLUE), (1, 0, 1)),
        ("test", (RED, GREEN), (0, 1)),
        ("validation", (BLUE, RED), (0, 1)),
    ):
        found = getattr(dataset, split)
        np.testing.assert_array_equal(found.images[:, 1, 1], colours)
        np.testing.assert_array_equal(found.labels, labels)


@pytest.mark.parametrize(
    "form", [{}, {"delimiter": ";"}, {"delimiter": "\t"}, {"encoding": "utf-8-sig"}, {"delimiter": ", "}]
)
def test_csv(folder, form):
    check(load(write(folder / "images.csv", **form)))


def test_other_names_quotes_and_absolute_paths(folder):
    rows = [(f'"{folder}/{path}"', "x", split, f'"{label}"') for path, label, split in ROWS]
    path = write(folder / "images.CSV", rows, ("image", "n", "fold", "class, English"))
    path.write_text(path.read_text().replace("class, English", '"class, English"'))
    check(load(path, image_key="image", label_key="class, English", split_key="fold"))


def test_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = dict(zip(("path", "label", "split"), map(list, zip(*ROWS, strict=True)), strict=True))
    path = folder / "images.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    check(load(path))
    columns["label"] = [{"ant": 10, "bee": 9}[label] for label in columns["label"]]
    parquet.write_table(pyarrow.table(columns), path)
    assert load(path).class_names == ("10", "9")  # as texts
    for value, words in ((None, "NoneType 'None' for label"), ([1, 2], "has list")):
        column = columns["label"]
        column = [value, *column[1:]] if value is None else [value] * len(column)
        parquet.write_table(pyarrow.table(columns | {"label": column}), path)
        with pytest.raises(DatasetError, match=f"Row 1 of .*{words}"):
            load(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DatasetError, match=r"images\.parquet cannot be read"):
        load(path)


def test_parquet_without_pyarrow(folder, monkeypatch):
    (folder / "images.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow, .*pip install pyarrow"):
        load(folder / "images.parquet")


def test_streamed_and_divided(folder):
    path = write(folder / "images.csv")
    streamed, whole = load(path, **STREAMED), load(path)
    for split in ("train", "test", "validation"):
        one = getattr(streamed, split)
        np.testing.assert_array_equal(one.labels, getattr(whole, split).labels)
        read = [where for where, _, _ in one.records.read(one.positions)]
        assert all(os.path.isfile(where) for where in read)
    rows = [row[:2] for row in ROWS] + [("a.png", "bee")]
    path = write(folder / "images.csv", rows, ("path", "label"))
    with pytest.raises(DatasetError, match=r"set config\.data\.test_fraction"):
        load(path)
    for settings in ({}, STREAMED):
        dataset = load(path, test_fraction=0.3, **settings)
        np.testing.assert_array_equal(np.bincount(dataset.test.labels), [1, 1])
        assert len(dataset.train) == 5


def test_corrected_labels_are_seen(folder):
    """Though the images are decoded already."""
    before = load(write(folder / "images.csv"))
    rows = [("a.png", "ant", "train"), *ROWS[1:]]
    after = load(write(folder / "images.csv", rows))
    np.testing.assert_array_equal(after.train.labels, [0, 0, 1])
    assert before.fingerprint != after.fingerprint


def test_labels_that_look_alike_are_one(folder):
    name = "améise"
    rows = [
        (path, unicodedata.normalize("NFD" if split == "test" else "NFC", label.replace("ant", name)), split)
        for path, label, split in ROWS
    ]
    assert load(write(folder / "images.csv", rows)).class_names == (name, "bee")


def test_images_that_are_there_twice_are_told(folder, caplog):
    dataset = load(write(folder / "images.csv", [*ROWS, ROWS[0], ("./a.png", "bee", "test")]))
    assert (len(dataset.train), len(dataset.test)) == (3, 3)
    assert f"Taken once, though {folder}/images.csv has them more often: {folder}/a.png." in caplog.text
    assert f"in two splits: {folder}/a.png." in caplog.text


FAULTS = {
    "no file": (lambda path: None, "does not exist"),
    "empty": (lambda path: path.touch(), "has no rows|no column path"),
    "header alone": (lambda path: write(path, []), "has no rows"),
    "other columns": (
        lambda path: write(path, header=("file", "label", "split")),
        r"has no column path, but file, label, split: name .* config\.data\.image_key",
    ),
    "two columns": (lambda path: write(path, header=("path", "label", "label")), "has 2 columns label"),
    "missing files": (
        lambda path: write(path, [*ROWS, ("x.png", "bee", "train"), ("y.png", "ant", "test")]),
        r"1 of 4 images of .*/x.png cannot be read \(No such file or directory\)",
    ),
    "a folder": (lambda path: write(path, [*ROWS, ("deep", "bee", "train")]), "deep is a folder"),
    "an address": (
        lambda path: write(path, [*ROWS, ("https://x.org/a.png", "bee", "train")]),
        "x.org/a.png cannot be read",
    ),
    "no label": (lambda path: write(path, [*ROWS, ("a.png", " ", "train")]), "Row 9 of .* has no label"),
    "no path": (lambda path: write(path, [*ROWS, ("", "bee", "train")]), "Row 9 of .* has no path"),
    "no split": (lambda path: write(path, [*ROWS, ("a.png", "bee", "")]), "Row 9 of .* has no split"),
    "too few": (lambda path: write(path, [*ROWS, ("a.png", "bee")]), "Row 9 of .* has 2 values"),
    "too many": (
        lambda path: write(path, [*ROWS, ("a.png", "b", "c", "d")]),
        "has 4 values, and the first 3",
    ),
    "other split": (
        lambda path: write(path, [*ROWS, ("a.png", "bee", "dev")]),
        "split 'dev' .* one of train",
    ),
    "two labels": (
        lambda path: write(path, [*ROWS, ("a.png", "ant", "train")]),
        r"gives .*/a.png two labels, bee and ant \(images 1 and 8\)",
    ),
    "class without test": (
        lambda path: write(path, [*ROWS, ("a.png", "cat", "train")][1:]),
        r"only in train: cat; make them agree, or set config\.data\.missing_classes=True",
    ),
    "class of test": (lambda path: write(path, [("a.png", "cat", "test"), *ROWS[1:]]), "only in test: cat"),
    "one class": (lambda path: write(path, [row for row in ROWS if row[1] == "ant"]), "has 1 class"),
    "open quote": (lambda path: path.write_text('path,label\n"a.png,bee\n'), "cannot be read"),
    "no text": (lambda path: write(path, encoding="utf-16"), "no text in UTF-8"),
    "zero in a path": (
        lambda path: write(path, [*ROWS, ("a\0.png", "bee", "train")]),
        "cannot be read|null|NUL",
    ),
    "no image": (lambda path: write(path, [*ROWS, (path.name, "bee", "train")]), "cannot be decoded"),
    "pipe": (os.mkfifo, "is a named pipe"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line(folder, fault):
    make, words = FAULTS[fault]
    make(folder / "images.csv")
    with pytest.raises(DatasetError, match=words) as caught:
        load(folder / "images.csv")
    assert "\n" not in str(caught.value)


def test_a_key_that_is_asked_for_must_be_there(folder):
    with pytest.raises(
        DatasetError, match=r"no column fold, but path, label, split: .*config\.data\.split_key"
    ):
        load(write(folder / "images.csv"), split_key="fold")


def test_a_file_of_another_kind_is_refused(folder):
    (folder / "images.txt").touch()
    with pytest.raises(
        DatasetError, match=r"images\.txt is a file, and not one of \.csv, \.npz, \.parquet, \.tsv"
    ):
        load(folder / "images.txt")
