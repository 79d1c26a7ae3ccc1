"""Image folders: `train/<class>/*` and `test/<class>/*`, files of any depth inside a class."""

import collections
import concurrent.futures
import contextlib
import logging
import os
import pathlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from ffl_jax.data import base, images, limits, records
from ffl_jax.errors import ConfigError, DatasetError
from ffl_jax.workdir.paths import expanded

_LAYOUT = (
    "it must hold train/<class>/* and test/<class>/* (or val/<class>/*) with images, PNG or JPEG files say"
)
_SPLITS = ("train", "test", "val", "valid", "validation")
# What file browsers, archives and network storage leave behind, beside what begins with a dot.
_LITTER = {
    *(
        "@eaDir",
        "@Recycle",
        "#recycle",
        "#snapshot",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
    ),
    *("__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r"),
}
# Listing a folder waits for the disk or the network, hardly for the processor.
_LISTING_THREADS = 16


@base.SOURCES.register("folder")
def load(config):
    """Reads `config.data_dir`; class names are the folder names, sorted, and files are sorted within a class.

    The first of `test`, `val`, `valid` and `validation` that has classes of `train` is the test split, and
    where that is `test`, the next is the validation split. With `config.test_fraction` there is none of them,
    and perhaps no `train`: see `data.load`. What is left out is said, but for hidden files and
    folders and `_LITTER`.
    """
    top = root(config, "your images", _LAYOUT)
    with readable(top), os.scandir(top) as entries:
        there = sorted(entry.name for entry in entries if entry.is_dir() and not _is_litter(entry.name))
    if config.test_fraction:
        return _undivided(config, top, there)
    known = {name: set(map(_composed, _folders(top / name)[0])) for name in _SPLITS if name in there}
    used = [name for name in _SPLITS[1:] if known.get(name, set()) & known.get("train", set())]
    test, *others = used or [name for name in _SPLITS[1:] if name in there][:1] or ["test"]
    validation = others[0] if others and test == "test" and not config.validation_examples else None
    if test != "test":
        logging.info("The test split is %s: there is no folder test with classes of train.", top / test)
    if validation:
        logging.info("The validation split is %s.", top / validation)
    unused = [name for name in there if name not in ("train", test, validation)]
    if unused:
        carved = config.validation_examples and others and test == "test"
        advice = f" To use {others[0]}, set config.data.validation_examples=0." if carved else ""
        logging.warning("Folders of %s that are not used: %s.%s", top, some(unused), advice)
    return load_tree(config, top, test, _LAYOUT, validation)


def _undivided(config, top: pathlib.Path, there: list[str]):
    """A tree of `train/<class>/*`, or of `<class>/*` alone, whose test split is still to be taken out."""
    others = [name for name in _SPLITS[1:] if name in there]
    if others:
        raise ConfigError(
            f"config.data.test_fraction={config.test_fraction} takes a test split from the training images, "
            f"but {top} has {some(others)}: set it to 0, or move that away."
        )
    split = "train" if "train" in there else "."
    names = class_folders(top, split, _LAYOUT)
    listed = list_files(top, [f"{split}/{name}" for name in names.values()])
    (train,) = splits(config, top, by_class(list(listed.values())))
    return train, None, tuple(names)


def root(config, title: str, layout: str) -> pathlib.Path:
    """The folder `config.data_dir` of `title`, for sources that hold files as `layout` says."""
    if not config.data_dir:
        raise DatasetError(f"config.data.data_dir is not set: give the folder of {title}; {layout}.")
    top = expanded(config.data_dir).absolute()
    if not top.exists():
        raise DatasetError(f"config.data.data_dir {top} does not exist; {layout}.")
    if not top.is_dir():
        raise DatasetError(f"config.data.data_dir {top} is a file, not a folder; {layout}.")
    return top


def load_tree(config, top: pathlib.Path, test: str, layout: str, validation: str | None = None):
    """(train split, test split, class names, any validation split) of `top/train/<class>/*` and so on."""
    folders = ["train", test, *([validation] if validation else [])]
    names = {split: class_folders(top, split, layout) for split in folders}
    listed = list_files(top, [f"{split}/{name}" for split in folders for name in names[split].values()])
    train, *held_out = names.values()
    for split, other in zip(folders[1:], held_out, strict=True):
        parts = [(sorted(train.keys() - other.keys()), "only in train")]
        parts += [(sorted(other.keys() - train.keys()), f"only in {split}")]
        differences = "; ".join(f"{where}: {some(names)}" for names, where in parts if names)
        if differences:
            raise DatasetError(
                f"{top} has different classes in train and {split}, {differences}; make them agree."
            )
    labelled = (by_class([listed[f"{split}/{name}"] for name in names[split].values()]) for split in folders)
    train_split, test_split, *more = splits(config, top, *labelled)
    return train_split, test_split, tuple(train), *more


@contextlib.contextmanager
def readable(top: pathlib.Path):
    """Turns what the system refuses inside into a DatasetError."""
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"Cannot read {error.filename or top}: {error.strerror}; check the folder."
        ) from error


def class_folders(top: pathlib.Path, split: str, layout: str) -> dict[str, str]:
    """{class name: name of its folder in `top/split`}, sorted. Names that look alike are one, see NFC."""
    with readable(top):
        if not (top / split).is_dir():
            found = sorted(os.listdir(top))
            held = "is empty" if not found else f"has no folder {split}, only {some(found)}"
            raise DatasetError(f"config.data.data_dir {top} {held}; {layout}.")
        folders, beside = _folders(top / split)
    if not folders:
        raise DatasetError(f"{top / split} has no class folders; {layout}.")
    if len(folders) > limits.MAX_CLASSES:
        raise DatasetError(
            f"{top / split} has {len(folders)} folders, and at most {limits.MAX_CLASSES} classes are allowed."
        )
    if beside:
        logging.warning("Left out of %s, beside its class folders: %s.", top / split, some(beside))
    named = {_composed(name): name for name in folders}
    twins = sorted(set(folders) - set(named.values()))
    if twins:
        raise DatasetError(f"{top / split} has two folders each that look alike, {some(twins)}; merge them.")
    if len({name.casefold() for name in named}) < len(named):
        logging.warning("Some classes of %s differ in capital letters alone.", top / split)
    return dict(sorted(named.items()))


def _composed(name: str) -> str:
    """The name in the one form that Unicode has for all names that look like it: macOS writes another."""
    return unicodedata.normalize("NFC", name)


def _folders(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """(names of the folders, names of what else lies there), sorted."""
    with readable(folder), os.scandir(folder) as entries:
        found = {entry.name: entry.is_dir() for entry in entries if not _is_litter(entry.name)}
    return tuple(sorted(name for name in found if found[name] is kind) for kind in (True, False))


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name in _LITTER


def list_files(top: pathlib.Path, folders: list[str]) -> dict[str, records.Listing]:
    """Lists the image files of each folder below `top`; none may be without one. Says what is left out."""
    import tqdm

    with readable(top), concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as executor:
        listings = executor.map(lambda folder: _list(top / folder), folders)
        bar = tqdm.tqdm(
            listings, "Listing files", len(folders), unit="folder", delay=1, leave=False, disable=None
        )
        found = dict(zip(folders, bar, strict=True))
    left_out = collections.defaultdict(collections.Counter)
    for folder, listing in found.items():
        left_out[folder.partition("/")[0]].update(listing.left_out)
    for split, others in left_out.items():
        if others:
            counts = some([f"{suffix or 'none'} {count}" for suffix, count in others.most_common()])
            logging.warning(
                "Left out of %s: %d files that are no images by their suffixes: %s.",
                top / split,
                others.total(),
                counts,
            )
    refused = [message for listing in found.values() for message in listing.refused]
    if refused:
        raise DatasetError(f"{some(refused)}; replace or remove what is named.")
    empty = [folder for folder, listing in found.items() if not listing.paths]
    if empty:
        raise DatasetError(f"{top} has class folders without an image: {some(empty)}; fill or remove them.")
    return found


def by_class(listings: list[records.Listing]) -> tuple[records.Listing, np.ndarray]:
    """One listing after the other, and the labels of the files: the places of their listings."""
    paths = [path for listing in listings for path in listing.paths]
    labels = np.repeat(np.arange(len(listings)), [len(listing.paths) for listing in listings])
    return records.Listing(paths, np.concatenate([listing.states for listing in listings])), labels


def splits(config, top: pathlib.Path, *labelled: tuple[records.Listing, Sequence[int]]):
    """The train, the test and any validation split from the files below `top` and the labels of each."""
    # Full paths, so that two trees whose files agree in size and time are never taken for one another. The
    # change time cannot be set by hand: a restored old time is seen, too.
    source = "".join(
        f"{path}\0{row}\0"
        for listing, _ in labelled
        for path, row in zip(listing.paths, listing.states.tolist(), strict=True)
    )
    roles = ("train", "test", "validation")[: len(labelled)]
    files = {role: records.Files(top, *one) for role, one in zip(roles, labelled, strict=True)}
    return records.splits(config, config.name, source, files)


def some(names: list[str]) -> str:
    """The first names, and how many more there are: errors stay on one line."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def image_files(folder: str | os.PathLike) -> list[str]:
    """Paths of all that image files are named like, at any depth below a folder, sorted; litter is left out.

    Raises:
      OSError: a folder cannot be read.
      DatasetError: there are too many.
    """
    return _walk(folder)[0]


def _walk(folder: str | os.PathLike) -> tuple[list[str], collections.Counter]:
    """(paths as of `image_files`, {suffix: count} of the files that are left out)."""
    paths, left_out = [], collections.Counter()
    waiting, visited = [os.fspath(folder)], set()
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in visited:  # a link back to a folder above
            continue
        visited.add(real)
        with os.scandir(here) as entries:
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()
                if _is_litter(entry.name):
                    continue
                if suffix in images.suffixes():
                    paths.append(entry.path)
                elif entry.is_dir():
                    waiting.append(entry.path)
                else:
                    left_out[suffix] += 1
        if len(paths) > limits.MAX_FILES:
            raise DatasetError(f"{os.fspath(folder)} has over {limits.MAX_FILES} files; choose another.")
    return sorted(paths), left_out


def _list(folder: pathlib.Path) -> records.Listing:
    paths, left_out = _walk(folder)
    states, refused = [], []
    for path in paths:
        try:
            state = os.stat(path)
            images.check_regular(path, state)
            states.append((state.st_size, state.st_mtime_ns, state.st_ctime_ns))
        except OSError as error:
            refused.append(f"{path} cannot be read ({error.strerror})")
        except DatasetError as error:
            refused.append(str(error))
    return records.Listing(paths, np.array(states, np.int64).reshape(-1, 3), left_out, refused)
