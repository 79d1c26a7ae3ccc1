"""Says what this machine has and what is missing: `python -m ffl_jax.doctor [--config=configs/DATA.py]`."""

import shlex
from pathlib import Path

from absl import flags

from ffl_jax import cli
from ffl_jax.errors import FFLError

USAGE = """
python -m ffl_jax.doctor [--config=configs/DATA.py[:PRESETS]] [--workdir=DIR] [--config.KEY=VALUE ...]
python -m ffl_jax.doctor --cache [--prune_cache=GIGABYTES]

Prints versions, devices, free space, whether the configuration is sound, its dataset and teachers found, and
what to run next. Decodes every image once, some 200 photographs a second for each processor, names those
that cannot be used, and tells copies. Writes nothing but the cache of the decoded dataset. Ends with the exit
code with which training would be refused. With --cache it lists that cache instead.
"""


def command(argv: list[str]):
    values, given = cli.new_flags(), argv[1:]  # parsing takes --config out of argv
    flags.DEFINE_string("workdir", None, "Where the run would be written.", flag_values=values)
    flags.DEFINE_bool("cache", False, "Lists the decoded images that are kept.", flag_values=values)
    flags.DEFINE_float(
        "prune_cache",
        None,
        "Removes those that were not used for the longest time, until so many gigabytes are left.",
        lower_bound=0.0,
        flag_values=values,
    )
    cli.parse(values, argv, USAGE, config=True)
    if values.cache or values.prune_cache is not None:
        _cache(values.config.data, values.prune_cache)
        return
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


def _cache(settings, gigabytes: float | None):
    from ffl_jax.data import cache
    from ffl_jax.workdir.paths import cache_directory

    folder = cache_directory(settings.cache_dir)
    for one in cache.prune(folder, gigabytes) if gigabytes is not None else ():
        _say("removed", one)
    kept = cache.entries(folder)
    total = sum(one.size for one in kept) / 1e9
    _say("data cache", f"{folder}: {len(kept)} files, {total:.3f} GB of at most {settings.cache_gigabytes:g}")
    for one in kept:
        _say("kept", one)


def _say(title: str, text):
    print(f"{title + ':':15} {text}", flush=True)


def run():
    cli.run(command, answers=True)


if __name__ == "__main__":
    run()
