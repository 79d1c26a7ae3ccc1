"""Scores a checkpoint again: `python -m ffl_jax.evaluate --workdir=DIR [--step=N] [--split=test]`."""

from pathlib import Path

from absl import flags

from ffl_jax import cli

USAGE = """
python -m ffl_jax.evaluate --workdir=DIR [--step=N] [--split=test|validation|train]

Scores every prediction of a finished or running training from its checkpoint alone, and writes nothing.
"""


def command(argv: list[str]):
    values = cli.new_flags()
    flags.DEFINE_string("workdir", None, "The folder of the training.", flag_values=values)
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.", flag_values=values)
    flags.DEFINE_enum("split", "test", ["test", "validation", "train"], "What to score.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Where the dataset is now, if it has moved.", flag_values=values)
    cli.parse(values, argv, USAGE)
    if not values.workdir:
        raise cli.ConfigError("--workdir is missing: give the folder of a training.")

    from ffl_jax.training import scoring

    step, scores = scoring.evaluate_checkpoint(
        Path(values.workdir), values.step, values.split, values.data_dir
    )
    print(f"step {step}, {values.split} split")
    print("| prediction | top-1 % | top-5 % | NLL | ECE |\n| --- | --- | --- | --- | --- |")
    for name, one in scores["predictions"].items():
        top1, top5 = 100 * one["top1"], 100 * one["top5"]
        print(f"| {name} | {top1:.2f} | {top5:.2f} | {one['nll']:.4f} | {one['ece']:.4f} |")


def run():
    cli.run(command, answers=True)


if __name__ == "__main__":
    run()
