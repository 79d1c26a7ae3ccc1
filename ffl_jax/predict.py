"""Classifies image files: `python -m ffl_jax.predict --model=PATH IMAGE…`. Light on imports, see USAGE."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

try:  # here, since `cli`, which puts errors into one line, needs them itself
    import numpy as np
    import PIL  # noqa: F401
    from absl import flags
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed: `pip install numpy pillow absl-py`.", file=sys.stderr)
    sys.exit(2)

from ffl_jax import cli, deployment
from ffl_jax.data import base, folder
from ffl_jax.errors import ConfigError, DatasetError

USAGE = f"""
python -m ffl_jax.predict --model=PATH [--top=5] [--json] [--batch_size=32] IMAGE...

Prints the most probable classes of image files, by a file that python -m ffl_jax.export wrote. IMAGE is a
file, a folder (all PNG and JPEG files below it), or - for one image on standard input. Images may have any
size, colours and orientation. One that cannot be used is named on standard error, the others are classified
all the same, and the exit code is 3.

Beside numpy, pillow and absl-py, a model needs of its format:
{chr(10).join(f"  {name:12} pip install {packages}" for name, packages in deployment.FORMATS.items())}
"""


def command(argv: list[str]):
    values = cli.new_flags()
    flags.DEFINE_string("model", None, "The exported file.", flag_values=values)
    flags.DEFINE_integer("top", 5, "How many classes to show.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("json", False, "Prints a line of JSON for each image.", flag_values=values)
    flags.DEFINE_integer(
        "batch_size", 32, "Images that are classified together.", lower_bound=1, flag_values=values
    )
    arguments = cli.parse(values, argv, USAGE, arguments=True)
    if not values.model:
        raise ConfigError("--model is missing: give a file that python -m ffl_jax.export wrote.")
    if not arguments:
        raise ConfigError(
            "no image is given: name files or folders after the flags, or - for standard input."
        )

    model = deployment.load(values.model)
    refused: list[str] = []
    paths = list(_paths(arguments, refused))
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    show = _json_lines(model) if values.json else _table(model, paths)
    size = min(values.batch_size, len(paths))
    for start in range(0, len(paths), size or 1):
        images = {}
        for path in paths[start : start + size]:
            image = _read(model, path, refused)
            if image is not None:
                images[path] = image
        if images:
            # Always as many, so that nothing is compiled twice; what fills up is not shown.
            batch = np.resize(np.stack(list(images.values())), (size, *model.image_shape))
            for path, probabilities in zip(images, model.probabilities(batch), strict=False):
                show(path, probabilities, np.argsort(-probabilities, kind="stable")[: values.top])
            sys.stdout.flush()
        _progress(start + size, len(paths))
    if refused:
        raise DatasetError(
            f"{len(refused)} could not be used, named above: replace or leave out these images."
        )


def _paths(arguments: list[str], refused: list[str]) -> Iterator[str]:
    for argument in dict.fromkeys(arguments):
        if not os.path.isdir(argument):
            yield argument
            continue
        try:
            found = folder.image_files(argument)
        except OSError as error:
            found = []
            _refuse(f"{error.filename or argument} cannot be read: {error.strerror}", refused)
        else:
            if not found:
                _refuse(f"{argument} holds no PNG or JPEG file", refused)
        yield from found


def _read(model, path, refused) -> np.ndarray | None:
    try:
        encoded = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        with base.damage_named(path, encoded, "replace or leave out the file"):
            return model.read_image(encoded)
    except OSError as error:
        _refuse(f"{path} cannot be read: {error.strerror}", refused)
    except DatasetError as error:
        _refuse(" ".join(str(error).split()), refused)
    return None


def _refuse(message, refused):
    print(f"error: {message}", file=sys.stderr, flush=True)
    refused.append(message)


def _table(model, paths):
    wide = max(map(len, (*paths, "image")))
    class_wide = max(map(len, model.class_names))
    print(f"{'image':{wide}}  classes, the most probable first")

    def show(path, probabilities, chosen):
        shown = [f"{model.class_names[k]:{class_wide}} {100 * probabilities[k]:6.2f} %" for k in chosen]
        print(f"{path:{wide}}  {'  '.join(shown)}")

    return show


def _json_lines(model):
    def show(path, probabilities, chosen):
        classes = [
            {"name": model.class_names[k], "index": int(k), "probability": round(float(probabilities[k]), 6)}
            for k in chosen
        ]
        print(json.dumps({"path": path, "classes": classes}))

    return show


def _progress(done, total):
    """On the terminal, where the results go elsewhere: they show by themselves how far it is."""
    if sys.stderr.isatty() and not sys.stdout.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{min(done, total)} of {total} images", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(command)
