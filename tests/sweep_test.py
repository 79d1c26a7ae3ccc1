"""Sweeps: which runs they start, how they go on after each end, and the report behind them."""

import json
import os
import shlex
import stat
import sys
import textwrap

import pytest
from conftest import ROOT, UNDRAWN

from ffl_jax import sweep
from ffl_jax.devices import preemption
from ffl_jax.errors import ConfigError, FFLError, Preempted, ResourceError
from ffl_jax.training import slots
from ffl_jax.training import sweep as sweeps
from ffl_jax.workdir import files

TINY = ("--config=configs/digits.py:epochs=1,recipe=common", "--networks=tiny")


@pytest.fixture
def started(monkeypatch):
    """The arguments of the runs that a sweep starts, none of which is real; `codes` says how they end."""

    class Started(list):
        codes = {}  # noqa: RUF012
        reports = 0

    calls = Started()

    def run(arguments, *_):
        calls.append(arguments[3:])
        return calls.codes.get(len(calls), 0)

    monkeypatch.setattr(sweeps, "run", run)
    from ffl_jax.reporting import report

    def write(folders, output):
        calls.reports += 1

    monkeypatch.setattr(report, "write", write)
    return calls


def test_every_method_with_every_network_and_seed(started, tmp_path):
    arguments = ("--methods=ffl,dml", "--networks=resnet8,resnet8+resnet14", "--seeds=3,1")
    sweep.command(["sweep", *arguments, f"--output={tmp_path}", "--config.batch_size=32"])
    assert len(started) == 8
    assert started[0] == [
        "--config=configs/digits.py:method=ffl,network=resnet8",
        "--config.batch_size=32",
        "--config.seed=1",
        f"--workdir={tmp_path}/ffl-resnet8-seed1",
    ]
    workdirs = [call[-1].rsplit("/", 1)[1] for call in started]
    assert workdirs == [
        f"{method}-{network}-seed{seed}"
        for seed in (1, 3)
        for network in ("resnet8", "resnet8+resnet14")
        for method in ("ffl", "dml")
    ]
    assert started.reports == 1


def test_all_methods_and_seeds_together(started, tmp_path):
    sweep.command(
        ["sweep", "--seeds=0,1,2", "--together", f"--output={tmp_path}", "--config=configs/digits.py"]
    )
    assert len(started) == 13
    assert started[0][1:] == [
        "--config.seed=0",
        "--config.num_seeds=3",
        f"--workdir={tmp_path}/afd-resnet8-seeds0-2",
    ]


def test_a_failed_run_does_not_end_the_sweep(started, tmp_path):
    started.codes = {2: 5, 3: 4}
    with pytest.raises(FFLError, match=r"dml, resnet8, seed 0 ended with exit code 5, and 1 more") as raised:
        sweep.command(["sweep", "--methods=ffl,dml,one,kd", f"--output={tmp_path}"])
    assert raised.value.exit_code == 5
    assert (len(started), started.reports) == (4, 1)


def test_a_killed_run_is_told_as_such_and_does_not_end_the_sweep(started, tmp_path):
    started.codes = {1: -9, 2: -6}
    with pytest.raises(
        ResourceError, match=r"dml, resnet8, seed 0 was ended by SIGKILL, and 1 more; .*memory"
    ):
        sweep.command(["sweep", "--methods=dml,ffl,one", f"--output={tmp_path}"])
    assert (len(started), started.reports) == (3, 1)


@pytest.mark.parametrize(
    "stored", [[], 1, {}, {"data": 1}, {"data": {}}, {"epochs": 1, "data": {"mean": 1, "std": 1}}]
)
def test_a_run_with_damaged_files_is_started_again(stored, started, tmp_path):
    """It is for the run itself to say that it is complete."""
    workdir = tmp_path / "ffl-resnet8-seed0"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(stored))
    (workdir / "summary.json").write_text('{"status": "completed"}')
    sweep.command(["sweep", "--methods=ffl", f"--output={tmp_path}"])
    assert len(started) == 1


def test_without_data_no_other_run_is_tried(started, tmp_path):
    started.codes = {1: 3}
    with pytest.raises(FFLError) as raised:
        sweep.command(["sweep", "--methods=ffl", f"--output={tmp_path}"])
    assert raised.value.exit_code == 3
    assert len(started) == 1


def test_a_stopped_run_stops_the_sweep(started, tmp_path):
    started.codes = {2: 75}
    with pytest.raises(Preempted, match="stopped in dml, resnet8, seed 0: run the same command again"):
        sweep.command(["sweep", "--methods=ffl,dml,one", f"--output={tmp_path}"])
    assert (len(started), started.reports) == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output is missing"),
        (["--output=x", "--seeds=0,one"], "--seeds=0,one must be whole numbers"),
        (["--output=x", "--seeds=0,2", "--together"], "follow one another, got 0,2"),
        (["--output=x", "--methods=fll"], "did you mean ffl?"),
        (["--output=x", "--methods=ffl", "--networks=resnet9"], "unknown network 'resnet9'"),
        (["--output=x", "--config.epohs=3"], "did you mean epochs?"),
        (["--output=x", "--config.seed=3"], "a sweep sets it by --seeds"),
        (["--output=x", "--config.num_seeds=3"], "a sweep sets it by --together"),
        (["--output=x", "--config=configs/digits.py:epochs=3,method=ffl"], "a sweep sets it by --methods"),
        (["--output=x", "--config.epochs=0"], "config.epochs must be at least 1"),
        (["--output=x", "--methods=ffl", "--slurm=", "--together"], "exclude each other"),
        (["--output=x", "--methods=ffl", "--slurm=", "--jobs=2"], "exclude each other"),
        (["--output=x", "--methods=ffl", "--slurm="], "there is no sbatch"),
    ],
)
def test_refusals_come_before_the_first_run(arguments, message, started, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        sweep.command(["sweep", *arguments])
    assert started == []


def test_a_real_sweep_is_reported_and_complete(cache, monkeypatch, tmp_path, capfd):
    """Two seeds of one network alone; then a third is added, and the others are not started again."""
    monkeypatch.setattr(sweeps, "_PROGRAM", [sys.executable, *UNDRAWN])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache / "jax"))
    command = ["sweep", *TINY, "--methods=independent", "--config.subnetworks.num=1", f"--output={tmp_path}"]
    sweep.command([*command, "--seeds=0,1", "--together"])
    assert "[1/1] independent, tiny, seeds 0-1" in capfd.readouterr().out
    summary = files.read_json(tmp_path / "independent-tiny-seeds0-1" / "seed_1" / "summary.json")
    assert summary["status"] == "completed"
    table = (tmp_path / "report/report.md").read_text()
    assert "independent" in table
    assert (tmp_path / "report/index.html").exists()

    sweep.command([*command, "--seeds=0,1", "--together"])
    assert "[1/1] independent, tiny, seeds 0-1: complete" in capfd.readouterr().out
    monkeypatch.setattr(sweeps, "run", lambda arguments: pytest.fail("started again"))
    sweep.command([*command, "--seeds=0,1", "--together"])
    with pytest.raises(pytest.fail.Exception):  # another configuration: for the run itself to refuse
        sweep.command([*command, "--seeds=0,1", "--together", "--config.batch_size=32"])


def test_a_signal_is_passed_on_once(commands):
    """The run has saved before the sweep ends."""
    script = """
    import os, signal, sys, threading, time
    from ffl_jax.devices import preemption
    from ffl_jax.training import sweep
    preemption.install()
    run = "import signal, sys, time; got = []; signal.signal(signal.SIGTERM, lambda *_: got.append(1)); "
    run += "print('ready', flush=True); [time.sleep(0.1) for _ in range(1000) if not got]; time.sleep(0.5); "
    run += "print(f'{len(got)} signal', flush=True); sys.exit(75)"
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    print("ended with", sweep.run([sys.executable, "-c", run]), preemption.requested())
    """
    result = commands.run("-u", "-c", textwrap.dedent(script))
    assert result.stdout.splitlines() == ["ready", "1 signal", "ended with 75 True"]
    assert not preemption.requested()


# Stands in for `ffl_jax.main`: says what it may use, then does what its seed has for it.
RUN = """
import json, os, signal, sys, time
seed = int(next(word for word in sys.argv if word.startswith("--config.seed=")).rpartition("=")[2])
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
used = {key: os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION")}
print(json.dumps(used | {"cores": sorted(os.sched_getaffinity(0))}), flush=True)
print("seed", seed, "is bad" if seed == 1 else "is good", file=sys.stderr, flush=True)
here = os.path.join(os.environ["MEETING"], str(seed))
open(here, "w").close()
if seed == 1:
    sys.exit(5)
wanted = int(os.environ["WANTED"])
while len(os.listdir(os.environ["MEETING"])) < wanted and not got:
    time.sleep(0.01)
if wanted > 9:
    print(len(got), "signal", flush=True)
    sys.exit(75)
"""


@pytest.fixture
def side_by_side(monkeypatch, tmp_path):
    """The command of a sweep of `RUN`s, none of which ends before so many have begun."""
    monkeypatch.setattr(sweeps, "_PROGRAM", [sys.executable, "-S", "-c", RUN])
    (tmp_path / "meeting").mkdir()
    monkeypatch.setenv("MEETING", str(tmp_path / "meeting"))
    monkeypatch.setenv("WANTED", "3")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6,7,8")
    return ["sweep", "--methods=ffl", "--seeds=0,1,2", f"--output={tmp_path / 'runs'}"]


def test_jobs_at_once_divide_the_machine_and_a_failed_one_is_named(side_by_side, capfd):
    """The two others wait for one another: they run at the same time."""
    with pytest.raises(FFLError, match=r"ffl, resnet8, seed 1 ended with exit code 5: see above") as raised:
        sweep.command([*side_by_side, "--jobs=2"])
    assert raised.value.exit_code == 5
    lines = capfd.readouterr().out.splitlines()
    by_job = [
        [line.partition(": ")[2] for line in lines if line.startswith(f"[{n}/3] ffl, resnet8, seed {n - 1}")]
        for n in (1, 2, 3)
    ]
    assert [job[0] for job in by_job] == ["", "", ""]  # it begins
    assert [job[2:] for job in by_job] == [
        ["seed 0 is good", "done"],
        ["seed 1 is bad", "ended with exit code 5"],
        ["seed 2 is good", "done"],
    ]
    used = [json.loads(job[1]) for job in by_job]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in used} == {"4,GPU-5", "6,7"}
    assert {one["XLA_PYTHON_CLIENT_MEM_FRACTION"] for one in used} == {None}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        assert {tuple(one["cores"]) for one in used} == {
            tuple(cores[: len(cores) // 2]),
            tuple(cores[len(cores) // 2 :]),
        }
    assert sorted(os.sched_getaffinity(0)) == cores


def test_no_more_parts_than_runs_that_are_left(side_by_side, started, monkeypatch):
    """One run alone has the whole machine, and the terminal."""
    counts = []
    monkeypatch.setattr(sweeps, "deal", lambda count: counts.append(count) or count * [slots.Slot()])
    monkeypatch.setattr(sweeps, "is_complete", lambda job: job.seeds != [1])
    sweep.command([*side_by_side, "--jobs=3"])
    assert (counts, len(started)) == ([1], 1)


def test_a_signal_stops_all_jobs_and_each_saves(side_by_side, commands, tmp_path):
    script = f"""
    import os, signal, sys, threading, time
    from ffl_jax import cli, sweep
    from ffl_jax.training import sweep as sweeps
    sweeps._PROGRAM = [sys.executable, "-S", "-c", {RUN!r}]
    def stop():
        while len(os.listdir(os.environ["MEETING"])) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    cli.run(sweep.command)
    """
    environment = {"WANTED": "10", "MEETING": os.environ["MEETING"]}
    seeds = "--seeds=0,2,3"
    arguments = [*side_by_side[1:], seeds, "--jobs=2"]
    done = commands.run("-c", textwrap.dedent(script), *arguments, code=75, env=environment)
    assert done.stdout.count(": 1 signal") == 2
    assert "[3/3] ffl, resnet8, seed 3" not in done.stdout
    assert "stopped in ffl, resnet8, seed 0, and 1 more: run the same command again" in done.stderr


@pytest.mark.parametrize(
    ("variables", "count", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 2, ["0,1", "2,3"]),
        ({"CUDA_VISIBLE_DEVICES": " 3, GPU-a ,-1,2"}, 2, ["3", "GPU-a"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 2, ["1", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 3, ["0", "1", "0"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 2, [None, None]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}, 2, [None, None]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cuda,cpu"}, 2, ["0", "1"]),
        ({}, 2, ["0,1,2", "3,4,5"]),  # of nvidia-smi
        ({"PATH": "/nowhere"}, 2, [None, None]),
    ],
)
def test_gpus_dealt_out(variables, count, expected, monkeypatch, tmp_path):
    """Each to one job, equal numbers to all; few are shared, and their memory is."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!{sys.executable}\nprint(*range(6), sep='\\n')\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    dealt = slots.deal(count)
    assert [slot.environment.get("CUDA_VISIBLE_DEVICES") for slot in dealt] == expected
    shared = len(set(expected)) < count and expected[0] is not None
    assert all(("XLA_PYTHON_CLIENT_MEM_FRACTION" in slot.environment) == shared for slot in dealt)


@pytest.mark.parametrize("cores", [[0, 1, 2, 3, 8, 9, 10], [5]])
def test_cores_dealt_out(cores, monkeypatch):
    """All of them, each to one job, as evenly as can be; fewer than jobs are shared."""
    monkeypatch.setattr(slots, "_cores", lambda: cores)
    dealt = [slot.cores for slot in slots.deal(3)]
    assert sorted({core for some in dealt for core in some}) == cores
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert min(map(len, dealt)) == max(1, len(cores) // 3)


def test_a_sweep_leaves_the_gpus_to_its_runs(commands, tmp_path):
    """JAX has not started in the process that plans."""
    script = """
    import sys
    from jax._src import xla_bridge
    from ffl_jax import sweep
    from ffl_jax.training import slots
    from ffl_jax.training import slots
    from ffl_jax.training import sweep as sweeps
    def train(jobs, at_once):
        assert slots.deal(at_once)
        sys.exit(xla_bridge.backends_are_initialized())
    sweeps.train = train
    sweep.command(["sweep", "--methods=ffl,kd", "--jobs=2", "--output=x"])
    """
    commands.run("-c", textwrap.dedent(script), cwd=tmp_path)


@pytest.fixture
def sbatch(monkeypatch, tmp_path):
    """A stand-in for sbatch; gives what it was called with: (arguments, folder, its environment)."""
    calls, program = tmp_path / "calls", tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "seen = [sys.argv[1:], os.getcwd(), dict(os.environ)]\n"
        f"open({str(calls)!r}, 'a').write(json.dumps(seen) + '\\n')\n"
        "print('17;cluster')\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return lambda: list(map(json.loads, calls.read_text().splitlines()))


def test_slurm_gets_an_array_and_a_report(sbatch, tmp_path, capsys):
    output = tmp_path / "runs"
    arguments = ("--methods=ffl,dml", "--networks=resnet8,vgg16", "--seeds=0,1,2", f"--output={output}")
    options = "--slurm=--partition=gpu --gres=gpu:1"
    sweep.command(
        ["sweep", *arguments, "--config=configs/cifar10.py:epochs=60", options, "--config.precision=bfloat16"]
    )
    (array, folder, settings), (report, _, _) = sbatch()
    assert array == [
        *("--parsable", "--array=0-11", "--partition=gpu", "--gres=gpu:1"),
        *("launch/slurm.sbatch", "--config.precision=bfloat16"),
    ]
    assert folder == str(ROOT)
    assert (
        settings.items()
        >= {
            "METHODS": "ffl dml",
            "NETWORKS": "resnet8 vgg16",
            "SEEDS": "0 1 2",
            "CONFIG": f"{ROOT}/configs/cifar10.py:epochs=60",
            "RUNS": str(output),
        }.items()
    )
    assert {"--dependency=afterany:17", "--partition=gpu"} <= set(report)
    assert not any("gres" in option for option in report)
    line = shlex.split(report[-1].removeprefix("--wrap="))
    assert line[1:] == ["-m", "ffl_jax.report", str(output), f"--output={output}/report"]
    assert "submitted 12 runs as job 17" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "array", "report"),
    [
        (
            "--partition gpu --comment 'a b'",
            ["--partition", "gpu", "--comment", "a b"],
            ["--partition", "gpu"],
        ),
        (
            "-p gpu -A me --gpus-per-node 2",
            ["-p", "gpu", "-A", "me", "--gpus-per-node", "2"],
            ["-p", "gpu", "-A", "me"],
        ),
        ("-pgpu --exclusive --qos=long", ["-pgpu", "--exclusive", "--qos=long"], ["-pgpu", "--qos=long"]),
        (
            "--requeue --clusters 'a,b' --account=x\\ y",
            ["--requeue", "--clusters", "a,b", "--account=x y"],
            ["--clusters", "a,b", "--account=x y"],
        ),
        (
            "--output=logs/%j -e logs/e --chdir .",
            ["--output={}/logs/%j", "-e", "{}/logs/e", "--chdir", "{}"],
            [],
        ),
        ("-ologs/%j --error /dev/null", ["-o{}/logs/%j", "--error", "/dev/null"], []),
        ("", [], []),
    ],
)
def test_options_of_sbatch_keep_their_values(options, array, report, sbatch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep.command(["sweep", "--methods=ffl", "--output=runs", f"--slurm={options}"])
    (first, _, _), (then, _, _) = sbatch()
    assert first[2:-1] == [word.format(tmp_path) for word in array]
    assert then[4:-2] == report


def test_paths_of_a_sweep_by_slurm_are_absolute(sbatch, tmp_path, monkeypatch):
    """Slurm starts the runs in another folder than the user is in; a bucket is nowhere but where it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "from configs import common\n\ndef get_config(arg=None):\n    config = common.get_config(arg)\n"
        "    config.data.update(name='folder', data_dir='data', cache_dir='gs://bucket/x')\n"
        "    return config\n"
    )
    (tmp_path / "mine.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", "lib:/opt/lib")
    sweep.command(
        [
            *("sweep", "--methods=kd", "--output=runs", "--config=own.py:epochs=3", "--slurm="),
            *("--config.modules=mine", "--config.teachers.runs=a:sub_0", "--config.data.manual_dir=/down"),
        ]
    )
    (array, _, settings), (report, _, _) = sbatch()
    assert settings["CONFIG"] == f"{tmp_path}/own.py:epochs=3"
    assert settings["RUNS"] == f"{tmp_path}/runs"
    assert settings["PYTHONPATH"] == f"{tmp_path}:{tmp_path}/lib:/opt/lib"
    assert sorted(array[array.index("launch/slurm.sbatch") + 1 :]) == [
        f"--config.data.data_dir={tmp_path}/data",
        "--config.data.manual_dir=/down",
        "--config.modules=mine",
        f"--config.teachers.runs={tmp_path}/a:sub_0",
    ]
    assert f"{tmp_path}/runs" in report[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--comment 'a b", "No closing quotation"),
        ("gpu --hold", "'gpu' belongs to no option"),
        ("-p a b", "'b' belongs"),
    ],
)
def test_options_that_no_shell_would_take(options, message, sbatch, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sweep.command(["sweep", "--methods=ffl", f"--output={tmp_path}", f"--slurm={options}"])
