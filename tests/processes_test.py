"""Two processes of a device each train as one process of two does, and stop and continue together."""

import json
import signal
import socket
import time

import numpy as np
import pytest
from conftest import MAIN, UNDRAWN, assert_same_lines

from ffl_jax.devices import processes
from ffl_jax.errors import ConfigError, ResourceError
from ffl_jax.workdir import files
from ffl_jax.workdir.log import read_metrics

ARGUMENTS = (
    "--config=configs/digits.py:network=tiny,epochs=2",
    *("--config.batch_size=128", "--config.log_every_steps=4", "--config.evaluation.every_epochs=2"),
    # Rounding grows from step to step, faster at higher rates.
    *("--config.optimizer.learning_rate=0.01", "--config.parallel.mode=shard_map"),
)


def start(commands, workdir, main=UNDRAWN):
    """Both processes; the second is given a folder that does not exist, and is not to make it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = []
    for index in range(2):
        variables = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        folder = workdir if index == 0 else workdir / "nowhere"
        command = (*main, *ARGUMENTS, "--distributed", f"--workdir={folder}")
        both.append(commands.start(*command, env=variables))
    return both


def finish(both, codes):
    ends = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == codes, ends
    assert "Traceback" not in ends[0][1] + ends[1][1]
    return ends


@pytest.fixture(scope="module")
def alone(commands, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    commands.run(*UNDRAWN, *ARGUMENTS, f"--workdir={workdir}", devices=2)
    return workdir


def assert_same(workdir, alone):
    lines, expected = (read_metrics(one / "metrics.jsonl")[0] for one in (workdir, alone))
    assert_same_lines(lines, expected, {"train": 4 * 128, "test": 360})


def test_two_processes_stop_together_continue_and_equal_one(commands, alone, tmp_path):
    """The second gets a signal; both end at the same step, and at last like one process left alone."""
    both = start(commands, tmp_path)
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        assert both[0].poll() is None, both[0].communicate()
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    ends = finish(both, [75, 75])
    said = [errors.splitlines()[-1] for _, errors in ends]
    assert "stopped by SIGTERM" in said[1]
    steps = [line.split(": ")[2].split(";")[0] for line in said]
    assert steps[0] == steps[1]
    summary = files.read_json(tmp_path / "summary.json")
    assert summary["status"] == "preempted"
    assert steps[0] == f"step {summary['step']} is saved"
    (told, _), (silent, errors) = finish(start(commands, tmp_path, MAIN), [0, 0])
    assert_same(tmp_path, alone)
    assert "completed: test top-1" in told
    assert "completed" not in silent
    assert "epoch" not in errors
    assert not (tmp_path / "nowhere").exists()
    summary, expected = (files.read_json(one / "summary.json") for one in (tmp_path, alone))
    assert summary["device"] == expected["device"] == "2 x cpu"
    assert (tmp_path / "curves.png").exists()


def test_other_arguments_are_refused(commands, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = """
from ffl_jax import errors
from ffl_jax.devices import processes
processes.join()
import jax
processes.check_equal({"rate": 1})
try:
    processes.check_equal({"rate": 1 + jax.process_index()})
except errors.ConfigError as error:
    print(error)
"""
    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    both = [
        commands.start("-c", code, env=environment | {"JAX_PROCESS_ID": str(index)}) for index in range(2)
    ]
    for output, _ in finish(both, [0, 0]):
        assert "do not have the same configuration and data" in output


def test_variables_are_checked(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES must be a whole number, got 'two'"):
        processes.join()


def test_process_0_that_is_not_there_is_named(monkeypatch):
    with socket.socket() as taken:  # and listens to nobody
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(processes, "_JOIN_SECONDS", 0.1)
        with pytest.raises(ResourceError, match=f"process 0 does not answer at {address}"):
            processes.join()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "somewhere")
    with pytest.raises(ConfigError, match="must be HOST:PORT of process 0, got 'somewhere'"):
        processes.join()


def test_one_process_needs_no_network():
    tree = {"x": np.arange(3)}
    assert processes.from_first(tree) is tree
    assert processes.value_of_first(lambda: json.loads("[1]")) == [1]
    np.testing.assert_array_equal(processes.gathered([4, 5]), [[4, 5]])
    assert not processes.several()
    assert processes.is_first()
