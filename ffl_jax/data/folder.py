"""Image folders: `train/<class>/*` and `test/<class>/*`, PNG or JPEG files, any depth inside a class."""

import concurrent.futures
import contextlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from ffl_jax.data import base, records
from ffl_jax.errors import DatasetError

_EXTENSIONS = (".png", ".jpg", ".jpeg")
_LAYOUT = "it must hold train/<class>/* and test/<class>/* (or val/<class>/*) with PNG or JPEG files"
# Listing a folder waits for the disk or the network, hardly for the processor.
_LISTING_THREADS = 16


@base.SOURCES.register("folder")
def load(config):
    """Reads `config.data_dir`; class names are the folder names, sorted, and files are sorted within a class.

    The test split is `test`, or `val` in trees without one. Hidden files and folders and files with other
    extensions are left out.
    """
    top = root(config, "your images", _LAYOUT)
    test = "val" if (top / "val").exists() and not (top / "test").exists() else "test"
    return load_tree(config, top, test, _LAYOUT)


def root(config, title: str, layout: str) -> pathlib.Path:
    """The folder `config.data_dir` of `title`, for sources that hold files as `layout` says."""
    if not config.data_dir:
        raise DatasetError(f"config.data.data_dir is not set: give the folder of {title}; {layout}.")
    top = pathlib.Path(config.data_dir).expanduser().absolute()
    if not top.exists():
        raise DatasetError(f"config.data.data_dir {top} does not exist; {layout}.")
    if not top.is_dir():
        raise DatasetError(f"config.data.data_dir {top} is a file, not a folder; {layout}.")
    return top


def load_tree(config, top: pathlib.Path, test: str, layout: str):
    """(train split, test split, class names) of `top/train/<class>/*` and `top/TEST/<class>/*`."""
    names = {split: class_folders(top, split, layout) for split in ("train", test)}
    listed = list_files(top, [f"{split}/{name}" for split in names for name in names[split]])
    train, held_out = names.values()
    if train != held_out:
        parts = [(sorted(set(train) - set(held_out)), "only in train")]
        parts += [(sorted(set(held_out) - set(train)), f"only in {test}")]
        differences = "; ".join(f"{where}: {some(names)}" for names, where in parts if names)
        raise DatasetError(
            f"{top} has different classes in train and {test}, {differences}; make them agree."
        )
    labelled = (by_class([listed[f"{split}/{name}"] for name in names[split]]) for split in names)
    return *splits(config, top, *labelled), tuple(train)


@contextlib.contextmanager
def readable(top: pathlib.Path):
    """Turns what the system refuses inside into a DatasetError."""
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"Cannot read {error.filename or top}: {error.strerror}; check the folder."
        ) from error


def class_folders(top: pathlib.Path, split: str, layout: str) -> list[str]:
    """Names of the folders in `top/split`, sorted."""
    with readable(top):
        if not (top / split).is_dir():
            found = sorted(os.listdir(top))
            held = "is empty" if not found else f"has no folder {split}, only {some(found)}"
            raise DatasetError(f"config.data.data_dir {top} {held}; {layout}.")
        with os.scandir(top / split) as entries:
            classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise DatasetError(f"{top / split} has no class folders; {layout}.")
    return classes


def list_files(top: pathlib.Path, folders: list[str]) -> dict[str, records.Listing]:
    """Lists the image files of each folder below `top`; none may be without one."""
    import tqdm

    with readable(top), concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as executor:
        listings = executor.map(lambda folder: _list(top / folder), folders)
        bar = tqdm.tqdm(
            listings, "Listing files", len(folders), unit="folder", delay=1, leave=False, disable=None
        )
        found = dict(zip(folders, bar, strict=True))
    empty = [folder for folder, listing in found.items() if not listing.paths]
    if empty:
        raise DatasetError(
            f"{top} has class folders without a PNG or JPEG file: {some(empty)}; fill or remove them."
        )
    return found


def by_class(listings: list[records.Listing]) -> tuple[records.Listing, np.ndarray]:
    """One listing after the other, and the labels of the files: the places of their listings."""
    paths = [path for listing in listings for path in listing.paths]
    labels = np.repeat(np.arange(len(listings)), [len(listing.paths) for listing in listings])
    return records.Listing(paths, np.concatenate([listing.states for listing in listings])), labels


def splits(config, top: pathlib.Path, *labelled: tuple[records.Listing, Sequence[int]]):
    """The train and the test split from the files below `top` and the labels of each."""
    # Full paths, so that two trees whose files agree in size and time are never taken for one another. The
    # change time cannot be set by hand: a restored old time is seen, too.
    source = "".join(
        f"{path}\0{row}\0"
        for listing, _ in labelled
        for path, row in zip(listing.paths, listing.states.tolist(), strict=True)
    )
    files = {role: records.Files(top, *one) for role, one in zip(("train", "test"), labelled, strict=True)}
    return records.splits(config, config.name, source, files)


def some(names: list[str]) -> str:
    """The first names, and how many more there are: errors stay on one line."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def image_files(folder: str | os.PathLike) -> list[str]:
    """Paths of the image files at any depth below a folder, sorted; hidden ones are left out.

    Raises:
      OSError: a folder cannot be read.
    """

    def fail(error: OSError):
        raise error  # os.walk would leave an unreadable folder out without a word.

    paths, visited = [], set()
    for here, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(here)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if real in visited:  # a link back to a folder above
            subfolders.clear()
            continue
        visited.add(real)
        wanted = (n for n in names if n.lower().endswith(_EXTENSIONS) and not n.startswith("."))
        paths += [os.path.join(here, name) for name in wanted]
    return sorted(paths)


def _list(folder: pathlib.Path) -> records.Listing:
    paths = image_files(folder)
    states = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, paths)]
    return records.Listing(paths, np.array(states, np.int64).reshape(-1, 3))
