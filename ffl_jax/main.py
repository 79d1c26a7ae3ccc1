"""Trains and evaluates one configuration: `python -m ffl_jax.main --config=configs/DATA.py --workdir=DIR`."""

import logging
import statistics

from absl import flags

from ffl_jax import cli

USAGE = """
python -m ffl_jax.main [--config=configs/DATA.py[:method=M,network=N]] [--workdir=DIR]
                       [--config.KEY=VALUE ...]

Trains, evaluates and writes config.json, metrics.jsonl, summary.json, confusion.csv, curves.png, tensorboard/
and checkpoints/ to the workdir. The same command continues a run that was stopped. Without arguments: FFL on
the embedded digits data.
"""


def parse(argv: list[str]) -> flags.FlagValues:
    """The command line: `config`, `workdir`, `distributed`; raises ConfigError or absl's own errors."""
    values = cli.new_flags()
    flags.DEFINE_string("workdir", None, "Where the run is written; runs/... by default.", flag_values=values)
    distributed = (
        "This is one of several processes that train together, all started with the same arguments; one "
        "alone writes the workdir. Clusters that JAX knows say who they are, otherwise the variables "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do."
    )
    flags.DEFINE_bool("distributed", False, distributed, flag_values=values)
    cli.parse(values, argv, USAGE, config=True)
    return values


def command(argv: list[str]):
    values = parse(argv)

    from ffl_jax.devices import processes
    from ffl_jax.training import loop

    if values.distributed:
        processes.join()
    if not processes.is_first():
        logging.getLogger().setLevel(logging.WARNING)
    workdir = values.workdir or cli.default_workdir(values.config)
    summary = loop.train(values.config, workdir)
    scored = summary["predictors"].items()
    scores = ", ".join(f"{name} {_percent(one['top1'])}" for name, one in scored if "top1" in one)
    if processes.is_first():
        print(f"{summary['status']}: test top-1: {scores}\nwritten to {workdir}")


def _percent(top1: float | list[float]) -> str:
    """Of one seed, or mean and standard deviation over several."""
    if not isinstance(top1, list):
        return f"{100 * top1:.2f} %"
    return f"{100 * statistics.mean(top1):.2f} ± {100 * statistics.stdev(top1):.2f} %"


def run():
    cli.run(command, huge_pages=True)


if __name__ == "__main__":
    run()
