"""The card of an exported file: what it says, and that the program beside it does what it says."""

import json
import reprlib
import sys
from collections.abc import Callable

import numpy as np

from ffl_jax.data import crops, limits
from ffl_jax.errors import CheckpointError

VERSION = 2
PRECISIONS = ("float32", "float16")
INPUTS = ("nhwc-uint8", "nchw-float")
CHECKED_ON = ("test split", "given images", "random images")
# What a version before did not say, for it knew nothing else.
_ADDED = {"input": "nhwc-uint8", "precision": "float32", "checked_on": "test split"}
_ADDED |= {"max_value": limits.MAX_GREY}
_MAX_BYTES = 2**24  # of its text
_MAX_CLASSES = 100_000
_MAX_NETWORKS = 128
_MAX_SIDE = 10_000  # pixels


def _whole(low: int = 0, high: int = sys.maxsize) -> Callable:
    return lambda x: type(x) is int and low <= x <= high


def _number(low: float, high: float = sys.float_info.max) -> Callable:
    return lambda x: type(x) in (int, float) and low <= x <= high  # which NaN never is


def _text(x) -> bool:
    return type(x) is str and 0 < len(x) <= 1000


def _list(holds: Callable, least: int, most: int) -> Callable:
    return lambda x: type(x) is list and least <= len(x) <= most and all(map(holds, x))


def _names(most: int) -> Callable:
    listed = _list(_text, 1, most)
    return lambda x: listed(x) and len(set(x)) == len(x)


def _one_of(choices: tuple[str, ...]) -> tuple[str, Callable]:
    return f"one of {', '.join(choices)}", lambda x: x in choices


def _or_null(holds: Callable) -> Callable:
    return lambda x: x is None or holds(x)


def _scores(x) -> bool:
    return type(x) is dict and all(map(_or_null(_number(-sys.float_info.max)), x.values()))


def _architecture(x) -> bool:
    if type(x) is not dict or not _whole(1, _MAX_CLASSES)(x.get("num_classes")):
        return False
    if "network" in x:
        return _text(x["network"]) and len(x) == 2
    if not _number(0, 1)(x.get("ema_decay", 0)):
        return False
    sections = {key: value for key, value in x.items() if key not in ("num_classes", "ema_decay")}
    if not {"method", "subnetworks"} <= sections.keys() <= {"method", "subnetworks", "teachers"}:
        return False
    counted = [section for key, section in sections.items() if key != "method"]
    return all(type(section) is dict for section in sections.values()) and all(
        _whole(1, _MAX_NETWORKS)(section.get("num")) for section in counted
    )


_NATURAL = "a whole number from 0"
_TEXT = "a text of 1 to 1000 characters"
# key: (what it must be, whether a value is that)
_KEYS: dict[str, tuple[str, Callable]] = {
    "card_version": (f"1 to {VERSION}", _whole(1, VERSION)),
    "ffl_jax": (_TEXT, _text),
    "modules": ("texts", _list(_text, 0, 100)),
    "predictor": (_TEXT, _text),
    "method": (_TEXT, _text),
    "networks": (f"1 to {_MAX_NETWORKS} texts", _list(_text, 1, _MAX_NETWORKS)),
    "dataset": (_TEXT, _text),
    "class_names": (f"1 to {_MAX_CLASSES} texts, no two alike", _names(_MAX_CLASSES)),
    "image_size": (f"[height, width], 1 to {_MAX_SIDE} pixels", _list(_whole(1, _MAX_SIDE), 2, 2)),
    "channels": ("RGB", lambda x: x == "RGB"),
    "crop": _one_of(crops.CROPS),
    "max_value": ("a whole number from 1", _whole(1)),
    "input": _one_of(INPUTS),
    "precision": _one_of(PRECISIONS),
    # Both are of values in 0..1; there is no telling images in 0..255 otherwise.
    "mean": ("3 numbers from -1 to 1", _list(_number(-1, 1), 3, 3)),
    "std": ("3 numbers from 0.0001 to 10", _list(_number(1e-4, 10), 3, 3)),
    "parameters": (_NATURAL, _whole()),
    "flops": (f"{_NATURAL}, or null", _or_null(_whole())),
    "step": (_NATURAL, _whole()),
    "epoch": ("a number from 0", _number(0)),
    "seed": (_NATURAL, _whole()),
    "test": ("numbers by name, or null", _or_null(_scores)),
    "checked_on": _one_of(CHECKED_ON),
    "architecture": (
        f"num_classes, and a network or the sections of a method with at most {_MAX_NETWORKS} networks",
        _architecture,
    ),
}


def parse(text: str | bytes) -> dict:
    """The card that a file holds.

    Raises:
      CheckpointError: naming a key that is missing, not known, or has another value than it can have.
    """
    if len(text) > _MAX_BYTES:
        raise CheckpointError(f"its card has {len(text):,} bytes, and at most {_MAX_BYTES:,} are read.")
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its card is not JSON ({error}): export it again.") from error
    if type(card) is not dict:
        raise CheckpointError("its card is not an object of JSON: export it again.")
    version = card.get("card_version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"its card_version is {version}, and this version of ffl_jax reads {VERSION}: use a newer one."
        )
    known = _KEYS if version != 1 else {key: row for key, row in _KEYS.items() if key not in _ADDED}
    for key, (wanted, holds) in known.items():
        if key not in card:
            raise CheckpointError(f"its card has no {key}: export it again.")
        if not holds(card[key]):
            raise CheckpointError(
                f"its card's {key} is {reprlib.repr(card[key])}, and must be {wanted}: export it again."
            )
    if unknown := card.keys() - known.keys():
        raise CheckpointError(f"its card has a key that is not known, {min(unknown)!r}: export it again.")
    return _ADDED | card | {"card_version": VERSION}


def input_of(card: dict) -> tuple[str, tuple[int, int, int]]:
    """(type, shape without the batch) of the images that its program takes."""
    height, width = card["image_size"]
    by_name = {"nhwc-uint8": ("uint8", (height, width, 3)), "nchw-float": ("float32", (3, height, width))}
    return by_name[card["input"]]


def as_input(card: dict, images: np.ndarray) -> np.ndarray:
    """Images uint8 [B, H, W, 3] in the form that its program takes."""
    if card["input"] == "nhwc-uint8":
        return images
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def check_program(card: dict, images: tuple, logits: tuple):
    """Raises CheckpointError unless a program takes and gives what its card says.

    Args: images, logits: (name of the type, shape) of the only input and the only output, where a number of
      images that is left open is not an int.
    """
    dtype, shape = input_of(card)
    classes = len(card["class_names"])
    if card["architecture"]["num_classes"] != classes:
        found = f"architecture has {card['architecture']['num_classes']} classes"
        raise CheckpointError(f"its card's class_names are {classes}, and its {found}: export it again.")
    for what, found, wanted in (
        ("image_size", images, (dtype, (None, *shape))),
        ("class_names", logits, ("float32", (None, classes))),
    ):
        kind, shape = found
        shape = tuple(size if isinstance(size, int) else None for size in shape)
        if (kind, shape) != wanted:
            raise CheckpointError(
                f"its card's {what} does not fit its program, which has {kind} {_shape(shape)} where "
                f"{wanted[0]} {_shape(wanted[1])} is meant: export it again."
            )


def _shape(shape) -> str:
    return f"[{', '.join('batch' if size is None else str(size) for size in shape)}]"
