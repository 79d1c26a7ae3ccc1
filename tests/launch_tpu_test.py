"""Queued resources in `launch/tpu_vm.sh`, with a stand-in for gcloud; launch_test.py has the rest of it."""

import os

import conftest
import pytest
from launch_test import environment, executable, refusal, run

SCRIPT = conftest.ROOT / "launch/tpu_vm.sh"


@pytest.fixture
def cloud(tmp_path):
    """Calls the script with a gcloud whose request goes through `cloud.states`, "-" for an error."""
    record, states = tmp_path / "calls", tmp_path / "states"
    executable(
        tmp_path / "bin/gcloud",
        f"""(printf '%s\\x1f' "$@"; echo) >>'{record}'
        [ "$4" != create ] || exit "${{CREATED:-0}}"
        [ "$4" = describe ] || exit 0
        state=$(head -n 1 '{states}')
        [ "$(wc -l <'{states}')" = 1 ] || sed -i 1d '{states}'
        [ "$state" != - ] || {{ echo 'ERROR: (gcloud) NOT_FOUND' >&2; exit 1; }}
        echo "$state"
        """,
    )

    def call(*arguments, states=("-",), **changes):
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        settings = dict(TPU_NAME="slice", TPU_ZONE="zone-a", TPU_TYPE="v5litepod-16", TPU_VERSION="v2")
        settings |= dict(QUEUE_SECONDS=0, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        return run(SCRIPT, *arguments, env=environment(**settings | changes))

    def calls():
        """[verb, …] of each, those that follow another like it left out."""
        lines = (
            [line.split("\x1f")[:-1] for line in record.read_text().splitlines()] if record.exists() else []
        )
        assert all(line[:3] == ["compute", "tpus", "queued-resources"] for line in lines)
        lines = [line[3:] for line in lines]
        return [line for before, line in zip([None, *lines], lines, strict=False) if line != before]

    call.calls = calls
    return call


ASKED = ["describe", "slice", "--zone=zone-a", "--format=value(state.state)"]


def test_a_slice_is_asked_for_and_waited_for(cloud):
    states = (
        "-",
        "CREATING",
        "WAITING_FOR_RESOURCES",
        "WAITING_FOR_RESOURCES",
        "-",
        "PROVISIONING",
        "ACTIVE",
    )
    code, output, complaints = cloud("queue", "--spot", "--network=a b", states=states)
    assert code == 0
    said = [line.split()[-1] for line in output.splitlines()]
    assert said == ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]  # each once
    assert complaints == "ERROR: (gcloud) NOT_FOUND\n"  # of the wait, not of the first question
    asked, made, *later = cloud.calls()
    assert asked == ASKED
    assert made[:3] == ["create", "slice", "--zone=zone-a"]
    kind = ["--node-id=slice", "--accelerator-type=v5litepod-16", "--runtime-version=v2"]
    assert made[3:] == [*kind, "--spot", "--network=a b"]
    assert later == [ASKED]


def test_a_wait_goes_on(cloud):
    assert cloud("queue", "--spot", states=("WAITING_FOR_RESOURCES", "ACTIVE"))[0] == 0
    assert cloud.calls() == [ASKED]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDING", "SUSPENDED", "DELETING"])
def test_a_request_that_gets_nothing(state, cloud):
    code, _, complaints = cloud("queue", "--reserved", states=("PROVISIONING", state))
    assert code == 6
    (line,) = complaints.splitlines()
    assert line.startswith(f"error: the request 'slice' gets no slice, it is {state}: ")


def test_a_request_that_is_refused_or_gone(cloud):
    assert cloud("queue", CREATED=1)[0] == 1  # gcloud has said why
    assert [line[0] for line in cloud.calls()] == ["describe", "create"]
    code, _, complaints = cloud("queue", states=("ACCEPTED", "-"))
    assert code == 6
    assert complaints.splitlines()[-1].startswith("error: the request 'slice' cannot be asked after: ")


def test_a_request_is_taken_back(cloud):
    assert cloud("--name=other", "--zone=z", "cancel", "--quiet") == (0, "", "")
    assert cloud.calls() == [["delete", "other", "--zone=z", "--force", "--quiet"]]


def test_a_dry_run_asks_nobody(cloud):
    code, output, _ = cloud("--dry-run", "queue", "--reserved")
    assert (code, cloud.calls()) == (0, [])
    assert [line.split()[4] for line in output.splitlines()] == ["create", "describe"]


def test_usage_errors(cloud):
    assert "no type of slice: --type=" in refusal(cloud("queue", TPU_TYPE=""))
    assert "no software version: --version=" in refusal(cloud("queue", TPU_VERSION=""))
    assert "stop, fetch or delete, or queue and cancel" in refusal(cloud("unqueue"))
    assert not cloud.calls()
