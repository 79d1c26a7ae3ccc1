"""The scripts of `launch/` with stand-ins for what they start: training, srun, scontrol, gcloud, nvidia-smi.

.ci/run has shellcheck and yamllint read them.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import conftest
import pytest
import yaml

from ffl_jax import errors

# Stands in for `python -m ffl_jax.main`: says how it was started, then does what the last argument has for a
# process of its number: end with a code, "wait" for a signal beside a worker process, or be "killed".
TRAINING = """
import json, os, signal, subprocess, sys, time

number = int(os.environ.get("JAX_PROCESS_ID", 0))
todo = sys.argv[-1].split(",")[number:] or ["0"]
signal.signal(signal.SIGINT, lambda *_: (print("SIGINT", flush=True), os._exit(75)))
signal.signal(signal.SIGTERM, lambda *_: (print("SIGTERM", flush=True), os._exit(75)))
worker = [subprocess.Popen(["sleep", "60"]).pid] if todo[0] == "wait" else []
wanted = ("JAX_", "XLA_", "CUDA_")
environment = {key: value for key, value in os.environ.items() if key.startswith(wanted)}
said = dict(environment=environment, arguments=sys.argv[1:], pids=[os.getpid(), *worker])
print(json.dumps(said), flush=True)
print("a warning", file=sys.stderr, flush=True)
if todo[0] == "wait":
    time.sleep(60)
if todo[0] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
print("the end", end="", flush=True)
os._exit(int(todo[0]))
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path):
    """A copy of what the scripts need, whose .venv is up to date and has a stand-in for Python."""
    root = tmp_path / "repository"
    shutil.copytree(conftest.ROOT / "launch", root / "launch")
    shutil.copy(conftest.ROOT / "pyproject.toml", root)
    (root / "training.py").write_text(TRAINING)
    set_up(root, root / "training.py")
    return root


def set_up(root, training):
    real = f"exec '{sys.executable}' -S"
    executable(root / ".venv/bin/python", f'[ "$1" = -c ] && {real} "$@"\n{real} \'{training}\' "$@"')
    checksum = subprocess.run(
        ["cksum"], stdin=(root / "pyproject.toml").open(), capture_output=True, text=True
    )
    (root / ".venv/stamp").write_text(f"{checksum.stdout.strip()} {root}\ncuda\ntpu\n")


def environment(**changes):
    """Without what the scripts take from the environment."""
    names = r"JAX_|XLA_|CUDA_|SLURM_|TPU_|DRY_RUN|DEVICES_PER|GRACE_|METHODS|NETWORKS|SEEDS|CONFIG|RUNS"
    kept = {key: value for key, value in os.environ.items() if not re.match(names, key)}
    return kept | {key: str(value) for key, value in changes.items()}


def start(*command, env=None, **options):
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([str(word) for word in command], env=env or environment(), **pipes, **options)


def finish(process):
    output, complaints = process.communicate(timeout=30)
    return process.returncode, output, complaints


def run(*command, **options):
    return finish(start(*command, **options))


def refusal(result):
    """The one line of a usage error."""
    code, output, complaints = result
    assert (code, output) == (2, "")
    (line,) = complaints.splitlines()
    assert line.startswith("error: ")
    return line


def alive(pid):
    """Whether a process runs; one that has ended and that nobody has asked after does not."""
    try:
        os.kill(pid, 0)
        stat = pathlib.Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def said(lines):
    """What the processes say of themselves, in order."""
    found = dict(re.fullmatch(r"\[(\d)\] (\{.*\})\n?", line).groups() for line in lines if "{" in line)
    assert sorted(found) == [str(i) for i in range(len(found))]
    return [json.loads(found[number]) for number in sorted(found)]


def started(process, count):
    """The same of processes that now wait for a signal."""
    return said([process.stdout.readline() for _ in range(count)])


# local_multiprocess.sh


def local(repository, count, *arguments, **changes):
    env = environment(**{"JAX_PLATFORMS": "cpu"} | changes)
    script = repository / "launch/local_multiprocess.sh"
    # Where the tests run in the background, they were started with SIGINT ignored, which no shell can undo.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    heed += "os.execv(sys.argv[1], sys.argv[1:])"
    return start(sys.executable, "-c", heed, script, count, *arguments, env=env)


def test_each_local_process_knows_its_place(repository):
    code, output, complaints = finish(local(repository, 3, "--workdir=with space", "0,0,0"))
    assert code == 0
    lines = output.splitlines()
    assert sorted(line for line in lines if "{" not in line) == [f"[{i}] the end" for i in range(3)]
    assert sorted(complaints.splitlines()) == [f"[{i}] a warning" for i in range(3)]
    addresses = set()
    for i, one in enumerate(said(lines)):
        assert one["arguments"] == ["-m", "ffl_jax.main", "--distributed", "--workdir=with space", "0,0,0"]
        assert one["environment"]["JAX_PROCESS_ID"] == str(i)
        assert one["environment"]["JAX_NUM_PROCESSES"] == "3"
        addresses |= {one["environment"][f"JAX_COORDINATOR_{x}ADDRESS"] for x in ("", "BIND_")}
    (address,) = addresses
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)


def test_local_devices_are_forced(repository):
    process = local(repository, 1, "0", JAX_PLATFORMS="", XLA_FLAGS="--xla_a=1", DEVICES_PER_PROCESS=4)
    code, output, _ = finish(process)
    assert code == 0
    (one,) = said(output.splitlines())
    assert one["environment"]["JAX_PLATFORMS"] == "cpu"
    assert one["environment"]["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=4"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("75,75", 75), ("75,3", 3), ("1,4", 4), ("0,1", 1), ("75,143", 143), ("killed,75", 137)],
)
def test_exit_code_of_local_processes(codes, expected, repository):
    assert finish(local(repository, 2, codes))[0] == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_local_processes(number, repository):
    process = local(repository, 2, "wait,wait")
    pids = [pid for one in started(process, 2) for pid in one["pids"]]
    process.send_signal(number)
    code, output, _ = finish(process)
    assert code == 75
    assert sorted(output.splitlines()) == [f"[{i}] {number.name}" for i in range(2)]
    wait_until(lambda: not any(map(alive, pids)))  # killed ones need a moment


def test_the_others_are_ended_when_one_dies(repository):
    """Its worker processes too."""
    code, output, complaints = finish(local(repository, 3, "killed,wait,wait", GRACE_SECONDS=1))
    assert code == 137
    lines = output.splitlines()
    assert sorted(line for line in lines if "{" not in line) == ["[1] SIGTERM", "[2] SIGTERM"]
    assert "ended with code 137, and 2 still run: SIGTERM" in complaints
    wait_until(lambda: not any(alive(pid) for one in said(lines) for pid in one["pids"]))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_local_processes_end_with_a_script_that_is_killed(repository):
    process = local(repository, 2, "wait,wait")
    processes = started(process, 2)
    process.kill()
    process.wait()
    wait_until(lambda: not any(alive(one["pids"][0]) for one in processes))
    for one in processes:
        os.kill(one["pids"][1], signal.SIGKILL)  # what the stand-in leaves when it is stopped
    process.communicate()


@pytest.mark.parametrize(
    ("chosen", "expected"), [({}, ["0", "1"]), ({"CUDA_VISIBLE_DEVICES": "4,7"}, ["4", "7"])]
)
def test_each_local_process_gets_a_gpu(chosen, expected, repository, tmp_path):
    executable(tmp_path / "bin/nvidia-smi", "echo 'GPU 0: One (UUID: a)'\necho 'GPU 1: One (UUID: b)'")
    changes = dict(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", JAX_PLATFORMS="", **chosen)
    code, output, _ = finish(local(repository, 2, "0,0", **changes))
    assert code == 0
    assert [one["environment"]["CUDA_VISIBLE_DEVICES"] for one in said(output.splitlines())] == expected
    assert "3 processes want a GPU each and there are 2" in refusal(finish(local(repository, 3, **changes)))


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {}, "got ''"),
        (["0"], {}, "got '0'"),
        (["--workdir=x"], {}, "got '--workdir=x'"),
        (["2"], {"DEVICES_PER_PROCESS": "two"}, "DEVICES_PER_PROCESS: want 1 or more, got 'two'"),
        (["2"], {"GRACE_SECONDS": "-1"}, "GRACE_SECONDS must be a whole number, 1 or more, got '-1'"),
    ],
)
def test_local_usage_errors(arguments, changes, message, repository):
    script = repository / "launch/local_multiprocess.sh"
    assert message in refusal(run(script, *arguments, env=environment(**changes)))


# slurm.sbatch


@pytest.fixture
def slurm(repository, tmp_path):
    """Runs the job as Slurm does, from a copy elsewhere; returns its result and what it asked Slurm for."""
    record = tmp_path / "calls"
    note = f"(printf '%s\\x1f' \"${{0##*/}}\" \"$@\"; echo) >>'{record}'"
    executable(tmp_path / "bin/srun", f'{note}\n[ -z "$SRUN_WAITS" ] || sleep 1\nexit "$SRUN_CODE"')
    executable(tmp_path / "bin/scontrol", f'{note}\necho "JobId=7 JobState=$JOB_STATE Reason=None"')
    copy = shutil.copy(repository / "launch/slurm.sbatch", tmp_path / "slurm_script")

    def submit(*arguments, signal_after=None, **changes):
        changes = dict(SLURM_JOB_ID=7, SLURM_SUBMIT_DIR=repository, SLURM_CPUS_PER_TASK=8) | changes
        changes = dict(SRUN_CODE=0, SRUN_WAITS="", JOB_STATE="RUNNING") | changes
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        process = start("bash", copy, *arguments, env=environment(PATH=path, **changes), cwd=tmp_path)
        if signal_after:
            wait_until(record.exists)
            process.send_signal(signal_after)
        result = finish(process)
        lines = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return result, [line.split("\x1f")[:-1] for line in lines]

    return submit


TWO_BY_THREE = dict(METHODS="ffl dml", SEEDS="0 1 2")
TWO_BY_TWO = dict(METHODS="ffl dml", NETWORKS="a a+b", SEEDS="4 5", RUNS="out")


@pytest.mark.parametrize(
    ("changes", "config", "seed", "workdir"),
    [
        ({"SLURM_ARRAY_TASK_ID": 2} | TWO_BY_THREE, "cifar100.py:method=ffl", 2, "runs/ffl-seed2"),
        ({"SLURM_ARRAY_TASK_ID": 3} | TWO_BY_THREE, "cifar100.py:method=dml", 0, "runs/dml-seed0"),
        # The last of two methods, two networks and two seeds, and the one before the second network.
        (
            {"SLURM_ARRAY_TASK_ID": 7} | TWO_BY_TWO,
            "cifar100.py:method=dml,network=a+b",
            5,
            "out/dml-a+b-seed5",
        ),
        ({"SLURM_ARRAY_TASK_ID": 5} | TWO_BY_TWO, "cifar100.py:method=dml,network=a", 5, "out/dml-a-seed5"),
        (
            dict(METHODS="kd", SEEDS="3", RUNS="/shared/runs", CONFIG="configs/imagenet.py:epochs=9"),
            *("imagenet.py:epochs=9,method=kd", 3, "/shared/runs/kd-seed3"),
        ),
    ],
)
def test_the_array_index_picks_a_run(changes, config, seed, workdir, slurm, repository):
    (code, _, _), [[*command]] = slurm("--config.b=1", **changes)
    assert (code, command[0]) == (0, "srun")
    at = command.index(str(repository / ".venv/bin/python"))
    assert {"--gpu-bind=none", "--cpus-per-task=8", "--kill-on-bad-exit=0"} <= set(command[:at])
    assert command[at + 1 :] == [
        *("-m", "ffl_jax.main", "--distributed"),
        *(f"--config=configs/{config}", f"--config.seed={seed}", f"--workdir={workdir}", "--config.b=1"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_ARRAY_TASK_ID": 6} | TWO_BY_THREE, "no run number 6: 2 methods and 3 seeds make 6 runs"),
        ({"SLURM_ARRAY_TASK_ID": 6} | TWO_BY_THREE, "sbatch --array=0-5"),
        (TWO_BY_THREE, "this job is no array, and 2 methods and 3 seeds make 6 runs: sbatch --array=0-5"),
        ({"METHODS": " "}, "METHODS and SEEDS must each name one or more"),
        ({"SLURM_JOB_ID": ""}, "this is for Slurm: sbatch launch/slurm.sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ is not the repository"),
    ],
)
def test_jobs_refused(changes, message, slurm):
    result, calls = slurm(**changes)
    assert message in refusal(result)
    assert not calls


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [(75, "RUNNING", True), (75, "CANCELLED", False), (3, "RUNNING", False), (0, "RUNNING", False)],
)
def test_a_job_that_was_stopped_and_saved_is_requeued(code, state, requeued, slurm):
    result, calls = slurm(SRUN_CODE=code, JOB_STATE=state)
    assert result[0] == code
    assert (["scontrol", "requeue", "7"] in calls) == requeued


def test_a_job_outlives_a_signal_to_wait_for_its_tasks(slurm):
    result, calls = slurm(SRUN_CODE=75, SRUN_WAITS=1, signal_after=signal.SIGTERM)
    assert result[0] == 75
    assert calls[-1] == ["scontrol", "requeue", "7"]


def test_what_the_job_asks_for():
    """One task for each GPU, none hidden from a task: JAX takes the GPU of the number SLURM_LOCALID."""
    text = (conftest.ROOT / "launch/slurm.sbatch").read_text()
    wanted = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
    assert wanted["ntasks-per-node"] == wanted["gpus-per-node"]
    assert "gpus-per-task" not in wanted
    assert wanted["requeue"] == ""
    assert re.fullmatch(r"TERM@\d+", wanted["signal"])  # "B:TERM" would reach this script alone


# tpu_vm.sh


@pytest.fixture
def cloud(tmp_path, repository):
    """Calls the script with a gcloud whose slice is one machine, the folder `machine`."""
    record, machine = tmp_path / "calls", tmp_path / "machine"
    machine.mkdir()
    executable(
        tmp_path / "bin/gcloud",
        f"""(printf '%s\\x1f' "$@"; echo) >>'{record}'
        verb=$4
        paths=()
        for word in "${{@:5}}"; do
            case $word in
                --command=*) cd '{machine}' && HOME='{machine}' exec bash -c "${{word#*=}}" ;;
                --*) ;;
                slice:*) paths+=("{machine}/${{word#*:}}") ;;
                *) paths+=("$word") ;;
            esac
        done
        [ "$verb" != scp ] || cp -r "${{paths[@]}}"
        """,
    )
    executable(tmp_path / "bin/python3", f"exec '{sys.executable}' \"$@\"")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def call(*arguments, begin=run, **changes):
        settings = dict(TPU_NAME="slice", TPU_ZONE="zone-a", PATH=path)
        env = environment(**settings | changes)
        return begin(repository / "launch/tpu_vm.sh", *arguments, env=env, cwd=tmp_path)

    def calls():
        lines = (
            [line.split("\x1f")[:-1] for line in record.read_text().splitlines()] if record.exists() else []
        )
        assert all(line[:3] == ["compute", "tpus", "tpu-vm"] for line in lines)
        return [line[3:] for line in lines]

    call.calls, call.machine = calls, machine
    return call


def test_a_slice_is_made_and_deleted(cloud):
    assert cloud("--type=v5litepod-16", "--version=v2", "create", "--spot", "--network=a b")[0] == 0
    assert cloud("--name=other", "--zone=z", "delete", "--quiet")[0] == 0
    made, deleted = cloud.calls()
    assert made[:4] == ["create", "slice", "--accelerator-type=v5litepod-16", "--version=v2"]
    assert made[4:] == ["--spot", "--network=a b", "--zone=zone-a"]
    assert deleted == ["delete", "other", "--quiet", "--zone=z"]


def test_the_repository_is_installed_on_the_machines(cloud, repository):
    """Its last commit, and nothing of an earlier one but runs and the environment."""
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    (repository / ".gitignore").write_text(".venv\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"]):
        subprocess.run(git + command, check=True)
    (repository / "new").touch()
    there = cloud.machine / "ffl_jax"
    for kept in ("runs/a", ".venv/bin", "old"):
        (there / kept).mkdir(parents=True)
    shutil.copy(repository / "pyproject.toml", there)
    set_up(there, there / "training.py")
    code, output, complaints = cloud("install")
    assert (code, output, complaints) == (0, "", "note: what is not committed is not copied\n")
    names = {path.name for path in there.iterdir()}
    assert names == {".gitignore", ".setup.lock", ".venv", "launch", "pyproject.toml", "runs", "training.py"}
    assert [line[0] for line in cloud.calls()] == ["scp", "ssh"]
    assert all({"--worker=all", "--zone=zone-a"} <= set(line) for line in cloud.calls())


def test_a_run_is_started_stopped_and_fetched(cloud, repository, tmp_path):
    there = cloud.machine / "ffl_jax"
    shutil.copytree(repository, there)
    assert cloud("stop") == (1, "", "error: no run to stop\n")
    process = cloud("run", "--config.a=(1, 2)", "wait", begin=start)
    one = json.loads(process.stdout.readline())
    assert one["arguments"] == ["-m", "ffl_jax.main", "--distributed", "--config.a=(1, 2)", "wait"]
    assert cloud("stop") == (0, "", "")
    os.kill(one["pids"][1], signal.SIGKILL)
    code, output, _ = finish(process)
    assert code == 75
    assert output.endswith("SIGTERM\n")
    for workdir in (there / "runs/a", cloud.machine / "disk/b"):
        workdir.mkdir(parents=True)
        (workdir / "summary.json").write_text("{}")
    assert cloud("fetch", "runs/a")[0] == 0
    assert (tmp_path / "runs/a/summary.json").exists()
    assert cloud("fetch", "/disk/b/", "results/here")[0] == 0
    assert (tmp_path / "results/here/b/summary.json").exists()
    workers = [word for line in cloud.calls() for word in line if word.startswith("--worker")]
    assert workers == ["--worker=0", "--worker=all", "--worker=0", "--worker=0", "--worker=0"]


def test_a_run_goes_on_when_the_connection_is_lost(cloud, repository):
    shutil.copytree(repository, cloud.machine / "ffl_jax")
    process = cloud("run", "wait", begin=start)
    main, worker = json.loads(process.stdout.readline())["pids"]
    process.stdout.close()
    process.terminate()
    process.wait()
    assert alive(main)
    assert cloud("stop")[0] == 0
    wait_until(lambda: not alive(main))
    os.kill(worker, signal.SIGKILL)
    assert (cloud.machine / "ffl_jax.log").read_text().endswith("SIGTERM\n")


def test_a_dry_run_shows_commands_that_do_the_same(cloud, repository):
    code, output, _ = cloud("--dry-run", "run", "--config.a=(1, 'two')")
    assert code == 0
    assert cloud("run", "--config.a=(1, 'two')", DRY_RUN=1) == (0, output, "")
    assert not cloud.calls()
    shutil.copytree(repository, cloud.machine / "ffl_jax")
    shown = run("bash", "-c", "gcloud() { printf '%s\\x1f' \"$@\"; }; " + output)[1].split("\x1f")[:-1]
    cloud("run", "--config.a=(1, 'two')")
    assert [shown[3:]] == cloud.calls()


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {}, "no command '': create, install, run, stop, fetch or delete"),
        (["start"], {}, "no command 'start'"),
        (["--tpu=a", "run"], {}, "there is no setting --tpu=a"),
        (["run"], {"TPU_NAME": ""}, "no name of the slice: --name=NAME"),
        (["run"], {"TPU_ZONE": ""}, "no zone: --zone="),
        (["create"], {"TPU_VERSION": "v2"}, "no type of slice: --type="),
        (["create"], {"TPU_TYPE": "v5litepod-16"}, "no software version: --version="),
        (["fetch"], {}, "fetch takes a workdir"),
        (["install", "now"], {}, "install takes no arguments, got 'now'"),
        (["run"], {"PATH": "/nowhere"}, "there is no gcloud on PATH"),
    ],
)
def test_tpu_usage_errors(arguments, changes, message, cloud):
    if "PATH" in changes:  # all that the script needs before it looks for gcloud
        folder = cloud.machine / "bin"
        executable(folder / "env", 'exec "$@"')
        (folder / "bash").symlink_to(shutil.which("bash"))
        changes = {"PATH": str(folder)}
    assert message in refusal(cloud(*arguments, **changes))
    assert not cloud.calls()


@pytest.mark.parametrize("script", ["local_multiprocess.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_help(script, repository):
    code, output, complaints = run("bash", repository / "launch" / script, "--help")
    assert (code, complaints) == (0, "")
    assert script in output


# gke_jobset.yaml

# What is used of the API references of JobSet v1alpha2 and Kubernetes' batch/v1 and v1: {parent: fields}.
FIELDS = {
    "": "apiVersion kind metadata spec",
    "spec": "failurePolicy network replicatedJobs template parallelism completions completionMode "
    "backoffLimit podFailurePolicy restartPolicy terminationGracePeriodSeconds "
    "nodeSelector containers volumes",
    "network": "enableDNSHostnames publishNotReadyAddresses",
    "failurePolicy": "maxRestarts rules",
    "rules": "name action onJobFailureReasons onExitCodes",
    "onExitCodes": "containerName operator values",
    "replicatedJobs": "name replicas template",
    "containers": "name image command args resources volumeMounts",
    "resources": "requests limits",
}


def check_fields(node, parent=""):
    for one in node if isinstance(node, list) else [node]:
        if isinstance(one, dict):
            assert parent not in FIELDS or one.keys() <= set(FIELDS[parent].split()), parent
            for key, value in one.items():
                check_fields(value, key)


def test_the_job_set():
    """It has no misspelt field, takes the whole slice, and starts again unless a run was refused."""
    text = (conftest.ROOT / "launch/gke_jobset.yaml").read_text()
    manifest = yaml.safe_load(text)
    check_fields(manifest)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["completionMode"] == "Indexed"  # GKE numbers the pods by it
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert container["command"] == ["python", "-m", "ffl_jax.main"]
    assert "--distributed" in container["args"]
    (config,) = re.findall(r"--config=([^:\s\"]+)", " ".join(container["args"]))
    assert (conftest.ROOT / config).exists()
    assert {"IMAGE", "CLAIM"} <= set(re.findall(r"^ *(?:image|claimName): (\w+)$", text, re.M))
    # Chips of the topology = machines times chips of each.
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert job["completions"] == job["parallelism"] == x * y // resources["limits"]["google.com/tpu"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert rule["onExitCodes"]["containerName"] == container["name"]
    codes = {kind.exit_code for kind in errors.FFLError.__subclasses__()}
    assert set(rule["onExitCodes"]["values"]) == codes - {errors.Preempted.exit_code}
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
