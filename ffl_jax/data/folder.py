"""Image folders: `train/<class>/*` and `test/<class>/*`, PNG or JPEG files, any depth inside a class."""

import os
import pathlib

import numpy as np

from ffl_jax.data import base, cache
from ffl_jax.errors import DatasetError

_EXTENSIONS = (".png", ".jpg", ".jpeg")
_LAYOUT = "it must hold train/<class>/* and test/<class>/* with PNG or JPEG files"


@base.SOURCES.register("folder")
def load(config) -> tuple[base.Split, base.Split, tuple[str, ...]]:
    """Reads `config.data_dir`; class names are the folder names, sorted, and files are sorted within a class.

    Hidden files and folders and files with other extensions are left out.
    """
    if not config.data_dir:
        raise DatasetError(f"config.data.data_dir is not set: give the folder of your images; {_LAYOUT}.")
    root = pathlib.Path(config.data_dir).expanduser().absolute()
    try:
        files = {split: _find(root, split) for split in ("train", "test")}
        class_names = _class_names(root, files)
        paths = {split: [path for name in class_names for path in files[split][name]] for split in files}
        states = [f"{path}\0{cache.file_state(path)}\0" for split in files for path in paths[split]]
    except OSError as error:
        raise DatasetError(
            f"Cannot read {error.filename or root}: {error.strerror}; check the folder."
        ) from error

    def build() -> cache.Arrays:
        return {split: _decode(paths[split], config.image_size, f"Decoding {split}") for split in files}

    # Full paths, so that two trees whose files agree in size and time are never taken for one another.
    images = cache.cached("folder", f"{config.image_size}\0{''.join(states)}", config.cache_dir, build)
    splits = {}
    for split in files:
        counts = [len(files[split][name]) for name in class_names]
        splits[split] = base.Split(images[split], np.repeat(np.arange(len(counts)), counts))
    return splits["train"], splits["test"], class_names


def _find(root: pathlib.Path, split: str) -> dict[str, list[str]]:
    """Returns {class: sorted paths of its image files}."""
    if not root.exists():
        raise DatasetError(f"config.data.data_dir {root} does not exist; {_LAYOUT}.")
    if not root.is_dir():
        raise DatasetError(f"config.data.data_dir {root} is a file, not a folder; {_LAYOUT}.")
    if not (root / split).is_dir():
        found = sorted(os.listdir(root))
        held = "is empty" if not found else f"has no folder {split}, only {_some(found)}"
        raise DatasetError(f"config.data.data_dir {root} {held}; {_LAYOUT}.")
    with os.scandir(root / split) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise DatasetError(f"{root / split} has no class folders; {_LAYOUT}.")
    return {name: _images(root / split / name) for name in classes}


def _images(top: pathlib.Path) -> list[str]:
    def fail(error: OSError):
        raise error  # os.walk would leave an unreadable folder out without a word.

    paths, visited = [], set()
    for folder, subfolders, names in os.walk(top, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if real in visited:  # a link back to a folder above
            subfolders.clear()
            continue
        visited.add(real)
        wanted = (n for n in names if n.lower().endswith(_EXTENSIONS) and not n.startswith("."))
        paths += [os.path.join(folder, name) for name in wanted]
    return sorted(paths)


def _class_names(root: pathlib.Path, files: dict[str, dict[str, list[str]]]) -> tuple[str, ...]:
    empty = [f"{split}/{name}" for split in files for name, paths in files[split].items() if not paths]
    if empty:
        raise DatasetError(
            f"{root} has class folders without a PNG or JPEG file: {_some(empty)}; fill or remove them."
        )
    train, test = (set(files[split]) for split in ("train", "test"))
    if train != test:
        parts = [(train - test, "only in train"), (test - train, "only in test")]
        differences = "; ".join(f"{where}: {_some(sorted(names))}" for names, where in parts if names)
        raise DatasetError(f"{root} has different classes in train and test, {differences}; make them agree.")
    return tuple(sorted(train))


def _decode(paths: list[str], image_size: int, title: str) -> np.ndarray:
    def read(chunk: range):
        for position in chunk:
            path = paths[position]
            try:
                yield path, pathlib.Path(path).read_bytes()
            except OSError as error:
                raise DatasetError(f"Cannot read {path}: {error.strerror}; restore or remove it.") from error

    return base.decode_all(read, len(paths), image_size, title, "replace or remove the file")


def _some(names: list[str]) -> str:
    """The first names, and how many more there are: errors stay on one line."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
