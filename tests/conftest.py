"""What several tests use: random variables, and the project's commands in processes of their own."""

import copy
import functools
import gc
import os
import pathlib
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ffl_jax import data
from ffl_jax.devices import backend
from ffl_jax.models import NETWORKS, Network
from ffl_jax.models.base import batch_norm, conv
from ffl_jax.training import cost, loop, programs, steps, summary
from ffl_jax.training.defaults import every_key
from ffl_jax.training.experiment import Experiment, run_record
from ffl_jax.workdir import checkpoint, curves

ROOT = pathlib.Path(__file__).parent.parent


def command(module: str, more: str = "pass") -> tuple[str, str]:
    """`-m ffl_jax.MODULE` for `Commands`, where the networks below are known; its log is its own."""
    own = f"import conftest, logging; logging.root.handlers.clear(); {more}"
    return "-c", f"{own}; from ffl_jax import cli, {module}; cli.run({module}.command)"


MAIN = command("main")
# Pictures take seconds, and so does the number of a step's operations.
UNDRAWN = command("main", "conftest.draw_nothing(setattr); conftest.count_nothing(setattr)")
# Compiling takes longer than running here, so little is optimised, programs are not cut into pieces for many
# cores, and loops are fused in jax 0.10's old way, which takes half the time. {option: (here, as users have
# it)}
_OPTIONS = {"xla_backend_optimization_level": (0, 3), "xla_cpu_parallel_codegen_split_count": (1, 32)}
if jax.__version_info__ < (0, 11):
    _OPTIONS["xla_cpu_use_fusion_emitters"] = (False, True)
_DEVICES = "xla_force_host_platform_device_count"
_HERE = {name: str(here).lower() for name, (here, _) in _OPTIONS.items()} | {_DEVICES: 1}


def xla_flags(**changed) -> str:
    """`XLA_FLAGS` of a process of the tests, each flag once: those of the environment, and `changed`.

    JAX calls a program in its cache by these flags, too. Only where all are the same does one process find
    what another one compiled.
    """
    given = (flag.partition("=") for flag in os.environ.get("XLA_FLAGS", "").split())
    flags = {f"--{name}": value for name, value in _HERE.items()} | {name: value for name, _, value in given}
    flags |= {f"--{name}": value for name, value in changed.items()}
    return " ".join(f"{name}={value}" if value != "" else name for name, value in flags.items())


os.environ["XLA_FLAGS"] = xla_flags()
AS_USERS = {name: usual for name, (_, usual) in _OPTIONS.items()}  # `compiler_options` for some tests


# Tracing makes millions of objects that live on: to look through them again and again takes its time.
gc.set_threshold(200_000, 50, 100)


def draw_nothing(set_attribute):
    """Pictures of runs are not drawn."""
    set_attribute(curves, "draw_curves", lambda *_, **__: None)


def count_nothing(set_attribute):
    """The operations of a training step, for which it is traced once more, are one in all summaries."""
    counts = {
        "training_flops": lambda experiment: 1,
        "prediction_costs": lambda *args: cost.prediction_costs(*args),
    }
    set_attribute(summary, "cost", types.SimpleNamespace(**counts))


class Tiny(Network):
    """Three stages of one convolution each, `width`, twice and four times as wide, that compile in no time.

    Attributes:
      width: channels of the first stage.
      strides: of the stages.
    """

    width: int = 4
    strides: tuple[int, int, int] = (1, 2, 2)

    def stem(self, x, train):
        return x

    def stage(self, index, x, train):
        x = conv(self.width * 2**index, 3, self.strides[index], name=f"stage{index + 1}_conv")(x)
        return nn.relu(batch_norm(train, name=f"stage{index + 1}_norm")(x))


NETWORKS.register("tiny")(Tiny)
NETWORKS.register("tiny_wide")(
    functools.partial(Tiny, width=6, strides=(1, 2, 1))
)  # 8x8: ends at 4x4, not 2x2


def data_section(**settings) -> ml_collections.ConfigDict:
    """The `data` section of a configuration: defaults, read in this process, and `settings` of any type."""
    section = every_key("independent").data.to_dict()
    return ml_collections.ConfigDict(section | {"workers": 0} | settings)


def assert_same_lines(actual, expected, images):
    """Rows of two logs agree but for rounding, by which one image of a split may change sides.

    Args: images: {split: how many a row counts at least}.
    """
    assert len(actual) == len(expected) > 6
    for line, wanted in zip(actual, expected, strict=True):
        assert line.keys() == wanted.keys()
        assert (line["step"], line["split"]) == (wanted["step"], wanted["split"])
        for name in wanted.keys() - {"step", "split", "epoch"}:
            atol = 1.01 / images[line["split"]] if name.endswith(("top1", "top5", "ece")) else 2e-4
            np.testing.assert_allclose(line[name], wanted[name], rtol=2e-4, atol=atol, err_msg=name)


def draw_variables(module, inputs):
    """Variables of a module, all random: no norm is the identity, and nothing is compiled to draw them."""
    tree = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), inputs)
    return _draw(tree)


def draw_model(method, image_shape):
    """(params, model_state) of a method, random in the same way."""
    key = jax.random.key(0)
    return tuple(map(_draw, jax.eval_shape(lambda: steps.init_variables(method, key, image_shape))))


def first_state(method, optimizers, image_shape, params, model_state):
    """The `TrainState` before the first step, with these variables."""
    return steps.TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=model_state,
        opt_state={name: optimizer.init(params) for name, optimizer in optimizers.items()},
        rng=jax.random.key(0),
        record=steps.zero_record(method, params, model_state, image_shape),
    )


def equations(jaxpr):
    """All of a program, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def write_run(workdir, config, step=69, dataset=None):
    """A run of random variables in `workdir`, as if it had been trained; returns its experiment and state.

    No class is certain: logits are small. `dataset` is that of the configuration unless it is given.
    """
    experiment = Experiment(config, dataset or data.load(config.data))
    method, shape = experiment.method, experiment.image_shape
    params, model_state = draw_model(method, shape)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x / 100 if "head" in jax.tree_util.keystr(path) else x, params
    )
    state = first_state(method, experiment.optimizers, shape, params, model_state)
    scores = {"test": {"predictions": {method.headline: {"top1": 0.5}}}}
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(step, state, run_record(experiment, evaluated_step=step, scores=scores))
    return experiment, state


def _draw(tree):
    rng = np.random.default_rng(0)

    def leaf(path, x):
        positive = path[-1].key in ("scale", "var")
        return jnp.asarray(rng.uniform(0.5, 1.5, x.shape) if positive else rng.normal(0, 0.2, x.shape))

    return jax.tree_util.tree_map_with_path(leaf, tree)


class Commands:
    """Starts `python -m ffl_jax.MODULE` and scripts, on the CPU, with caches that the tests share."""

    def __init__(self, cache: pathlib.Path):
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(cache),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }

    def start(self, *command: str, devices: int = 1, cwd=None, env=None) -> subprocess.Popen:
        """Starts `python COMMAND` with that many devices; standard output and error are kept."""
        environment = self.environment | {"XLA_FLAGS": xla_flags(**{_DEVICES: devices})}
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | (env or {}),
            cwd=cwd,
        )

    def run(self, *command: str, code: int = 0, **options) -> subprocess.CompletedProcess:
        """Runs to the end and checks the exit code; other than 0 must be one line, without a traceback."""
        process = self.start(*command, **options)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == code, f"exit code {process.returncode}\n{output}\n{errors}"
        assert "Traceback" not in errors, errors
        if code:
            assert errors.splitlines()[-1].startswith("error: "), errors
        return subprocess.CompletedProcess(command, code, output, errors)


def pytest_collection_modifyitems(items):
    """The longest files first, so that the processes end together."""
    slow = (
        *("method_test", "train_test", "parallel_methods_test", "export_test", "processes_test"),
        *("seeds_test", "bench_test", "own_method_test", "accelerator_test", "ffsd_test", "main_test"),
        *("recipe_run_test", "golden_test", "finetune_test", "data_streaming_test", "precision_test"),
        *("mfef_test", "afd_test", "models_mobile_test", "teachers_test", "parallel_test", "kdcl_test"),
        *("launch_test", "import_weights_test", "models_test", "scoring_test", "report_test"),
        *("feed_test", "okddip_test", "ffl_test"),
    )
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))


@pytest.fixture(autouse=True, scope="module")
def no_programs_pile_up():
    """A file's compiled programs go with it: all of them together take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def no_curves():
    """Pictures of trainings in this process take long; those of processes of their own are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch.setattr)
        yield


@pytest.fixture(autouse=True, scope="module")
def uncounted():
    """Trainings in this process count no operations, but of files that put nothing in place of this."""
    with pytest.MonkeyPatch.context() as patch:
        count_nothing(patch.setattr)
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> pathlib.Path:
    """A folder of this session, that all processes of the session share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True, scope="session")
def compile_once(cache):
    """What is compiled is so once, whichever file or process asks for it: reading takes a fifth as long."""
    jax.config.update("jax_compilation_cache_dir", str(cache / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def commands(cache) -> Commands:
    return Commands(cache)


@pytest.fixture(scope="module")
def traced_once():
    """Trainings of a file, in this process, share what they trace if their settings and data are equal.

    To trace and to lower takes most of a short training, and none of it asks where a run began.
    """
    kept = {}

    def identity(given):
        if isinstance(given, ml_collections.ConfigDict):
            return repr(given.to_dict())
        if isinstance(given, data.Dataset):
            return given.fingerprint, len(given.train)
        return given if isinstance(given, nn.Module) else id(given)  # `kept` keeps them alive

    def sharing(make):
        def made(*args, **settings):
            key = (make, backend.is_cpu(), *map(identity, args), repr(settings))
            if key not in kept:
                own = [copy.deepcopy(x) if isinstance(x, ml_collections.ConfigDict) else x for x in args]
                kept[key] = make(*own, **settings), args
            return kept[key][0]

        return made

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            *((loop, name) for name in ("Experiment", "Parallel", "Evaluator")),
            *((programs, name) for name in ("training", "before_epoch", "images_shown")),
            *((cost, name) for name in ("training_flops", "tell_memory")),
            (data, "train_input"),
        ):
            patch.setattr(owner, name, sharing(getattr(owner, name)))
        yield
