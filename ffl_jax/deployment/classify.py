"""Image files through an exported model. Light on imports: where it runs there may be nothing to train."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ffl_jax.data import base, folder
from ffl_jax.deployment import Model
from ffl_jax.errors import DatasetError


def lines(
    model: Model,
    arguments: list[str],
    refuse: Callable[[str], None],
    top: int = 5,
    batch_size: int = 32,
    as_json: bool = False,
) -> Iterator[str]:
    """The most probable classes of image files, as soon as they are known.

    Args:
      arguments: files, folders (all PNG and JPEG files below them), or "-" for one on standard input.
      refuse: told of each that cannot be used.
      top: how many classes to name.
      batch_size: images that are classified together.
      as_json: {"path": …, "classes": [{"name": …, "index": …, "probability": …}, …]}; else a table.
    """
    paths = list(_paths(arguments, refuse))
    wide, class_wide = max(map(len, (*paths, "image"))), max(map(len, model.class_names))
    if not as_json:
        yield f"{'image':{wide}}  classes, the most probable first"
    size = min(batch_size, len(paths))
    for start in range(0, len(paths), size or 1):
        read = {path: _read(model, path, refuse) for path in paths[start : start + size]}
        images = {path: image for path, image in read.items() if image is not None}
        if images:
            # Always as many, so that nothing is compiled twice; what fills up is not shown.
            batch = np.resize(np.stack(list(images.values())), (size, *model.image_shape))
            for path, probabilities in zip(images, model.probabilities(batch), strict=False):
                chosen = np.argsort(-probabilities, kind="stable")[:top]
                if as_json:
                    yield _json(model, path, probabilities, chosen)
                else:
                    yield f"{path:{wide}}  {_row(model, class_wide, probabilities, chosen)}"
        _progress(start + size, len(paths))


def _paths(arguments, refuse):
    for argument in dict.fromkeys(arguments):
        if not os.path.isdir(argument):
            yield argument
            continue
        try:
            found = folder.image_files(argument)
        except OSError as error:
            refuse(f"{error.filename or argument} cannot be read: {error.strerror}")
            continue
        if not found:
            refuse(f"{argument} holds no PNG or JPEG file")
        yield from found


def _read(model, path, refuse) -> np.ndarray | None:
    try:
        encoded = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        with base.damage_named(path, encoded, "replace or leave out the file"):
            return model.read_image(encoded)
    except OSError as error:
        refuse(f"{path} cannot be read: {error.strerror}")
    except DatasetError as error:
        refuse(" ".join(str(error).split()))
    return None


def _row(model, wide, probabilities, chosen):
    return "  ".join(f"{model.class_names[k]:{wide}} {100 * probabilities[k]:6.2f} %" for k in chosen)


def _json(model, path, probabilities, chosen):
    classes = [
        {"name": model.class_names[k], "index": int(k), "probability": round(float(probabilities[k]), 6)}
        for k in chosen
    ]
    return json.dumps({"path": path, "classes": classes})


def _progress(done, total):
    """On the terminal, where the results go elsewhere: they show by themselves how far it is."""
    if sys.stderr.isatty() and not sys.stdout.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{min(done, total)} of {total} images", end=end, file=sys.stderr, flush=True)
