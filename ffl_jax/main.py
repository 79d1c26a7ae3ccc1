"""Trains and evaluates one configuration: `python -m ffl_jax.main --config=configs/DATA.py --workdir=DIR`."""

from absl import flags

from ffl_jax import cli

USAGE = """
python -m ffl_jax.main [--config=configs/DATA.py[:method=M,network=N]] [--workdir=DIR]
                       [--config.KEY=VALUE ...]

Trains, evaluates and writes config.json, metrics.jsonl, summary.json, curves.png, tensorboard/ and
checkpoints/ to the workdir. The same command continues a run that was stopped. Without arguments: FFL on the
embedded digits data.
"""


def command(argv: list[str]):
    values = cli.new_flags()
    flags.DEFINE_string("workdir", None, "Where the run is written; runs/... by default.", flag_values=values)
    cli.parse(values, argv, USAGE, config=True)

    from ffl_jax import train

    workdir = values.workdir or cli.default_workdir(values.config)
    summary = train.train(values.config, workdir)
    scores = ", ".join(
        f"{name} {100 * one['top1']:.2f} %" for name, one in summary["predictors"].items() if "top1" in one
    )
    print(f"{summary['status']}: test top-1: {scores}\nwritten to {workdir}")


if __name__ == "__main__":
    cli.run(command)
