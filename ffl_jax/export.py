"""Writes one deployable network: `python -m ffl_jax.export --workdir=DIR --predictor=NAME --output=PATH`."""

import os

from absl import flags

from ffl_jax import cli, deployment
from ffl_jax.deployment import card as cards

USAGE = """
python -m ffl_jax.export --workdir=DIR [--predictor=NAME] [--format=stablehlo|safetensors|onnx|huggingface]
                         --output=PATH [--step=N] [--data_dir=DIR | --images=FOLDER,FILE,...]
                         [--precision=float32|float16] [--input=nhwc-uint8|nchw-float] [--opset=N]

Writes one prediction of a finished or running training as a file that python -m ffl_jax.predict takes: raw
images in, logits out. What only training needs is gone. A new process reads the file again and must compute
what the checkpoint does on images of the test split, else nothing is written. Where the dataset is gone, it
does so on --images, or on random ones. docs/deploy.md says what the formats are for and how other programs
use them.
"""

_IMAGES = {
    "test split": "images of the test split",
    "given images": "images of --images",
    "random images": "random images, for want of the dataset",
}


def command(argv: list[str]):
    values = cli.new_flags()
    flags.DEFINE_string("workdir", None, "The folder of the training.", flag_values=values)
    flags.DEFINE_string(
        "predictor", None, "Which prediction; by default what summary.json calls deploy.", flag_values=values
    )
    flags.DEFINE_enum(
        "format", "stablehlo", list(deployment.FORMATS), "The kind of file.", flag_values=values
    )
    flags.DEFINE_string("output", None, "The file to write; of huggingface a folder.", flag_values=values)
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Where the dataset is now, if it has moved.", flag_values=values)
    flags.DEFINE_list("images", "", "Images to compare on, in place of the dataset's.", flag_values=values)
    flags.DEFINE_enum(
        "precision", "float32", cards.PRECISIONS, "In which the file computes.", flag_values=values
    )
    flags.DEFINE_enum(
        "input", "nhwc-uint8", cards.INPUTS, "What a program takes; floats from 0 to 1.", flag_values=values
    )
    flags.DEFINE_integer("opset", None, "The operator set of ONNX, 17 by default.", flag_values=values)
    cli.parse(values, argv, USAGE)
    for name in ("workdir", "output"):
        if not values[name].value:
            raise cli.ConfigError(f"--{name} is missing; see --help.")

    # Here and in the process that compares: an accelerator would be taken by the first of the two.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ffl_jax.deployment import exporting

    names = ("workdir", "output", "format", "predictor", "step", "data_dir", "images")
    more = ("input", "precision", "opset")
    report = exporting.export(*(values[name].value for name in (*names, *more)))
    card, times = report.card, report.milliseconds.items()
    print(f"{card['predictor']} of {card['method']} ({' + '.join(card['networks'])}), step {card['step']}")
    print(f"parameters {card['parameters']:,}, FLOPs {card['flops'] or 0:,}, file {report.bytes:,} bytes")
    print(
        f"largest difference from the checkpoint {report.difference:.1e}, where logits reach "
        f"{report.scale:.1f}, on {report.images} {_IMAGES[card['checked_on']]}"
    )
    latency = ", ".join(f"{time:.2f} ms for {size} image{'s' * (size > 1)}" for size, time in times)
    print(f"latency on {report.device}: {latency}")
    print(f"written to {values.output}; try it with python -m ffl_jax.predict --model={values.output} IMAGE")


def run():
    cli.run(command)


if __name__ == "__main__":
    run()
