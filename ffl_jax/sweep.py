"""Trains methods x networks x seeds and compares them: `python -m ffl_jax.sweep --config=… --output=DIR`."""

import contextlib
from pathlib import Path

from absl import flags

from ffl_jax import cli, main

USAGE = """
python -m ffl_jax.sweep --output=DIR [--config=configs/DATA.py[:PRESETS]] [--methods=ffl,independent]
                        [--networks=resnet8,resnet20+resnet32] [--seeds=0,1,2] [--together]
                        [--jobs=N] [--slurm="OPTIONS OF sbatch"] [--config.KEY=VALUE ...]

Trains every method with every network and seed, each in DIR/METHOD-NETWORK-seedN, and writes a report to
DIR/report: one run after another, or N at once, which divide the GPUs and cores. What follows --config holds
for all runs; recipe=common among the PRESETS trains all methods by the same recipe, where each would take its
published one. The same command continues a sweep that was stopped, and adds methods, networks and seeds to
one that was complete.
"""


def command(argv: list[str]):
    values = cli.new_flags()
    for name, default, text in (
        ("output", None, "The folder for the runs and the report."),
        ("config", "configs/digits.py", "Configuration file, PRESETS after a colon."),
        ("slurm", None, "Submits an array of jobs with these options of sbatch, and returns."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    flags.DEFINE_list("methods", None, "Which; all by default.", flag_values=values)
    flags.DEFINE_list("networks", None, "Which; that of the configuration by default.", flag_values=values)
    flags.DEFINE_list("seeds", "0", "A run for each.", flag_values=values)
    flags.DEFINE_integer("jobs", 1, "Runs at once.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("together", False, "Consecutive seeds share one program.", flag_values=values)
    overrides = [argument for argument in argv[1:] if argument.startswith("--config.")]
    cli.parse(values, [argument for argument in argv if argument not in overrides], USAGE)
    if not values.output:
        raise cli.ConfigError("--output is missing: give a folder for the runs and the report.")
    if values.together and values.slurm is not None:
        raise cli.ConfigError("--together and --slurm exclude each other: Slurm runs the seeds side by side.")
    if values.jobs > 1 and values.slurm is not None:
        raise cli.ConfigError("--jobs and --slurm exclude each other: Slurm runs all of them side by side.")

    from ffl_jax.training import slurm, sweep

    output, lists = Path(values.output).absolute(), (values.methods, values.networks, values.seeds)
    jobs = sweep.plan(main.parse, values.config, overrides, output, *lists, values.together)
    if values.slurm is not None:
        print(slurm.submit(jobs, values.config, overrides, output, values.slurm))
        return
    failed = sweep.train(jobs, min(values.jobs, len(jobs)))
    from ffl_jax.reporting import report

    # A report of nothing is refused, which is no news where nothing could be trained.
    with contextlib.suppress(cli.ConfigError) if failed else contextlib.nullcontext():
        report.write([str(output)], output / "report")
        print(f"report: {output / 'report'}/index.html, report.md, results.csv")
    if failed:
        raise sweep.failure(failed)


def run():
    cli.run(command)


if __name__ == "__main__":
    run()
