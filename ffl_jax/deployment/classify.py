"""Image files through an exported model. Light on imports: where it runs there may be nothing to train."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np

from ffl_jax.data import folder, images, limits
from ffl_jax.deployment import Model
from ffl_jax.errors import DatasetError, FFLError, ResourceError


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
      arguments: files, folders (all images below them), or "-" for one on standard input.
      refuse: told of each that cannot be used.
      top: how many classes to name.
      batch_size: images that are classified together.
      as_json: {"path": …, "classes": [{"name": …, "index": …, "probability": …}, …]}; else a table.
    """
    paths = list(find(arguments, refuse))
    names = list(map(_printable, model.class_names))
    class_wide = max(map(len, names))
    names = [name.ljust(class_wide) for name in names]
    wide = max(map(len, ("image", *map(_printable, paths))))
    if not as_json:
        yield f"{'image':{wide}}  classes, the most probable first"
    size = min(batch_size, len(paths))
    for start in range(0, len(paths), size or 1):
        decoded = {path: read(model, path, refuse) for path in paths[start : start + size]}
        usable = {path: image for path, image in decoded.items() if image is not None}
        if usable:
            # Always as many, so that nothing is compiled twice; what fills up is not shown.
            batch = np.resize(np.stack(list(usable.values())), (size, *model.image_shape))
            for path, probabilities in zip(usable, _probabilities(model, batch), strict=False):
                chosen = np.argsort(-probabilities, kind="stable")[:top]
                if as_json:
                    yield _json(model, path, probabilities, chosen)
                else:
                    yield f"{_printable(path):{wide}}  {_row(names, probabilities, chosen)}"
        _progress(start + size, len(paths))


def find(arguments: list[str], refuse: Callable[[str], None]) -> Iterator[str]:
    """Paths of images; see `lines`."""
    for argument in dict.fromkeys(arguments):
        if not os.path.isdir(argument):
            yield argument
            continue
        try:
            found = folder.image_files(argument)
        except OSError as error:
            refuse(f"{error.filename or argument} cannot be read: {error.strerror}")
            continue
        except DatasetError as error:
            refuse(str(error))
            continue
        if not found:
            refuse(f"{argument} holds no image")
        yield from found


def _probabilities(model, batch):
    try:
        return model.probabilities(batch)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise ResourceError(f"out of memory for {len(batch)} images: lower --batch_size.") from error
        raise


def read(model: Model, path: str, refuse: Callable[[str], None]) -> np.ndarray | None:
    """One image as the model takes it, uint8 [H, W, 3]; None where it cannot be used; see `lines`."""
    try:
        encoded = _standard_input() if path == "-" else images.read_file(path)
        with images.damage_named(path, encoded, "replace or leave out the file"):
            return model.read_image(encoded)
    except OSError as error:
        refuse(f"{path} cannot be read: {error.strerror}")
    except MemoryError:
        refuse(f"{path} needs more memory than there is; replace or leave out the file")
    except FFLError as error:
        refuse(str(error))
    return None


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed")
    encoded = sys.stdin.buffer.read(limits.MAX_FILE_BYTES + 1)
    if len(encoded) > limits.MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {limits.MAX_FILE_BYTES:,} bytes")
    return encoded


def _printable(text) -> str:
    """A row of the table stays one, whatever is in a name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _row(names, probabilities, chosen):
    return "  ".join(f"{names[k]} {100 * probabilities[k]:6.2f} %" for k in chosen)


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
