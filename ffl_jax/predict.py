"""Classifies image files: `python -m ffl_jax.predict --model=PATH IMAGE…`. Light on imports, see USAGE."""

import sys

try:  # here, since `cli`, which puts errors into one line, needs them itself
    import numpy  # noqa: F401
    import PIL  # noqa: F401
    from absl import flags
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed: `pip install numpy pillow absl-py`.", file=sys.stderr)
    sys.exit(2)

from ffl_jax import cli, deployment
from ffl_jax.deployment import classify
from ffl_jax.errors import ConfigError, DatasetError

USAGE = f"""
python -m ffl_jax.predict --model=PATH [--top=5] [--json] [--batch_size=32] IMAGE...

Prints the most probable classes of image files, by a file that python -m ffl_jax.export wrote. IMAGE is a
file, a folder (all images below it), or - for one image on standard input. Images may have any
size, colours and orientation. One that cannot be used is named on standard error, the others are classified
all the same, and the exit code is 3.

Beside numpy, pillow and absl-py, a model needs of its format:
{chr(10).join(f"  {name:12} pip install {packages}" for name, packages in deployment.FORMATS.items())}
"""


def command(argv: list[str]):
    values = cli.new_flags()
    flags.DEFINE_string("model", None, "The exported file or folder.", flag_values=values)
    flags.DEFINE_integer("top", 5, "How many classes to show.", 1, flag_values=values)
    flags.DEFINE_bool("json", False, "Prints a line of JSON for each image.", flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "Images that are classified together.", 1, flag_values=values)
    arguments = cli.parse(values, argv, USAGE, arguments=True)
    if not values.model:
        raise ConfigError("--model is missing: give a file that python -m ffl_jax.export wrote.")
    if not arguments:
        raise ConfigError(
            "no image is given: name files or folders after the flags, or - for standard input."
        )

    model, refused = deployment.load(values.model), []

    def refuse(message):
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        refused.append(message)

    settings = (values.top, values.batch_size, values.json)
    for line in classify.lines(model, arguments, refuse, *settings):
        print(line, flush=True)
    if refused:
        count = len(refused)
        raise DatasetError(f"{count} could not be used, named above: replace or leave out these images.")


def run():
    cli.run(command, answers=True)


if __name__ == "__main__":
    run()
