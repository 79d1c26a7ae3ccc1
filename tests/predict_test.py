"""Classification of image files, with nothing but what a format needs."""

import importlib
import json
import sys

import conftest
import numpy as np
import pytest
from PIL import Image

from configs import digits
from ffl_jax import deployment, predict
from ffl_jax.data import crops
from ffl_jax.deployment import exporting, predictor
from ffl_jax.errors import CheckpointError, ConfigError, DatasetError

# What is not installed where only `deployment.FORMATS` are: everything else that this project asks for.
TRAINING = {
    *("optax", "chex", "orbax", "ml_collections", "tensorflow_datasets", "array_record", "grain", "sklearn"),
    *("tqdm", "matplotlib", "tensorboardX", "onnx"),
    *("fcntl", "resource"),  # of the standard library, and not on Windows
}
MISSING = {
    "stablehlo": TRAINING | {"flax", "safetensors", "onnxruntime"},
    # Flax asks for these four itself.
    "safetensors": TRAINING - {"optax", "chex", "orbax", "tqdm"} | {"flatbuffers", "onnxruntime"},
    "onnx": TRAINING | {"jax", "jaxlib", "flax", "safetensors"},
}
MISSING["huggingface"] = MISSING["safetensors"]
WITHOUT = """
import importlib.abc, runpy, sys

missing = sys.argv.pop(1).split(",")

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
runpy.run_module("ffl_jax.predict", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{format: an exported file} of `sub_0` of random variables, the test split, the checkpoint's logits."""
    folder = tmp_path_factory.mktemp("models")
    experiment, _ = conftest.write_run(folder / "run", digits.get_config())
    restored = exporting.scoring.restore_checkpoint(folder / "run")
    card, variables = exporting.describe(restored)
    files = {}
    for name in deployment.FORMATS:
        files[name] = folder / "no ending" / name
        files[name].parent.mkdir(exist_ok=True)
        module = importlib.import_module(f"ffl_jax.deployment.{name}")
        module.write(files[name], predictor.build(card)[0], variables, card)
    logits = exporting.reference(restored, "sub_0", experiment.dataset.test.images[:5])
    return files, experiment.dataset.test, logits


@pytest.fixture(scope="module")
def images(models, tmp_path_factory):
    """A folder with the first five test images, a damaged one and a hidden one; grey, RGB and palette."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep/er").mkdir(parents=True)
    modes = ("L", "RGB", "P", "RGBA", "L")
    paths = [folder / name for name in ("a.png", "b.PNG", "deep/c.png", "deep/er/d.png", "deep/er/e.png")]
    for path, mode, image in zip(paths, modes, models[1].images, strict=False):
        Image.fromarray(image).convert("L").convert(mode).save(path)
    (folder / "deep/bad.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / ".hidden.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    return folder, paths


@pytest.mark.parametrize("name", deployment.FORMATS)
def test_predict_needs_no_more_than_it_says(commands, models, images, name):
    """Every image once, in batches of two, by classes and probabilities of the checkpoint's logits."""
    files, _, logits = models
    folder, paths = images
    arguments = (f"--model={files[name]}", folder, "--json", "--top=3", "--batch_size=2")
    result = commands.run("-c", WITHOUT, ",".join(MISSING[name]), *arguments, code=3)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in paths]
    expected = np.exp(np.float64(logits))
    expected /= expected.sum(-1, keepdims=True)
    for line, probabilities in zip(lines, expected, strict=True):
        order = np.argsort(-probabilities)[:3]
        assert [one["index"] for one in line["classes"]] == order.tolist()
        assert [one["name"] for one in line["classes"]] == [str(k) for k in order]
        found = [one["probability"] for one in line["classes"]]
        np.testing.assert_allclose(found, probabilities[order], atol=2e-6)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"{folder}/deep/bad.jpg cannot be decoded: it is not a PNG or JPEG image" in errors[0]
    assert "1 could not be used" in errors[1]


def run(capsys, *arguments):
    predict.command(["predict", *map(str, arguments)])
    return capsys.readouterr().out.splitlines()


def test_table(models, images, capsys, monkeypatch):
    files, _, logits = models
    _, paths = images
    lines = run(capsys, paths[0], f"--model={files['safetensors']}", paths[1], "--top", "2")
    best = 100 * np.exp(logits[0].max()) / np.exp(logits[0]).sum()
    assert lines[1].split()[:4] == [str(paths[0]), str(logits[0].argmax()), f"{best:.2f}", "%"]
    assert len(lines) == 3
    assert lines[2].startswith(str(paths[1]))
    with paths[0].open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        (line,) = run(capsys, f"--model={files['safetensors']}", "--json", "--top=20", "-")
    line = json.loads(line)
    assert (line["path"], len(line["classes"])) == ("-", 10)
    assert line["classes"][0]["name"] == str(logits[0].argmax())


def test_images_are_read_as_in_evaluation(tmp_path):
    card = {"class_names": ["a", "b"], "image_size": [20, 20], "crop": "resized"}
    model = deployment.Model(card, "onnx", run=None, device="cpu")
    Image.radial_gradient("L").resize((60, 31)).save(tmp_path / "x.png")
    encoded = (tmp_path / "x.png").read_bytes()
    np.testing.assert_array_equal(model.read_image(encoded), crops.centre(encoded, 20))
    model.card["crop"] = "pad"
    np.testing.assert_array_equal(model.read_image(encoded), crops.evaluation_image(encoded, "pad", 20))
    wide = deployment.Model(card | {"image_size": [31, 60]}, "onnx", run=None, device="cpu")
    assert wide.read_image(encoded).shape == (31, 60, 3)
    wide = deployment.Model(card | {"image_size": [30, 60]}, "onnx", run=None, device="cpu")
    with pytest.raises(ValueError, match="it has 60x31 pixels and this model takes 60x30"):
        wide.read_image(encoded)
    with pytest.raises(ValueError, match=r"images must be uint8 \[B, 20, 20, 3\], got float64 \[20, 20, 3\]"):
        model.logits(np.zeros((20, 20, 3)))


def test_refusals(models, images, tmp_path, capsys):
    model = models[0]["stablehlo"]
    with pytest.raises(ConfigError, match="--model is missing"):
        run(capsys, "x.png")
    with pytest.raises(ConfigError, match="no image is given"):
        run(capsys, f"--model={model}")
    with pytest.raises(CheckpointError, match="there is no file"):
        run(capsys, f"--model={tmp_path}/none", "x.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="2 could not be used"):
        run(capsys, f"--model={model}", tmp_path / "none.png", tmp_path / "empty")
    errors = capsys.readouterr().err.splitlines()
    assert any("none.png cannot be read: No such file" in line for line in errors)
    assert any("empty holds no image" in line for line in errors)


@pytest.mark.parametrize("name", ["numpy", "absl", "PIL"])
def test_what_every_model_needs_is_named(commands, name):
    result = commands.run("-c", WITHOUT, name, "--help", code=2)
    assert result.stderr == f"error: {name} is not installed: `pip install numpy pillow absl-py`.\n"


def test_a_missing_package_is_named(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for name in ("safetensors.numpy", "ffl_jax.deployment.safetensors"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="safetensors is not installed: `pip install jax flax safetensors`"):
        deployment.load(models[0]["safetensors"])
