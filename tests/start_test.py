"""What a training does before its first step: few programs, few traces, few imports, and the same numbers."""

import collections
import functools
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import AS_USERS

from configs import digits
from ffl_jax.devices import backend
from ffl_jax.methods.ffl import FFL
from ffl_jax.training import loop
from ffl_jax.workdir import progress


class FirstStepError(Exception):
    """A training has come so far."""


@pytest.fixture
def compiled():
    """Names of the programs that XLA compiles, or reads from the cache, from here on."""
    names = []

    def listen(event, _, **about):
        if event.endswith("backend_compile_duration"):
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_few_programs_and_traces_before_the_first_step(tmp_path, monkeypatch, compiled):
    """The step is compiled once, though a thread begins with it, and so is the drawing of parameters."""
    traces, run = collections.Counter(), FFL.__call__

    @functools.wraps(run)
    def counted(method, images, train):
        traces[train, len(images)] += 1
        return run(method, images, train)

    def waited(*_):  # called when the first step was given to the device
        raise FirstStepError

    monkeypatch.setattr(FFL, "__call__", counted)
    monkeypatch.setattr(progress.Pace, "wait", waited)
    jax.clear_caches()
    config = digits.get_config("network=tiny,epochs=1")
    config.batch_size = 50  # so that no other test has compiled the same
    with pytest.raises(FirstStepError):
        loop.train(config, tmp_path / "run")
    # To draw parameters; to learn the names of what is logged; the memory's estimate and the step itself.
    assert traces == {(False, 1): 1, (True, 1): 1, (True, 50): 2}
    programs = collections.Counter(compiled)
    assert programs["jit(create_state)"] == 1
    assert programs["jit(_fun)"] == 3  # an epoch's order, the picture of the first batch, and the steps
    assert programs.total() <= 9, programs


def test_what_is_compiled_quickly_draws_the_same():
    def draw(key):
        kernels = (jax.nn.initializers.he_normal(), jax.nn.initializers.truncated_normal(0.02))
        return [initializer(key, (3, 3, 5, 7)) for initializer in kernels], jax.random.permutation(key, 99)

    lowered, key = jax.jit(draw).lower(jax.random.key(3)), jax.random.key(3)
    quick, usual = (lowered.compile(options)(key) for options in (backend.seldom_options(), AS_USERS))
    jax.tree.map(np.testing.assert_array_equal, quick, usual)
    assert backend.seldom_options()
    with backend.as_accelerator():
        assert backend.seldom_options() is None


def test_what_only_other_commands_need_is_not_imported():
    """Nor Orbax, which takes a third of a second, before there is something to save."""
    names = {"orbax", "matplotlib", "PIL", "grain", "tensorflow", "torch", "sklearn", "onnx", "pandas"}
    code = f"import sys, ffl_jax.main, ffl_jax.training.loop; print(*{names} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"
