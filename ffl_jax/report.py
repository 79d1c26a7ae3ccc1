"""Compares finished runs: `python -m ffl_jax.report RUN_DIR… --output=DIR`."""

from pathlib import Path

from absl import flags

from ffl_jax import cli

USAGE = """
python -m ffl_jax.report RUN_DIR... --output=DIR

Compares finished runs and writes report.md, index.html (the same as a page that needs no other file),
results.csv (every number) and figures. RUN_DIR is the workdir of a run or of several seeds, or a folder that
holds such folders. Means and deviations are over seeds; runs that do not compare are named.
"""


def command(argv: list[str]):
    values = cli.new_flags()
    flags.DEFINE_string("output", None, "The folder for the report.", flag_values=values)
    folders = cli.parse(values, argv, USAGE, arguments=True)
    if not folders:
        raise cli.ConfigError(
            "no run is given: name folders of runs, python -m ffl_jax.report RUN_DIR... --output=DIR."
        )
    if not values.output:
        raise cli.ConfigError("--output is missing: give a folder for the report.")

    from ffl_jax.reporting import report

    written = report.write(folders, Path(values.output))
    print(f"written to {values.output}: {', '.join(path.name for path in written)}")


def run():
    cli.run(command)


if __name__ == "__main__":
    run()
