"""Sweeps: which runs they start, how they go on after each end, and the report behind them."""

import json
import os
import shlex
import stat
import sys
import textwrap

import pytest
from conftest import MAIN, ROOT

from ffl_jax import sweep
from ffl_jax.devices import preemption
from ffl_jax.errors import ConfigError, FFLError, Preempted, ResourceError
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

    def run(arguments):
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
    monkeypatch.setattr(sweeps, "_PROGRAM", [sys.executable, *MAIN])
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


def test_slurm_gets_an_array_and_a_report(monkeypatch, tmp_path, capsys):
    calls = tmp_path / "calls"
    names = "'METHODS', 'NETWORKS', 'SEEDS', 'CONFIG', 'RUNS'"
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"seen = {{name: os.environ.get(name) for name in ({names})}}\n"
        f"open({str(calls)!r}, 'a').write(json.dumps([sys.argv[1:], os.getcwd(), seen]) + '\\n')\n"
        "print('17;cluster')\n"
    )
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    output = tmp_path / "runs"
    arguments = ("--methods=ffl,dml", "--networks=resnet8,vgg16", "--seeds=0,1,2", f"--output={output}")
    options = "--slurm=--partition=gpu --gres=gpu:1"
    sweep.command(
        ["sweep", *arguments, "--config=configs/cifar10.py:epochs=60", options, "--config.precision=bfloat16"]
    )
    (array, folder, settings), (report, _, _) = map(json.loads, calls.read_text().splitlines())
    assert array == [
        *("--parsable", "--array=0-11", "--partition=gpu", "--gres=gpu:1"),
        *("launch/slurm.sbatch", "--config.precision=bfloat16"),
    ]
    assert folder == str(ROOT)
    assert settings == {
        "METHODS": "ffl dml",
        "NETWORKS": "resnet8 vgg16",
        "SEEDS": "0 1 2",
        "CONFIG": "configs/cifar10.py:epochs=60",
        "RUNS": str(output),
    }
    assert {"--dependency=afterany:17", "--partition=gpu"} <= set(report)
    assert not any("gres" in option for option in report)
    line = shlex.split(report[-1].removeprefix("--wrap="))
    assert line[1:] == ["-m", "ffl_jax.report", str(output), f"--output={output}/report"]
    assert "submitted 12 runs as job 17" in capsys.readouterr().out
