import json

import pytest
from PIL import Image

from ffl_jax import outputs


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
    outputs.draw_curves(tmp_path, "title")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        colors = len(image.convert("RGB").getcolors(10**6))
    assert colors > 50, "nothing is drawn"
