"""Scores a checkpoint again: `python -m ffl_jax.evaluate --workdir=DIR [--step=N] [--split=test]`."""

from pathlib import Path

from absl import flags

from ffl_jax import cli

USAGE = """
python -m ffl_jax.evaluate --workdir=DIR [--step=N] [--split=test|validation|train]
                           [--predictor=NAME] [--per_class] [--confusion]

Scores every prediction of a finished or running training from its checkpoint alone, and tells which classes
the one to ship, or --predictor, takes for which. It writes nothing.
"""


def command(argv: list[str]):
    values = cli.new_flags()
    flags.DEFINE_string("workdir", None, "The folder of the training.", flag_values=values)
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.", flag_values=values)
    flags.DEFINE_enum("split", "test", ["test", "validation", "train"], "What to score.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Where the dataset is now, if it has moved.", flag_values=values)
    flags.DEFINE_string("predictor", None, "Whose classes; by default what is shipped.", flag_values=values)
    flags.DEFINE_bool("per_class", False, "All classes, not the worst alone.", flag_values=values)
    flags.DEFINE_bool("confusion", False, "The confusion matrix as CSV, and no more.", flag_values=values)
    cli.parse(values, argv, USAGE)
    if not values.workdir:
        raise cli.ConfigError("--workdir is missing: give the folder of a training.")

    from ffl_jax.reporting import by_class
    from ffl_jax.training import confusion, scoring

    step, scores = scoring.evaluate_checkpoint(
        Path(values.workdir), values.step, values.split, values.data_dir, values.predictor
    )
    if values.confusion:
        print(confusion.csv_of(scores["classes"], scores["per_class"]["names"]), end="")
        return
    print(f"step {step}, {values.split} split")
    print("| prediction | top-1 % | top-5 % | NLL | ECE | balanced % |")
    print("| --- | --- | --- | --- | --- | --- |")
    balanced = scores["classes"]["balanced_accuracy"]
    for name, one in scores["predictions"].items():
        top1, top5, nll, ece = 100 * one["top1"], 100 * one["top5"], one["nll"], one["ece"]
        print(f"| {name} | {top1:.2f} | {top5:.2f} | {nll:.4f} | {ece:.4f} | {100 * balanced[name]:.2f} |")
    print(by_class.of_one(scores["per_class"], everything=values.per_class))


def run():
    cli.run(command, answers=True)


if __name__ == "__main__":
    run()
