"""Tables of paths and labels, an image a row: FILE.csv, FILE.tsv, or, with pyarrow, FILE.parquet."""

import collections
import concurrent.futures
import csv
import io
import logging
import os
import pathlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from ffl_jax.data import base, folder, images, limits, records, roles
from ffl_jax.errors import ConfigError, DatasetError

_DELIMITERS = ",;\t"  # the first that makes the wanted columns of the first line
_CHUNK, _THREADS = 1000, 16  # files that one thread asks the disk or the network for; how many do


@base.FILES.register(".csv", ".tsv", ".parquet")
def load(config, path: pathlib.Path):
    """Reads the columns `path`, `label` and perhaps `split`, or what the configuration calls them.

    Paths are relative to the table's folder. Classes are called by their labels, sorted as texts. A split is
    one of `roles.SPLITS`, in whatever letters; without that column all images are of `train`.
    """
    keys = [config.image_key or "path", config.label_key or "label", config.split_key or "split"]
    images.check_regular(path, path.stat())
    read = _parquet if path.suffix.lower() == ".parquet" else _csv
    paths, texts, *in_split = read(path, keys, optional=not config.split_key)
    if len(paths) > limits.MAX_FILES:
        raise DatasetError(f"{path} has over {limits.MAX_FILES} rows.")
    top = path.parent
    places = [os.path.normpath(os.path.join(top, one)) for one in paths]
    labels = [unicodedata.normalize("NFC", text) for text in texts]
    split_of = [_split(path, row, text) for row, text in enumerate(in_split[0])] if in_split else None
    split_of = split_of or ["train"] * len(places)
    members = collections.defaultdict(list)
    for row in _once(path, places, labels, split_of):
        members[split_of[row]].append(row)
    chosen = roles.choose(config, path, members, members, "Splits")
    names = tuple(sorted({labels[row] for row in members["train"]}))
    if len(names) > limits.MAX_CLASSES:
        raise DatasetError(
            f"{path} has {len(names)} labels, and at most {limits.MAX_CLASSES} classes are allowed."
        )
    label_of, labelled = {name: label for label, name in enumerate(names)}, []
    for split in chosen.values():
        rows = members[split]
        roles.check_classes(config, path, split, names, {labels[row] for row in rows})
        labelled.append(
            (_listing(path, [places[row] for row in rows]), [label_of[labels[row]] for row in rows])
        )
    train, *others = folder.splits(config, top, *labelled)
    test, *validation = others or [None]
    return train, test, names, *validation


def _csv(path: pathlib.Path, keys: Sequence[str], optional: bool) -> list[list[str]]:
    """The columns `keys`, the last of which may be missing where it is `optional`."""
    try:
        text = images.read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is no text in UTF-8 ({error}): save it as that.") from error
    first = text.split("\n", 1)[0]
    found = {one: {name.strip(' "\r') for name in first.split(one)} & set(keys) for one in _DELIMITERS}
    delimiter = max(_DELIMITERS, key=lambda one: len(found[one]))
    header, columns, row = None, [], 1
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    try:
        for row, values in enumerate(reader, 1):
            if header is None:
                header = [name.strip() for name in values]
                places = _places(path, header, keys, optional)
                columns = [[] for _ in places]
            elif values and len(values) != len(header):
                raise DatasetError(
                    f"Row {row} of {path} has {len(values)} values, and the first {len(header)}: correct it."
                )
            elif values:
                for column, place in zip(columns, places, strict=True):
                    if not values[place].strip():
                        raise DatasetError(f"Row {row} of {path} has no {header[place]}: correct it.")
                    column.append(values[place] if place == places[0] else values[place].strip())
    except csv.Error as error:
        raise DatasetError(f"Row {row} of {path} cannot be read: {error}; correct it.") from error
    if not columns or not columns[0]:
        raise DatasetError(f"{path} has no rows: it must begin with the names of its columns.")
    return columns


def _parquet(path: pathlib.Path, keys: Sequence[str], optional: bool) -> list[list[str]]:
    """As `_csv`."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"{path} needs pyarrow, which is not installed: run `pip install pyarrow`, or save it as .csv."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            header = file.schema_arrow.names
            if file.metadata.num_rows > limits.MAX_FILES:
                raise DatasetError(f"{path} has over {limits.MAX_FILES} rows.")
            places = _places(path, header, keys, optional)
            table = file.read(columns=[header[place] for place in places])
            columns = [table.column(header[place]).to_pylist() for place in places]
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # pyarrow has a dozen types of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DatasetError(f"{path} cannot be read: {reason}; write it again.") from error
    for place, column in zip(places, columns, strict=True):
        for row, value in enumerate(column, 1):
            if value is None or not isinstance(value, str | int) or value == "":
                raise DatasetError(
                    f"Row {row} of {path} has {type(value).__name__} {str(value)[:50]!r} for "
                    f"{header[place]}: a text or a whole number is needed."
                )
    if not columns[0]:
        raise DatasetError(f"{path} has no rows.")
    return [list(map(str, column)) for column in columns]


def _places(path, header: list[str], keys: Sequence[str], optional: bool) -> list[int]:
    """Which columns `keys` are. Raises DatasetError for one that is missing, or there twice."""
    settings = ("image_key", "label_key", "split_key")
    places = []
    for key, setting in zip(keys, settings, strict=True):
        if header.count(key) > 1:
            raise DatasetError(f"{path} has {header.count(key)} columns {key}: rename what is not meant.")
        if key in header:
            places.append(header.index(key))
        elif not (optional and setting == "split_key"):
            raise DatasetError(
                f"{path} has no column {key}, but {roles.some(header)}: name the one that is meant by "
                f"config.data.{setting}."
            )
    return places


def _split(path, row: int, text: str) -> str:
    split = text.strip().casefold()
    if split not in roles.SPLITS:
        raise DatasetError(
            f"{path} has a split {text!r} (image {row + 1}): one of {', '.join(roles.SPLITS)} is needed."
        )
    return split


def _once(path, places, labels, split_of) -> list[int]:
    """The rows without those that repeat another, of which it tells. Refuses an image with two labels."""
    first, seen, kept, repeated, across = {}, set(), [], [], []
    for row, (place, split) in enumerate(zip(places, split_of, strict=True)):
        before = first.setdefault(place, row)
        if labels[before] != labels[row]:
            raise DatasetError(
                f"{path} gives {place} two labels, {labels[before]} and {labels[row]} (images {before + 1} "
                f"and {row + 1}): one is needed."
            )
        if (place, split) in seen:
            repeated.append(place)
            continue
        if before != row:
            across.append(place)
        seen.add((place, split))
        kept.append(row)
    if repeated:
        logging.warning("Taken once, though %s has them more often: %s.", path, roles.some(repeated))
    if across:
        logging.warning("Images that %s has in two splits: %s.", path, roles.some(across))
    return kept


def _listing(path, places: list[str]) -> records.Listing:
    """Raises DatasetError that names the files that are missing or cannot be opened."""
    chunks = [places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
        listings = list(executor.map(folder.list_paths, chunks))
    refused = [message for listing in listings for message in listing.refused]
    if refused:
        raise DatasetError(
            f"{len(refused)} of {len(places)} images of {path} cannot be used: {roles.some(refused)}; "
            "restore them, or correct the table, whose paths are relative to its folder."
        )
    return records.Listing(places, np.concatenate([listing.states for listing in listings]))
