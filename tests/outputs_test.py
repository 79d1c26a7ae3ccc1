import io
import json
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from ffl_jax.errors import ConfigError
from ffl_jax.workdir import outputs
from ffl_jax.workdir.outputs import draw_curves  # before the fixture of all tests stands in for it


def write(log, step):
    log.write(
        step, step / 10, "train", {"cross_entropy/sub_0": 1.0 / step, "distillation/sub_0": 0.1, "loss": 2.0}
    )
    log.write(step, step / 10, "test", {"sub_0/top1": 0.1 * step, "fused/top1": 0.5})


def test_metrics_continue_where_the_checkpoint_was(tmp_path):
    log = outputs.MetricsLog(tmp_path, 0, 0)
    write(log, 1)
    log.sync()
    size = log.size
    write(log, 2)  # after the checkpoint: to be done again
    log.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "ep')  # torn by a kill
    assert [row["step"] for row in outputs.read_metrics(tmp_path / "metrics.jsonl")] == [1, 1, 2, 2]

    log = outputs.MetricsLog(tmp_path, size, 1)
    write(log, 2)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2]
    assert json.loads(lines[0]) == {
        "step": 1,
        "epoch": 0.1,
        "split": "train",
        "cross_entropy/sub_0": 1.0,
        "distillation/sub_0": 0.1,
        "loss": 2.0,
    }


def test_lost_metrics_are_said(tmp_path, caplog):
    outputs.MetricsLog(tmp_path, 1000, 7).close()
    assert "has lost lines" in caplog.text


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "summary.json"
    assert outputs.read_json(path) == {}
    outputs.write_json(path, {"a": [1, 2.5, None]})
    outputs.write_json(path, {"b": 1})
    assert outputs.read_json(path) == {"b": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    with pytest.raises(TypeError):
        outputs.write_json(path, {"b": object()})
    assert outputs.read_json(path) == {"b": 1}


def test_curves(tmp_path):
    log = outputs.MetricsLog(tmp_path, 0, 0)
    for step in range(1, 4):
        write(log, step)
    log.close()
    draw_curves(tmp_path, "title", "sub_0")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        colors = len(image.convert("RGB").getcolors(10**6))
    assert colors > 50, "nothing is drawn"


def test_curves_of_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curves(tmp_path, "title", "sub_0")
    assert (tmp_path / "curves.png").exists()


def test_how_subnetworks_differ_is_a_panel_of_its_own(tmp_path):
    sizes = []
    for more in ({}, {"diversity/disagreement": 0.1, "diversity/kl": 0.2, "diversity/cka": 0.9}):
        log = outputs.MetricsLog(tmp_path, 0, 0)
        log.write(1, 1.0, "test", {"sub_0/top1": 0.5} | more)
        log.close()
        draw_curves(tmp_path, "title", "sub_0")
        with Image.open(tmp_path / "curves.png") as image:
            sizes.append(image.width)
    assert sizes[1] > sizes[0]


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


def test_images_and_histograms(tmp_path):
    log = outputs.MetricsLog(tmp_path, 0, 0)
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


def test_weights_and_biases_sees_every_line(tmp_path, monkeypatch):
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
    run = outputs.start_wandb("project", tmp_path, {"epochs": 3})
    again = outputs.start_wandb("project", tmp_path, {"epochs": 3})
    other = outputs.start_wandb("project", tmp_path / "seed_1", {"epochs": 3})
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]
    assert (begun[0]["project"], begun[0]["config"], begun[0]["resume"]) == (
        "project",
        {"epochs": 3},
        "allow",
    )
    del again, other
    log = outputs.MetricsLog(tmp_path, 0, 0, run)
    log.write(1, 0.5, "train", {"loss": 2.0})
    log.write_speed(1, 100.0)
    log.close()
    assert logged == [(1, {"train/loss": 2.0}), (1, {"train/images_per_second": 100.0}), "finished"]

    def refuse(**settings):
        raise RuntimeError("no API key")

    monkeypatch.setattr(module, "init", refuse)
    with pytest.raises(ConfigError, match=r"config\.wandb=project: no API key; wandb login, or set"):
        outputs.start_wandb("project", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        outputs.start_wandb("project", tmp_path, {})
