"""Tiny ImageNet: 200 classes, 64x64 pixels, 500 training and 50 validation images of each."""

import os
import pathlib

from ffl_jax.data import base, folder, images, records, roles
from ffl_jax.errors import DatasetError

_LAYOUT = (
    "it must hold what tiny-imagenet-200.zip (cs231n.stanford.edu) does: wnids.txt, words.txt, "
    "train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt, or val/<wnid>/*.JPEG"
)


@base.SOURCES.register("tiny_imagenet")
def load(config):
    """Reads the published tree in `config.data_dir`; the test split is `val`, since `test` has no labels.

    Many have sorted `val` into folders of classes, which then count, whatever else is there.

    Classes are sorted by WordNet number and named by their words, and by the number, too, where two classes
    have the same words.
    """
    top = folder.root(config, "Tiny ImageNet", _LAYOUT)
    wnids = sorted(_lines(top / "wnids.txt"))
    trained = [f"train/{wnid}/images" for wnid in wnids]
    tested = [f"val/{wnid}" for wnid in wnids]
    if not any((top / name).is_dir() for name in tested):
        tested = ["val/images"]
    listed = folder.list_files(top, trained + tested)
    train, test = (folder.by_class([listed[name] for name in names]) for names in (trained, tested))
    if tested == ["val/images"]:
        test = test[0], _annotations(top / "val" / "val_annotations.txt", test[0], wnids)
    return *folder.splits(config, top, train, test), _names(top / "words.txt", wnids)


def _annotations(path: pathlib.Path, listing: records.Listing, wnids: list[str]) -> list[int]:
    """The label of each file, from lines of `file <tab> wnid <tab> box`."""
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    wnid_of = _table(path)
    names = [os.path.basename(file) for file in listing.paths]
    unknown = [name for name in names if wnid_of.get(name) not in label_of]
    if unknown:
        raise DatasetError(
            f"{path} gives no class of wnids.txt to {roles.some(unknown)}; unpack the archive again."
        )
    return [label_of[wnid_of[name]] for name in names]


def _names(path: pathlib.Path, wnids: list[str]) -> tuple[str, ...]:
    words = _table(path)
    names = [words.get(wnid, wnid) for wnid in wnids]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({wnid})"
        for name, wnid in zip(names, wnids, strict=True)
    )


def _table(path: pathlib.Path) -> dict[str, str]:
    """{first field: second} of its lines, whose fields are separated by tabs."""
    return dict(line.split("\t")[:2] for line in _lines(path) if "\t" in line)


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return [line for line in images.read_file(path).decode("utf-8").splitlines() if line]
    except FileNotFoundError as error:
        raise DatasetError(
            f"config.data.data_dir has no {path}; {_LAYOUT}. Where val has class folders, set "
            "config.data.name=folder."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"Cannot read {path}: {error}; unpack the archive again.") from error
