"""Says what this machine has and what is missing: `python -m ffl_jax.doctor [--config=configs/DATA.py]`."""

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from absl import flags

from ffl_jax import cli
from ffl_jax.errors import FFLError

USAGE = """
python -m ffl_jax.doctor [--config=configs/DATA.py[:PRESETS]] [--workdir=DIR] [--config.KEY=VALUE ...]

Prints versions, devices, free space, whether the configuration is sound, its dataset and teachers found, and
what to run next. Writes nothing but the cache of the decoded dataset. Ends with the exit code that training
would be refused with.
"""


def command(argv: list[str]):
    values, given = cli.new_flags(), argv[1:]  # parsing takes --config out of argv
    flags.DEFINE_string("workdir", None, "Where the run would be written.", flag_values=values)
    cli.parse(values, argv, USAGE, config=True)
    config = values.config
    workdir = Path(values.workdir or cli.default_workdir(config))

    import jax

    from ffl_jax import data, methods
    from ffl_jax.devices import parallel
    from ffl_jax.training import config as config_lib
    from ffl_jax.training import experiment, teachers
    from ffl_jax.workdir.paths import cache_directory

    _say("Python", f"{platform.python_version()} in {sys.prefix}")
    _say("versions", ", ".join(f"{name} {version}" for name, version in experiment.versions().items()))
    devices = jax.local_devices()
    _say(
        "devices",
        f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()}), {os.cpu_count()} CPUs",
    )
    for title, path in (("workdir", workdir), ("data cache", cache_directory(config.data.cache_dir))):
        _say(title, f"{path}: {shutil.disk_usage(_existing(path)).free / 1e9:.1f} GB free")

    failure = None
    checks = {
        "configuration": lambda: _check_configuration(config, config_lib, parallel),
        "dataset": lambda: _check_dataset(config, data, experiment),
    }
    if methods.takes_teachers(config.method.name):
        checks["teachers"] = lambda: _check_teachers(config, data, experiment, teachers)
    for title, check in checks.items():
        try:
            _say(title, check())
        except FFLError as error:
            failure = failure or error
            _say(title, f"NOT USABLE: {error}")
    if failure:
        raise failure
    others = [argument for argument in given if not argument.startswith(("--workdir", "--debug"))]
    _say("run next", shlex.join(["python", "-m", "ffl_jax.main", *others, f"--workdir={workdir}"]))


def _check_configuration(config, config_lib, parallel):
    config_lib.check(config)
    devices = parallel.Parallel(**config.parallel, num_seeds=config.num_seeds)
    devices.check_batch_size(config.batch_size, config.accumulate)
    names = " + ".join(config_lib.network_names(config))
    return f"{config.method.name} with {names}, {config.epochs} epochs of batch {config.batch_size}"


def _check_dataset(config, data, experiment):
    dataset = data.load(config.data)
    made = experiment.Experiment(config, dataset)
    height, width, _ = made.image_shape
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items() if split is not None)
    return (
        f"{dataset.name}: {sizes} images of {height}x{width}, {len(dataset.class_names)} classes, "
        f"{made.steps_per_epoch} steps an epoch"
    )


def _check_teachers(config, data, experiment, teachers):
    runs = teachers.named_runs(config)
    if not runs:
        return f"{config.teachers.num} x {config.teachers.network}, to be trained before the student"
    teachers.load(runs, experiment.Experiment(config, data.load(config.data)))
    return f"found in {', '.join(runs)}"


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _say(title: str, text: str):
    print(f"{title + ':':15} {text}", flush=True)


if __name__ == "__main__":
    cli.run(command)
