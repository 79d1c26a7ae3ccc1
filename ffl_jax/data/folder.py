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

from ffl_jax.data import base, images, limits, records, roles
from ffl_jax.data.roles import some as some
from ffl_jax.errors import DatasetError
from ffl_jax.workdir.paths import expanded

_LAYOUT = (
    "it must hold train/<class>/* and test/<class>/* (or val/<class>/*) with images, PNG or JPEG files say"
)
# What file browsers, archives and network storage leave behind, beside what begins with a dot; in lower case,
# for some systems write it so.
_LITTER = {
    *("@eadir", "@recycle", "@recently-snapshot", "@tmp", "@transcode", "@__thumb", "@synoresource"),
    *("#recycle", "#snapshot", "~snapshot", "$recycle.bin", "recycler", "found.000", "lost+found"),
    *("system volume information", "network trash folder", "temporary items", "thevolumesettingsfolder"),
    *("__macosx", "thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db"),
    *("desktop.ini", "icon\r", "__pycache__", "aquota.user", "aquota.group"),
}
# Listing a folder waits for the disk or the network, hardly for the processor.
_LISTING_THREADS = 16


@base.SOURCES.register("folder")
def load(config):
    """Reads `config.data_dir`; class names are the folder names, sorted, and files are sorted within a class.

    Which folder is which split says `roles.choose`; with `config.test_fraction` there is perhaps no `train`:
    see `data.load`. What is left out is said. A file is read by the source of its kind.
    """
    path = expanded(config.data_dir).absolute()
    if config.data_dir and path.suffix.lower() in base.FILES and not path.is_dir():
        if not path.exists():
            raise DatasetError(f"config.data.data_dir {path} does not exist.")
        return base.FILES[path.suffix.lower()](config, path)
    top = root(config, "your images", _LAYOUT)
    roles.refuse_keys(config, top)
    there, _, litter = _entries(top)
    _say_litter(top, litter)
    held_out = [name for name in roles.SPLITS[1:] if name in there]
    if config.test_fraction and "train" not in there and not held_out:
        return load_tree(config, top, {"train": "."}, _LAYOUT)
    known = ["train", *held_out] if "train" in there else []
    classes = {name: set(map(_composed, _entries(top / name)[0])) for name in known}
    used = [name for name in known[1:] if classes[name] & classes["train"]]
    if not config.test_fraction:  # what they lack is said where they are looked into
        used = used or held_out[:1] or ["test"]
    chosen = roles.choose(config, top, ("train", *used), there, "Folders")
    return load_tree(config, top, chosen, _LAYOUT)


def root(config, title: str, layout: str) -> pathlib.Path:
    """The folder `config.data_dir` of `title`, for sources that hold files as `layout` says."""
    if not config.data_dir:
        raise DatasetError(f"config.data.data_dir is not set: give the folder of {title}; {layout}.")
    top = expanded(config.data_dir).absolute()
    if not top.exists():
        raise DatasetError(f"config.data.data_dir {top} does not exist; {layout}.")
    if not top.is_dir():
        kinds = ", ".join(sorted(base.FILES))
        raise DatasetError(
            f"config.data.data_dir {top} is a file, and not one of {kinds} of config.data.name=folder; "
            f"{layout}."
        )
    return top


def load_tree(config, top: pathlib.Path, chosen: dict[str, str], layout: str):
    """(train split, test split, class names, any validation split) of `top/train/<class>/*` and so on.

    Args: chosen: {role: name of the folder}, see `roles.choose`.
    """
    names = {split: class_folders(top, split, layout) for split in chosen.values()}
    paths = {split: [f"{split}/{folder}" for folder in names[split].values()] for split in names}
    first, *held_out = names
    optional = [path for split in held_out for path in paths[split] if config.missing_classes]
    listed = list_files(top, [path for split in names for path in paths[split]], optional)
    label_of, labelled = {name: label for label, name in enumerate(names[first])}, []
    for split, folders in paths.items():
        filled = [name for name, path in zip(names[split], folders, strict=True) if listed[path].paths]
        roles.check_classes(config, top, split, label_of, filled)
        labels = [label_of.get(name, -1) for name in names[split]]
        labelled.append(by_class([listed[path] for path in folders], labels))
    train, *others = splits(config, top, *labelled)
    test, *validation = others or [None]
    return train, test, tuple(label_of), *validation


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
        folders, beside, litter = _entries(top / split)
    if split != ".":
        _say_litter(top / split, litter)
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


def _entries(folder: pathlib.Path) -> tuple[list[str], list[str], collections.Counter]:
    """(names of the folders, names of what else lies there), sorted, and {name: count} of litter."""
    with readable(folder), os.scandir(folder) as entries:
        found = {entry.name: entry.is_dir() for entry in entries}
    litter = collections.Counter(filter(_is_litter, found))
    folders, beside = (
        sorted(name for name in found if found[name] is kind and name not in litter) for kind in (True, False)
    )
    return folders, beside, litter


def _say_litter(where: pathlib.Path, litter: collections.Counter):
    if litter:
        counts = some([f"{name!r} {count}" for name, count in sorted(litter.items())])
        logging.info("Left out of %s, as hidden or as what a system left behind: %s.", where, counts)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def list_files(
    top: pathlib.Path, folders: list[str], optional: Sequence[str] = ()
) -> dict[str, records.Listing]:
    """Lists the image files of each folder below `top`. Says what is left out.

    Args: optional: those of the folders that may be without one.
    """
    import tqdm

    with readable(top), concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as executor:
        listings = executor.map(lambda folder: _list(top / folder), folders)
        bar = tqdm.tqdm(
            listings, "Listing files", len(folders), unit="folder", delay=1, leave=False, disable=None
        )
        found = dict(zip(folders, bar, strict=True))
    left_out, litter = (collections.defaultdict(collections.Counter) for _ in range(2))
    for folder, listing in found.items():
        left_out[folder.partition("/")[0]].update(listing.left_out)
        litter[folder.partition("/")[0]].update(listing.litter)
    for split, names in litter.items():
        _say_litter(top / split, names)
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
    empty = [folder for folder, listing in found.items() if not listing.paths and folder not in optional]
    if empty:
        raise DatasetError(f"{top} has class folders without an image: {some(empty)}; fill or remove them.")
    return found


def by_class(
    listings: list[records.Listing], labels: Sequence[int] | None = None
) -> tuple[records.Listing, np.ndarray]:
    """One listing after the other, and the labels of the files: `labels` of the listings, or their places."""
    paths = [path for listing in listings for path in listing.paths]
    labels = range(len(listings)) if labels is None else labels
    each = np.repeat(np.array(labels), [len(listing.paths) for listing in listings])
    return records.Listing(paths, np.concatenate([listing.states for listing in listings])), each


def splits(config, top: pathlib.Path, *labelled: tuple[records.Listing, Sequence[int]]):
    """The train, the test and any validation split from the files below `top` and the labels of each."""
    names = ("train", "test", "validation")[: len(labelled)]
    files = {name: records.Files(top, *one) for name, one in zip(names, labelled, strict=True)}
    return records.splits(config, top.name, files)


def image_files(folder: str | os.PathLike) -> list[str]:
    """Paths of all that image files are named like, at any depth below a folder, sorted; litter is left out.

    Raises:
      OSError: a folder cannot be read.
      DatasetError: there are too many.
    """
    return _walk(folder)[0]


def _walk(folder: str | os.PathLike) -> tuple[list[str], collections.Counter, collections.Counter]:
    """(paths as of `image_files`, {suffix: count} of files that are left out, {name: count} of litter)."""
    paths, left_out, litter = [], collections.Counter(), collections.Counter()
    waiting, visited = [os.fspath(folder)], set()
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in visited:  # a link back to a folder above
            continue
        visited.add(real)
        with os.scandir(here) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):  # of two links, the same on any disk
                suffix = os.path.splitext(entry.name)[1].lower()
                if _is_litter(entry.name):
                    litter[entry.name] += 1
                elif suffix in images.suffixes():
                    paths.append(entry.path)
                elif entry.is_dir():
                    waiting.append(entry.path)
                else:
                    left_out[suffix] += 1
        if len(paths) > limits.MAX_FILES:
            raise DatasetError(f"{os.fspath(folder)} has over {limits.MAX_FILES} files; choose another.")
    return sorted(paths), left_out, litter


def _list(folder: pathlib.Path) -> records.Listing:
    return list_paths(*_walk(folder))


def list_paths(paths: list[str], left_out=(), litter=()) -> records.Listing:
    """The listing of these files, of which those that cannot be opened are told."""
    states, refused = [], []
    for path in paths:
        try:
            state = os.stat(path)
            images.check_regular(path, state)
            states.append((state.st_size, state.st_mtime_ns, state.st_ctime_ns))
        except (OSError, ValueError) as error:  # the second of a name that no file can have
            refused.append(f"{path!r}"[1:-1] + f" cannot be read ({getattr(error, 'strerror', error)})")
        except DatasetError as error:
            refused.append(str(error))
    return records.Listing(
        paths, np.array(states, np.int64).reshape(-1, 3), dict(left_out), dict(litter), refused
    )
