"""Says what this machine has and what is missing: `python -m ffl_jax.doctor [--config=configs/DATA.py]`."""

import shlex
from pathlib import Path

from absl import flags

from ffl_jax import cli
from ffl_jax.errors import FFLError

USAGE = """
python -m ffl_jax.doctor [--config=configs/DATA.py[:PRESETS]] [--workdir=DIR] [--config.KEY=VALUE ...]

Prints versions, devices, free space, whether the configuration is sound, its dataset and teachers found, and
what to run next. Decodes every image once, some 200 photographs a second for each processor, and names those
that cannot be used. Writes nothing but the cache of the decoded dataset. Ends with the exit code with which
training would be refused.
"""


def command(argv: list[str]):
    values, given = cli.new_flags(), argv[1:]  # parsing takes --config out of argv
    flags.DEFINE_string("workdir", None, "Where the run would be written.", flag_values=values)
    cli.parse(values, argv, USAGE, config=True)
    workdir = Path(values.workdir or cli.default_workdir(values.config))

    from ffl_jax.training import doctor

    failure = None
    for title, found in doctor.examine(values.config, workdir):
        if isinstance(found, FFLError):
            failure, found = failure or found, f"NOT USABLE: {found}"
        _say(title, found)
    if failure:
        raise failure
    others = [argument for argument in given if not argument.startswith(("--workdir", "--debug"))]
    _say("run next", shlex.join(["python", "-m", "ffl_jax.main", *others, f"--workdir={workdir}"]))


def _say(title: str, text: str):
    print(f"{title + ':':15} {text}", flush=True)


def run():
    cli.run(command, answers=True)


if __name__ == "__main__":
    run()
