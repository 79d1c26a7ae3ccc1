"""The bench on networks that compile in no time: what it measures is there, and is what it says."""

import json
import os
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from configs import digits, folder
from ffl_jax import bench
from ffl_jax.errors import ConfigError
from ffl_jax.measure import kernels, speed


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command; returns (standard output, what it wrote as JSON)."""

    def command(*arguments):
        argv = ["bench", *arguments, f"--json={tmp_path}/bench.json"]
        bench.command(argv)
        return capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())

    monkeypatch.setattr(speed, "_LOOP_SECONDS", 0.2)
    monkeypatch.setattr(speed, "_STREAM_SECONDS", 0.2)
    monkeypatch.setattr(speed, "peak_flops", {"float32": 1e12, "bfloat16": 2e12}.get)
    monkeypatch.setattr(speed, "bandwidth", lambda: 1e11)
    return command


def test_every_part_on_digits(run):
    text, results = run(
        "--config=configs/digits.py:network=tiny,method=independent",
        "--executions=loop,vmap",
        "--nums=2",
        "--precisions=float32",
        "--batch_sizes=32",
        "--seeds=1",
    )
    assert results["devices"] == 1
    assert (results["bandwidth"], results["peaks"]["bfloat16"]) == (1e11, 2e12)
    assert results["memory_mb"]["host"] > 50
    rows = results["rows"]
    found = [(row["what"], row["execution"], row["num"], row["batch_size"]) for row in rows]
    assert {row["num_seeds"] for row in rows} == {1}
    grid = [("training step", mode, 2, 32) for mode in ("loop", "vmap")]
    rest = [("evaluation step", "loop", 2, 360), ("input, on the device", "loop", 2, 64)]
    assert found == [*grid, *rest, ("training loop", "loop", 2, 64)]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["milliseconds"])
        assert (
            text.count(f"| {row['what']} | 1 | {row['num']} | {row['batch_size']} | {row['execution']} |")
            == 1
        )
    for row in rows[:3]:
        assert row["compile_seconds"] > 0
        assert row["temporary_mb"] > 0
    assert rows[1]["flops"] == pytest.approx(rows[0]["flops"], rel=0.05)  # whichever way they run


def test_numbers_of_networks_and_seeds_multiply(run):
    arguments = ("--config=configs/digits.py:network=tiny,method=independent", "--parts=step")
    _, results = run(*arguments, "--nums=1,2", "--seeds=1,3")
    rows = results["rows"]
    assert [(row["num"], row["num_seeds"]) for row in rows] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for row in rows:
        images = 64 * row["num_seeds"]
        assert row["images_per_second"] == pytest.approx(1e3 * images / row["milliseconds"])
    assert 1.9 < rows[2]["flops"] / rows[0]["flops"] < 2.1
    assert 2.8 < rows[1]["flops"] / rows[0]["flops"] < 3.1


def test_peaks_are_those_of_this_age():
    assert 1e9 < speed.peak_flops("float32") < 1e16
    assert 1e8 < speed.bandwidth() < 1e14


def test_flops_of_a_step_are_those_of_its_convolutions(run):
    """Of ResNet-8 alone: three times the forward pass, which is counted by hand."""
    _, results = run(
        *("--config=configs/digits.py:network=resnet8,method=independent", "--parts=step"),
        "--config.subnetworks.num=1",
    )
    products = 64 * 27 * 16 + 64 * 2 * 9 * 16 * 16  # stem, first stage, at 8x8
    products += 16 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32) + 4 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    expected = 64 * 2 * (3 * products - 64 * 27 * 16)  # no gradient for the images
    # At the border, XLA leaves out what meets padding: 3x3 at 8x8 has 484 of 576 products, less below.
    assert 0.6 < results["rows"][0]["flops"] / expected < 1.2


def test_streamed_input_says_what_a_worker_makes(run, tmp_path):
    for number in range(24):
        path = tmp_path / "tree" / ("train" if number < 16 else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), (number, 0, 0)).save(path)
    text, results = run(
        *("--config=configs/folder.py:network=tiny", f"--config.data.data_dir={tmp_path}/tree"),
        *("--config.data.streaming=True", "--config.data.workers=0", "--config.batch_size=8"),
        *(
            "--config.data.image_size=16",
            "--config.data.mean=(0.5,0.5,0.5)",
            "--config.data.std=(0.2,0.2,0.2)",
        ),
        "--parts=step,input",
    )
    assert [row["what"] for row in results["rows"]] == ["training step", "input, 1 worker(s)"]
    assert "the step above wants" in text


def test_what_devices_exchange_is_counted():
    program = """
      %all-reduce.1 = (f32[], /*index=1*/f32[16,4]{1,0:T(8,128)}) all-reduce(%a, %b), channel_id=1
      %gathered = bf16[8,10]{1,0} all-gather(%x), channel_id=2, dimensions={0}
      %all-reduce-start = f32[3]{0} all-reduce-start(%y), channel_id=3
      %done = f32[3]{0} all-reduce-done(%all-reduce-start)
      ROOT %sum = f32[3]{0} add(%done, %all-reduce.1)
    """
    assert speed.communication(program) == {
        "all-reduce": {"bytes": 4 + 4 * 64 + 4 * 3, "messages": 2},
        "all-gather": {"bytes": 2 * 80, "messages": 1},
    }
    assert speed.communication("%x = f32[3]{0} add(%a, %b)") == {}


def test_noise_stands_for_a_dataset():
    for config in (digits.get_config(), folder.get_config()):
        config.data.image_size = 24
        dataset = speed.noise(config, 7)
        assert dataset.train.image_shape == (24, 24, 3)
        assert len(dataset.train) == 200 * config.batch_size
        assert set(dataset.train.labels) == set(range(7))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--parts=stop", "--parts: .*step"),
        ("--nums=2,x", "--nums takes whole numbers from 1 on, got 'x'"),
        ("--precisions=float16", "config.precision must be one of float32, bfloat16"),
        ("--batch_sizes=0", "--batch_sizes takes whole numbers from 1 on, got '0'"),
    ],
)
def test_refusals(argument, message, run):
    with pytest.raises(ConfigError, match=message):
        run("--config=configs/digits.py:network=tiny", "--parts=step", argument)


def test_kernels_by_layer_and_by_operation(run):
    text, results = run("--config=configs/digits.py:network=tiny", "--parts=kernels")
    shares = results["kernels"]
    layers = {share["name"] for share in shares["layers"]}
    ways = ("forward", "backward, gradients of inputs", "backward, gradients of kernels")
    assert {f"convolutions, {way}" for way in ways} <= layers
    assert {"norms, forward", "norms, backward", "optimiser, statistics and copies"} <= layers
    for key in ("milliseconds", "kernels"):
        by_layer, by_operation = (sum(share[key] for share in each) for each in shares.values())
        assert by_layer == pytest.approx(by_operation)
    assert f"| {shares['operations'][0]['name'][:90]} |" in text


def test_what_takes_longest_is_first():
    """A product of 2 GFLOP beside one of 2 MFLOP, called after their modules."""

    def products(x, y):
        with jax.named_scope("stage1_conv"):
            x = x @ x
        with jax.named_scope("norm1"):
            return x, y @ y

    x, y = jnp.ones((1024, 1024)), jnp.ones((100, 100))
    compiled = jax.jit(products).lower(x, y).compile()
    start = time.perf_counter()
    layers, operations = kernels.measure(compiled, lambda: compiled(x, y), 3)
    elapsed = time.perf_counter() - start
    assert [share.name for share in layers[:2]] == ["convolutions, forward", "norms, forward"]
    assert layers[0].milliseconds > 10 * layers[1].milliseconds
    assert sum(share.milliseconds for share in operations) < 1e3 * elapsed / 3 * os.cpu_count()


def test_the_kit_for_accelerators_asks_for_what_there_is(tmp_path):
    """Its commands, told by a stand-in for Python: the bench takes each, with flags of our own."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    stand_in.chmod(0o755)
    kit = Path(bench.__file__).parents[1] / "benchmarks" / "accelerator.sh"
    own = "--config.batch_size=8"
    done = subprocess.run(
        [kit, tmp_path / "out", own],
        env=os.environ | {"PYTHON": str(stand_in)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if "ffl_jax.bench" in line]
    assert len(calls) == 5
    for line in calls:
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in line.split()[2:])
        assert flags["config.batch_size"] == "8"
        assert set(flags["parts"].split(",")) <= set(bench.PARTS)
        assert flags.keys() <= {
            "synthetic",
            "json",
            "parts",
            *bench.GRID,
            "config.batch_size",
            "config.subnetworks.execution",
        }
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 2\n")
    failing.chmod(0o755)
    done = subprocess.run(
        [kit, tmp_path / "out"], env=os.environ | {"PYTHON": str(failing)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.count("failed: error: no such thing")) == (1, 5)
