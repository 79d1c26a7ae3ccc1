"""Whoever closes a command's output, or stops reading it: what was done is done, and nothing is called done
that was not.
"""

import json
import subprocess
import sys

import pytest
from conftest import UNDRAWN

LOST = "error: standard output: {}, so that the answer is lost: run it again.\n"


@pytest.mark.parametrize(
    ("redirections", "answers", "code", "errors"),
    [
        ("| head -1", False, 0, "log\n"),
        ("| head -1", True, 0, "log\n"),  # it has seen enough
        ("2>&1 | head -1", False, 0, ""),
        (">&-", False, 0, "log\n"),
        (">&-", True, 6, "log\n" + LOST.format("Bad file descriptor")),
        (">/dev/full", False, 0, "log\n"),
        (">/dev/full", True, 6, "log\n" + LOST.format("No space left on device")),
        ("2>&-", True, 0, ""),
        ("2>/dev/full", True, 0, ""),
        (">&- 2>&-", False, 0, ""),
        (">&- 2>&-", True, 6, ""),
        ("<&-", True, 0, "log\n"),
        ("<&- >&- 2>&-", False, 0, ""),
    ],
)
def test_every_command(redirections, answers, code, errors, commands, tmp_path):
    """10,000 lines, more than a pipe holds; a file opened meanwhile must not become the standard output."""
    script = "import sys, logging, atexit; from ffl_jax import cli\n"
    script += "def command(_):\n    file = open('own', 'w'); assert sys.stdin.read() == ''\n"
    script += "    logging.info('log')\n    for line in range(10000): print('line', line)\n"
    script += f"    file.write('done')\ncli.run(command, answers={answers})"
    (tmp_path / "script.py").write_text(script)
    stdin = "" if "<&-" in redirections else "</dev/null"
    shell = f"{sys.executable} script.py {stdin} {redirections}; exit ${{PIPESTATUS[0]}}"
    environment = commands.environment
    result = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (code, errors)
    assert (tmp_path / "own").read_text() == "done"


def test_help_that_nobody_can_read(commands):
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "ffl_jax.predict", "--help"]
        result = subprocess.run(
            line, env=commands.environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (result.returncode, result.stderr) == (6, LOST.format("No space left on device"))


def test_a_training_that_nobody_looks_at(commands, tmp_path):
    """Its reader goes away at the first line; all steps are done, and it says so by its files and code."""
    config = "--config=configs/digits.py:network=tiny,method=independent,epochs=1"
    more = ("--config.subnetworks.num=1", "--config.evaluation.every_epochs=1")
    training = commands.start(*UNDRAWN, config, f"--workdir={tmp_path}", *more)
    training.stdout.close()
    training.stderr.close()
    assert training.wait(timeout=300) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["epoch"]) == ("completed", 1)
