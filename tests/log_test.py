import io
import json
import os
import random
import shutil
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import api_pb2, event_pb2, plugin_hparams_pb2

from ffl_jax.errors import ConfigError
from ffl_jax.workdir.log import MetricsLog, over_stretches, read_metrics, start_wandb
from ffl_jax.workdir.tensorboard import Events


def write(log, step):
    log.write(step, step / 10, "train", {"loss": 2.0 / step})
    log.write(step, step / 10, "test", {"sub_0/top1": 0.1 * step})


def test_metrics_continue_where_the_checkpoint_was(tmp_path):
    log = MetricsLog(tmp_path, 0, 0)
    write(log, 1)
    log.sync()
    size = log.size
    write(log, 2)  # after the checkpoint: to be done again
    log.close()
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "ep')  # torn by a kill
    assert read_metrics(path) == (log.rows, 0)

    log = MetricsLog(tmp_path, size, 1)
    assert [row["step"] for row in log.rows] == [1, 1]
    write(log, 2)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    assert lines[0] == {"step": 1, "epoch": 0.1, "split": "train", "loss": 2.0}
    assert lines == log.rows


def test_lost_and_damaged_metrics_are_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "split": "test"}\n[1]\n')
    log = MetricsLog(tmp_path, 1000, 7)
    log.close()
    assert len(log.rows) == 1
    assert f"{path} has lost lines" in caplog.text
    assert f"{path} has 1 damaged line(s)" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b'{"epoch": 1.0, "spl',
        b"\xff\x00",
        b"[" * 10**5,
        b"[1]",
        b"null",
        b'{"epoch": 1.0}',
        b'{"split": "test"}',
        b'{"epoch": 1.0, "split": 3}',
        b'{"epoch": NaN, "split": "test"}',
        b'{"epoch": 1.0, "split": "test", "sub_0/top1": 1' + b"0" * 400 + b"}",
    ],
)
def test_damaged_lines_are_counted_and_left_out(tmp_path, line):
    good = b'{"step": 1, "epoch": 1.0, "split": "train", "loss": Infinity}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + line + b"\n" + good + line)
    rows, damaged = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == 2 * [{"step": 1, "epoch": 1.0, "split": "train", "loss": float("inf")}]
    assert damaged == 1


def test_whatever_bytes_the_file_holds(tmp_path):
    """Its lines that are as they were written are all kept, and what is read then is read again."""
    generator, path = random.Random(0), tmp_path / "metrics.jsonl"
    lines = [b'{"step": %d, "epoch": %d, "split": "test", "x": 0.5}\n' % (n, n) for n in range(1, 6)]
    for _ in range(2000 if "FFL_LONG_FAULTS" in os.environ else 30):
        damaged = list(lines)
        for index in generator.sample(range(5), 2):
            line = bytearray(damaged[index])
            for _ in range(generator.choice((1, 1, 3, 30))):
                place, how = generator.randrange(len(line) + 1), generator.randrange(4)
                line[place : place + generator.choice((0, 1, 20))] = generator.randbytes(how)
            damaged[index] = bytes(line)
        content = b"".join(damaged)
        path.write_bytes(content)
        log = MetricsLog(tmp_path, len(content), 5)
        write(log, 6)
        log.close()
        assert read_metrics(path) == (log.rows, 0)
        assert [row["step"] for row in log.rows[-2:]] == [6, 6]
        for line in content.split(b"\n")[:-1]:
            assert line + b"\n" not in lines or json.loads(line) in log.rows


def test_tensorboard_that_fails_is_said_once(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    log = MetricsLog(tmp_path, 0, 0)
    monkeypatch.setattr(Events, "_write", full)
    write(log, 1)
    log.write_images(1, "images", np.zeros((1, 2, 2, 3), np.uint8))
    write(log, 2)
    log.close()
    assert caplog.text.count("TensorBoard fails, and the run goes on without it: [Errno 28] No space") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == 4


@pytest.mark.parametrize("value", ['"good"', "null", "[0.5]"])
def test_what_is_no_number_is_left_out_of_its_row(tmp_path, value):
    """The others of the row count all the same, as in curves of runs that other programs have written to."""
    line = f'{{"epoch": 1, "split": "test", "sub_0/top1": {value}, "sub_1/top1": 0.5}}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    assert read_metrics(tmp_path / "metrics.jsonl") == ([{"split": "test", "epoch": 1, "sub_1/top1": 0.5}], 0)


def events(folder):
    """{tag: value} of the only TensorBoard file in a folder."""
    (path,) = folder.iterdir()
    content, found = path.read_bytes(), {}
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        found |= {value.tag: value for value in event.summary.value}
        content = content[16 + size :]
    return found


def test_gauges_stand_behind_what_a_line_had_before(tmp_path):
    """They are shown as they are, take nobody's name, and are left out where JSON has no number for them."""
    log = MetricsLog(tmp_path, 0, 0)
    gauges = {"rate": 0.5, "loss": 9.0, "norm": float("inf"), "other": float("nan")}
    row = log.write(10, 1.0, "train", {"loss": 2.0}, gauges)
    log.write(11, 1.1, "train", {"loss": 3.0}, {"rate": 0.25})  # waits to be joined, its gauge does not
    log.close()
    assert list(row) == ["step", "epoch", "split", "loss", "rate"]
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {"step": 10, "epoch": 1.0, "split": "train", "loss": 2.0, "rate": 0.5}
    assert second["loss"] == 3.0
    found = events(tmp_path / "tensorboard")
    assert {tag: value.simple_value for tag, value in found.items()} == {
        "train/loss": 2.0,
        "train/rate": 0.25,
    }


def line(epoch, loss, **more):
    return {"step": 10, "epoch": epoch, "split": "train", "loss": loss, **more}


def test_lines_that_cover_little_are_joined_with_the_next():
    """A line for every 20 steps of 46 in an epoch: 6 lie before its end, 14 behind it. Weighted by hand."""
    rows = [
        line(x / 46, loss) for x, loss in ((20, 4.0), (40, 3.0), (46, 2.0), (60, 1.0), (80, 0.5), (86, 9.0))
    ]
    test = {"epoch": 1.0, "split": "test", "x": 1}
    joined = over_stretches([*rows[:3], test, *rows[3:]])
    assert joined == [
        rows[0],
        rows[1],
        test,
        {**rows[3], "loss": pytest.approx((6 * 2 + 14 * 1) / 20)},
        rows[4],
    ]
    assert over_stretches(rows[:1]) == rows[:1]


@pytest.mark.parametrize("epochs", [[1.0, 1.0], [2.0, 1.0, 3.0], [0.0, 1.0], [1e308, -1e308], [-1.0, 1.0]])
def test_stretches_of_whatever_a_file_holds(epochs):
    """Numbers that only some lines have are left as they are; None is a report's for one that is absurd."""
    rows = [
        line(1.0, 1.0),
        *(line(epoch, 2.0, odd=None, some=n) for n, epoch in enumerate(epochs)),
        {"epoch": 1.0, "split": "train"},
    ]
    joined = over_stretches(rows)
    assert joined[0] == rows[0]
    assert all(row["split"] == "train" for row in joined)


def test_a_continued_log_knows_what_waits(tmp_path):
    log = MetricsLog(tmp_path, 0, 0)
    log.write(100, 1.0, "train", {"loss": 1.0})
    log.write(110, 1.1, "train", {"loss": 2.0})
    size = log.size
    log.close()
    log = MetricsLog(tmp_path, size, 110)
    shutil.rmtree(tmp_path / "tensorboard")
    log = MetricsLog(tmp_path, size, 110)
    log.write(190, 1.9, "train", {"loss": 3.0})
    log.close()
    shown = events(tmp_path / "tensorboard")["train/loss"].simple_value
    assert shown == pytest.approx((0.1 * 2 + 0.8 * 3) / 0.9)


def test_hyper_parameters_and_results(tmp_path):
    """As the page HParams reads them: settings of each kind, names of metrics, and an end that went well."""
    log = MetricsLog(tmp_path, 0, 0)
    log.write_settings(0, {"seed": 3, "flip": True, "network": "tiny", "std": [1, 2]}, ["final/top1"])
    log.write_result(7, {"final/top1": 0.5})
    log.close()
    found = events(tmp_path / "tensorboard")
    assert found.pop("final/top1").simple_value == 0.5
    data = {
        tag: plugin_hparams_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for tag, value in found.items()
    }
    assert all(value.metadata.plugin_data.plugin_name == "hparams" for value in found.values())
    given = data["_hparams_/session_start_info"].session_start_info.hparams
    assert (given["seed"].number_value, given["flip"].bool_value, given["network"].string_value) == (
        3,
        True,
        "tiny",
    )
    assert given["std"].string_value == "[1, 2]"
    experiment = data["_hparams_/experiment"].experiment
    assert {info.name for info in experiment.hparam_infos} == {"seed", "flip", "network", "std"}
    assert [info.name.tag for info in experiment.metric_infos] == ["final/top1"]
    assert data["_hparams_/session_end_info"].session_end_info.status == api_pb2.Status.Value(
        "STATUS_SUCCESS"
    )


def test_images_and_histograms(tmp_path):
    log = MetricsLog(tmp_path, 0, 0)
    images = np.zeros((8, 2, 3, 3), np.uint8)
    images[5] = (10, 20, 30)
    log.write_images(4, "train/batch", images)
    log.write_histograms(4, {"params": {"head": {"kernel": np.arange(10.0), "bias": np.ones(3)}}})
    log.close()
    found = events(tmp_path / "tensorboard")
    assert found.keys() == {"train/batch", "params/head/kernel", "params/head/bias"}
    with Image.open(io.BytesIO(found["train/batch"].image.encoded_image_string)) as grid:
        pixels = np.asarray(grid.convert("RGB"))
    assert pixels.sum() == images.sum()
    assert {tuple(pixel) for pixel in pixels.reshape(-1, 3)} == {(0, 0, 0), (10, 20, 30)}
    histogram = found["params/head/kernel"].histo
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (10, 0, 9, 45)


def test_weights_and_biases_sees_every_line(tmp_path, monkeypatch, caplog):
    """By a stand-in with the parts of its interface that are used; the package is an extra."""
    begun, logged = [], []

    class Run:
        def log(self, scalars, step):
            logged.append((step, scalars))

        def finish(self):
            logged.append("finished")

    def init(**settings):
        begun.append(settings)
        return Run()

    module = types.SimpleNamespace(init=init, Settings=lambda **settings: settings, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    run = start_wandb("project", tmp_path, {"epochs": 3})
    again = start_wandb("project", tmp_path, {"epochs": 3})
    other = start_wandb("project", tmp_path / "seed_1", {"epochs": 3})
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]
    assert (begun[0]["project"], begun[0]["config"], begun[0]["resume"]) == (
        "project",
        {"epochs": 3},
        "allow",
    )
    del again, other
    log = MetricsLog(tmp_path, 0, 0, run)
    log.write(1, 0.5, "train", {"loss": 2.0})
    log.write_speed(1, 100.0)
    log.close()
    assert logged == [(1, {"train/loss": 2.0}), (1, {"train/images_per_second": 100.0}), "finished"]

    def refuse(**settings):
        raise RuntimeError("no API key")

    monkeypatch.setattr(module, "init", refuse)
    assert start_wandb("project", tmp_path, {}) is None
    assert "config.wandb=project (wandb login, or set WANDB_MODE=offline) fails" in caplog.text
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        start_wandb("project", tmp_path, {})
