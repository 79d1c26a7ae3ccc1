"""Exported files against the checkpoint in float64, what travels in them, and what is refused."""

import functools
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import zipfile

import conftest
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

import ffl_jax
from configs import digits
from ffl_jax import deployment
from ffl_jax import export as export_command
from ffl_jax.deployment import check, exporting, predictor, safetensors, stablehlo
from ffl_jax.deployment.folding import fold
from ffl_jax.errors import CheckpointError, ConfigError, DatasetError
from ffl_jax.methods import METHODS
from ffl_jax.training.experiment import remembered_dataset, run_record

# By hand: two ResNet-8 with a trunk of two stages and the fusion module without the heads; one ResNet-8.
TRUNK = 27 * 16 + 32 + 2 * (9 * 16 * 16 + 32) + 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32 + 3 * 64
BRANCH, HEAD = 9 * 32 * 64 + 9 * 64 * 64 + 32 * 64 + 3 * 128, 64 * 10 + 10
FUSION = 9 * 128 + 256 + 128 * 64 + 128 + HEAD
PARAMETERS = {"fused": TRUNK + 2 * BRANCH + FUSION, "sub_0": TRUNK + BRANCH + HEAD}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, experiment, state) of FFL with two ResNet-8, its variables random."""
    workdir = tmp_path_factory.mktemp("runs") / "ffl"
    return workdir, *conftest.write_run(workdir, digits.get_config())


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, cache):
    """For the processes that an export starts."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache / "jax"))


def require(name):
    if name == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")


def in_float64(method, variables, images, settings):
    """All predictions of a method, its images normalised by NumPy."""
    images = (np.float64(images) / 255 - np.array(settings.mean)) / np.array(settings.std)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda x: jnp.asarray(np.float64(x)), variables)
        apply = jax.jit(lambda variables, images: method.apply(variables, images, train=False))
        return jax.device_get(method.predictions(apply(variables, images)))


@pytest.mark.parametrize(
    ("name", "format"), [("fused", "stablehlo"), ("sub_0", "safetensors"), ("fused", "onnx")]
)
def test_export(run, tmp_path, name, format):
    """A new process has compared; here another number of images, and what the file holds."""
    require(format)
    workdir, experiment, state = run
    output = tmp_path / "new" / f"model.{format}"
    report = exporting.export(workdir, output, format, name)
    assert report.images == 64
    assert report.difference <= 1e-5 * report.scale
    assert set(report.milliseconds) == {1, 64}
    assert sorted(path.name for path in output.parent.iterdir()) == sorted(
        {f"model.{format}", *(["model.json"] if format == "safetensors" else [])}
    )

    model = deployment.load(output)
    assert (model.format, model.card) == (format, report.card)
    images = experiment.dataset.test.images[:7]
    variables = state.variables
    expected = in_float64(experiment.method, variables, images, experiment.config.data)[name]
    for count in (1, 7):
        np.testing.assert_allclose(
            model.logits(images[:count]), expected[:count], rtol=0, atol=1e-5 * np.abs(expected).max()
        )
    probabilities = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    np.testing.assert_allclose(model.probabilities(images), probabilities, atol=1e-5)

    card = model.card
    assert card["parameters"] == PARAMETERS[name]
    assert card["test"] == ({"top1": 0.5} if name == "sub_0" else None)
    assert (card["step"], card["epoch"], card["class_names"]) == (69, 3.0, list("0123456789"))
    # What norms count is a few percent; kernels and names are all else.
    assert 0.9 < report.bytes / (4 * PARAMETERS[name]) < 1.1
    if format == "safetensors":
        assert json.loads((output.parent / "model.json").read_text()) == card


def test_the_default_is_what_summary_calls_deploy(run):
    workdir, *_ = run
    restored = exporting.scoring.restore_checkpoint(workdir)
    card, _ = exporting.describe(restored)
    assert card["predictor"] == "sub_0"
    assert card["architecture"] == {"network": "resnet8", "num_classes": 10}


def test_a_program_is_for_all_platforms_and_numbers_of_images(run, tmp_path):
    function, variables = lambda weight, images: (images * weight).sum((1, 2)), np.float32([1, 2, 3])
    stablehlo.write(tmp_path / "x", function, variables, {"image_size": [2, 5], "input": "nhwc-uint8"})
    with zipfile.ZipFile(tmp_path / "x") as archive:
        program = jax.export.deserialize(bytearray(archive.read("program.bin")))
    assert set(program.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    assert str(program.in_avals[0]) == "uint8[batch,2,5,3]"
    assert str(program.out_avals[0]) == "float32[batch,3]"


@pytest.fixture
def in_this_process(monkeypatch):
    """The check of an export, which a new process makes otherwise."""

    def checked(command, **options):
        check.command(list(map(str, command[2:])))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(exporting.subprocess, "run", checked)
    monkeypatch.setattr(check, "_seconds", lambda *_: 0.0)


def test_a_file_that_computes_something_else_is_not_kept(run, tmp_path, monkeypatch, in_this_process):
    """Off by three times what is allowed, in one class; the file that was there before stays."""
    output = tmp_path / "model"
    output.write_text("old")
    write = safetensors.write
    monkeypatch.setattr(exporting, "reference", lambda *_: np.tile(np.float32([0, 7]), (64, 5)))

    def wrong(path, function, variables, card):
        head = {key: jnp.zeros_like(value) for key, value in variables["params"]["head"].items()}
        head["bias"] = head["bias"].at[1::2].set(7).at[3].add(wrong.error)
        write(path, function, {**variables, "params": {**variables["params"], "head": head}}, card)

    monkeypatch.setattr(safetensors, "write", wrong)
    wrong.error = 2.1e-4
    with pytest.raises(CheckpointError, match="other logits than the checkpoint, by up to"):
        exporting.export(run[0], output, "safetensors", "sub_0")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert output.read_text() == "old"
    wrong.error = 6e-5
    assert exporting.export(run[0], output, "safetensors", "sub_0").difference == pytest.approx(
        6e-5, rel=0.02
    )
    wrong.error = 0.08
    with pytest.raises(CheckpointError, match=r"0\.078 where 0\.07 is .* with --precision=float32"):
        exporting.export(run[0], output, "safetensors", "sub_0", precision="float16")
    assert deployment.load(output).card["predictor"] == "sub_0"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(workdir of a small network, its dataset, a folder of 8x8 images), experiment, state."""
    top = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(5)
    for split, name, k in itertools.product(("train", "test"), ("ant", "bee"), range(5)):
        (top / "data" / split / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(top / "data" / split / name / f"{k}.png")
    config = digits.get_config("method=dml,network=tiny,epochs=1")
    config.update(batch_size=10)
    config.data.update(name="folder", data_dir=str(top / "data"), cache_dir=str(top / "cache"))
    return top / "run", top / "data", *conftest.write_run(top / "run", config, step=1)


@pytest.fixture(scope="module")
def described(small):
    """(card, variables) of its ensemble, its logits of the test split in float64."""
    _, _, experiment, state = small
    images, settings = experiment.dataset.test.images, experiment.config.data
    expected = in_float64(experiment.method, state.variables, images, settings)["ensemble"]
    return *exporting.describe(exporting.scoring.restore_checkpoint(small[0]), "ensemble"), expected


@pytest.fixture
def gone(small):
    """The same, where the dataset has moved away for a while."""
    workdir, dataset, *_ = small
    dataset.rename(dataset.with_name("moved"))
    yield workdir, dataset.with_name("moved")
    dataset.with_name("moved").rename(dataset)


def test_a_dataset_that_is_gone(gone, small, tmp_path, caplog, in_this_process, capsys):
    """What the card needs is in the checkpoint; images are random, or those that are given."""
    workdir, moved = gone
    experiment, state = small[2:]
    output = tmp_path / "model"
    command = ["export", f"--workdir={workdir}", f"--output={output}", "--format=safetensors"]
    export_command.command(command)
    assert "64 random images, for want of the dataset" in capsys.readouterr().out
    assert f"{moved.with_name('data')} does not exist" in caplog.text
    assert "--data_dir=DIR says where it is now, --images=FOLDER gives others" in caplog.text
    model = deployment.load(output)
    card = model.card
    assert card["checked_on"] == "random images"
    assert (card["class_names"], card["image_size"]) == (["ant", "bee"], [8, 8])
    settings = experiment.config.data
    assert (card["mean"], card["std"]) == (list(settings.mean), list(settings.std))
    images = experiment.dataset.test.images
    expected = in_float64(experiment.method, state.variables, images, settings)["sub_0"]
    np.testing.assert_allclose(model.logits(images), expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    caplog.clear()
    Image.new("L", (30, 20), 7).save(tmp_path / "other.jpg")
    export_command.command([*command, f"--images={moved}/test/ant,{tmp_path}/other.jpg"])
    assert "on 6 images of --images" in capsys.readouterr().out
    assert deployment.load(output).card == card | {"checked_on": "given images"}
    export_command.command([*command, f"--data_dir={moved}"])
    assert "on 10 images of the test split" in capsys.readouterr().out
    assert deployment.load(output).card["checked_on"] == "test split"
    assert not caplog.text


def as_float(images):
    return np.float32(images.transpose(0, 3, 1, 2)) / np.float32(255)


@pytest.mark.parametrize(
    ("format", "input", "precision"),
    [
        ("onnx", "nchw-float", "float32"),
        ("onnx", "nchw-float", "float16"),
        ("stablehlo", "nchw-float", "float16"),
        ("safetensors", "nhwc-uint8", "float16"),
    ],
)
def test_inputs_and_precisions(small, described, tmp_path, format, input, precision):
    """The program as others call it; `load` takes the same images of all."""
    require(format)
    output, images = tmp_path / "model", small[2].dataset.test.images
    card, variables, expected = described
    card = card | {"input": input, "precision": precision}
    function, shapes = predictor.build(card)
    module = importlib.import_module(f"ffl_jax.deployment.{format}")
    module.write(output, function, predictor.in_types_of(shapes, variables), card)
    limit = {"float32": 1e-4, "float16": 2e-2}[precision] * np.abs(expected).max()
    model = deployment.load(output)
    assert (model.card["input"], model.card["precision"]) == (input, precision)
    np.testing.assert_allclose(model.logits(images), expected, rtol=0, atol=limit)
    if format == "stablehlo":
        with zipfile.ZipFile(output) as archive:
            program = jax.export.deserialize(bytearray(archive.read("program.bin")))
        assert str(program.in_avals[0]) == "float32[batch,3,8,8]"
        np.testing.assert_allclose(program.call(as_float(images)), expected, rtol=0, atol=limit)
        assert "xf16>" in program.mlir_module()
    elif format == "onnx":
        import onnx
        import onnxruntime

        (logits,) = onnxruntime.InferenceSession(output).run(None, {"images": as_float(images)})
        np.testing.assert_allclose(logits, expected, rtol=0, atol=limit)
        graph = onnx.load(output).graph
        assert not [node for node in graph.node if node.op_type == "Transpose"]
        kernels = {one.data_type for one in graph.initializer if one.name.endswith("kernel")}
        assert kernels == {onnx.TensorProto.FLOAT16 if precision == "float16" else onnx.TensorProto.FLOAT}
    else:
        weights = load_file(output)
        assert {str(x.dtype) for name, x in weights.items() if name.startswith("params/")} == {"float16"}
        assert {str(x.dtype) for name, x in weights.items() if name.startswith("batch_")} == {"float32"}


def test_choices_that_are_refused(small, tmp_path):
    export = functools.partial(exporting.export, small[0], tmp_path / "model")
    for options, words in (
        (
            {"format": "safetensors", "input": "nchw-float"},
            "holds weights alone: leave it out, or choose onnx",
        ),
        ({"input": "nchw"}, "--input must be one of nhwc-uint8, nchw-float"),
        ({"precision": "int8"}, "--precision must be one of float32, float16"),
        ({"opset": 18}, "--opset=18 is of ONNX: leave it out, or add --format=onnx"),
        ({"format": "onnx", "opset": 12}, "--opset=12 was not tried: choose one from 13 to 23"),
    ):
        with pytest.raises(ConfigError, match=words):
            export(**options)


def test_a_folder_for_the_hub(small, tmp_path, in_this_process, capsys):
    """Weights, configuration and a page whose front matter is YAML; a second export replaces all three."""
    workdir, _, experiment, state = small
    output = tmp_path / "new" / "model"
    command = ["export", f"--workdir={workdir}", f"--output={output}", "--format=huggingface"]
    for precision in ("float32", "float16"):
        export_command.command([*command, f"--precision={precision}"])
        assert sorted(path.name for path in output.iterdir()) == sorted(deployment.FOLDER)
        assert [path.name for path in output.parent.iterdir()] == ["model"]
    sizes = sum(path.stat().st_size for path in output.iterdir())
    assert f"file {sizes:,} bytes" in capsys.readouterr().out
    model = deployment.load(output)
    assert (model.format, model.card["precision"]) == ("huggingface", "float16")
    images = experiment.dataset.test.images
    expected = in_float64(experiment.method, state.variables, images, experiment.config.data)["sub_0"]
    np.testing.assert_allclose(model.logits(images), expected, rtol=0, atol=0.02 * np.abs(expected).max())
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {"0": "ant", "1": "bee"}
    assert config["ffl_jax"] == model.card
    _, front, page = (output / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["pipeline_tag"] == "image-classification"
    assert {"dml", "ffl_jax"} < set(about["tags"])
    (result,) = about["model-index"][0]["results"]
    assert result["task"] == {"type": "image-classification"}
    assert result["metrics"] == [{"type": "accuracy", "name": "top-1 accuracy", "value": 0.5}]
    assert "`license:`" in page

    (output / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds notes\.txt too, and would be replaced as a whole"):
        export_command.command(command)
    (output / "notes.txt").unlink()
    (tmp_path / "link").symlink_to(output)
    (tmp_path / "file").touch()
    for name in (tmp_path / "link", tmp_path / "file", ".", f"{output}/.."):
        with pytest.raises(ConfigError, match=f"{name} is no folder that could be replaced"):
            exporting.export(workdir, name, "huggingface")


def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """Or stays, where the new one cannot take its place."""
    old, new = tmp_path / "model", tmp_path / ".model.tmp"
    for path in (old, new):
        path.mkdir()
        (path / "x").write_text(path.name)
    rename = os.rename

    def full(here, there):
        if here == new:
            raise OSError("no")
        rename(here, there)

    monkeypatch.setattr(exporting.os, "rename", full)
    with pytest.raises(OSError, match="no"):
        exporting._replace(new, old)
    assert (old / "x").read_text() == "model"
    monkeypatch.setattr(exporting.os, "rename", rename)
    (tmp_path / ".model.old").mkdir()  # as a kill leaves it
    exporting._replace(new, old)
    assert (old / "x").read_text() == ".model.tmp"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_images_and_datasets_that_are_refused(gone, small, tmp_path, in_this_process):
    workdir, moved = gone
    export = functools.partial(exporting.export, workdir, tmp_path / "model", "safetensors")
    with pytest.raises(DatasetError, match="none does not exist"):
        export(data_dir=f"{moved}/none")
    with pytest.raises(DatasetError, match=r"--images: .*/none cannot be read: No such file"):
        export(images=[f"{tmp_path}/none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"--images: .*/empty holds no image: name what predict takes"):
        export(images=[f"{tmp_path}/empty"])
    with pytest.raises(ConfigError, match="leave out --data_dir, or --images"):
        export(images=[str(moved)], data_dir=str(moved))
    assert not (tmp_path / "model").exists()
    record = run_record(small[2])
    del record["dataset"]["class_names"]
    with pytest.raises(CheckpointError, match=r"/run/1 was written by an older .* lacks the class_names"):
        remembered_dataset(record, workdir / "1")


def test_a_dataset_that_has_changed(small, tmp_path, caplog, in_this_process):
    """It says so: what is compared are random images then."""
    workdir, dataset, *_ = small
    shutil.copy(dataset / "test/ant/0.png", dataset / "test/ant/new.png")
    try:
        report = exporting.export(workdir, tmp_path / "model", "safetensors")
        assert report.card["checked_on"] == "random images"
        assert "belongs to another run: dataset: fingerprint" in caplog.text
        with pytest.raises(CheckpointError, match="belongs to another run"):
            exporting.export(workdir, tmp_path / "other", "safetensors", data_dir=str(dataset))
        with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
            exporting.export(workdir, tmp_path / "other", "safetensors", step=5)
    finally:
        (dataset / "test/ant/new.png").unlink()


def test_refusals(run, tmp_path, monkeypatch, commands):
    workdir, *_ = run
    output = tmp_path / "model"
    with pytest.raises(ConfigError, match=r"ffl has no prediction 'fusd': did you mean fused\?"):
        exporting.export(workdir, output, name="fusd")
    with pytest.raises(ConfigError, match="is a folder"):
        exporting.export(workdir, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a pipe or a device, and would be replaced"):
        exporting.export(workdir, tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"end it in \.safetensors"):
        exporting.export(workdir, tmp_path / "card.json", "safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        exporting.export(workdir, output, step=5)
    (tmp_path / "seed_0" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds 1 seeds: choose one, such as --workdir=.*seed_0"):
        exporting.export(tmp_path, output)
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="run `pip install onnx onnxruntime`"):
        exporting.export(workdir, output, "onnx")
    assert not output.exists()
    result = commands.run("-m", "ffl_jax.export", f"--workdir={workdir}", code=2)
    assert "--output is missing" in result.stderr


def architecture(name, **settings):
    shares = METHODS[name].shares_trunk
    return {
        "method": {"name": name, **settings},
        "subnetworks": {"network": "tiny", "num": 3, "shared_stages": 1 if shares else 0},
        "num_classes": 10,
    }


def made(name, prediction, **settings):
    """(function, its random variables, images of 8x8) of one prediction of a method."""
    card = {"architecture": architecture(name, **settings), "predictor": prediction, "image_size": [8, 8]}
    card |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "input": "nhwc-uint8", "precision": "float32"}
    function, shapes = predictor.build({"modules": []} | card)
    images = np.random.default_rng(0).integers(256, size=(3, 8, 8, 3)).astype(np.uint8)
    return function, conftest._draw(shapes), images


def test_copies_that_are_not_used_stay_behind():
    """FFSD's fused classifier sees the students' maps, not the leader's: two of three copies, no head."""
    function, variables, images = made("ffsd", "fused")
    weights = predictor.weights(function, variables, (8, 8, 3))
    copies = {name[-3:] for name in weights if "/branches/" in name}
    assert copies == {"[0]", "[1]"}
    assert not [name for name in weights if "head" in name and "fusion/head" not in name]
    assert not [name for name in weights if "decoder" in name or "trans_fusion" in name]
    shapes = jax.eval_shape(lambda: variables)
    again, logits = predictor.variables(function, weights, shapes, (8, 8, 3))
    assert (logits.shape, logits.dtype) == ((1, 10), np.float32)
    compiled = jax.jit(function)
    assert np.array_equal(compiled(again, images), compiled(variables, images))
    bias = "params/fusion/head/bias"
    for damaged, text in (
        (weights | {"odd": np.zeros(1)}, "no place for odd"),
        ({name: array for name, array in weights.items() if name != bias}, f"lacks {bias}"),
        (weights | {bias: np.zeros(4, np.float32)}, rf"{bias} is float32 \[4\]"),
        (weights | {bias: np.zeros(10)}, rf"{bias} is float64 \[10\]"),
    ):
        with pytest.raises(CheckpointError, match=text):
            predictor.variables(function, damaged, shapes, (8, 8, 3))


def test_nothing_but_operations_on_maps_is_left():
    """Of ten operations on weights and one on images only the last is traced."""

    def function(variables, images):
        scale = jax.nn.relu(jnp.sqrt(variables["a"][1]) * 2) + variables["a"].sum()
        unused = images * variables["b"]
        return (images * scale, unused)[0]

    variables = {"a": jnp.array([1.0, 4.0]), "b": jnp.ones(3)}
    program = jax.make_jaxpr(fold(function, variables))(jnp.ones(3))
    assert [equation.primitive.name for equation in program.eqns] == ["mul"]
    np.testing.assert_allclose(fold(function, variables)(jnp.ones(3)), [9, 9, 9])


def test_calls_with_rules_of_their_own_are_dissolved():
    """A network of one's own may have derivatives and batches by its own rules; a file knows neither."""

    @jax.custom_batching.custom_vmap
    def doubled(x):
        return 2 * x

    doubled.def_vmap(lambda size, batched, x: (2 * x, *batched))

    @jax.custom_vjp
    def shifted(x, y):
        return doubled(x) + y

    shifted.defvjp(lambda x, y: (shifted(x, y), None), lambda _, gradient: (2 * gradient, gradient))
    folded = fold(lambda variables, x: shifted(x, variables["bias"]), {"bias": jnp.ones(3)})
    names = [one.primitive.name for one in jax.make_jaxpr(folded)(jnp.ones(3)).eqns]
    assert sorted(names) == ["add", "mul"]
    np.testing.assert_array_equal(folded(jnp.arange(3.0)), [1, 3, 5])


def run_onnx(function, images, **options):
    from ffl_jax.deployment.onnx_operations import convert

    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(convert(function, images.shape[1:], **options).SerializeToString())
    return session.run(["logits"], {"images": images})[0]


@pytest.mark.parametrize(
    ("name", "prediction"),
    [("one", "fused"), ("mfef", "fused"), ("dml", "probability_ensemble"), ("pcl", "ema_fused")],
)
def test_onnx_of_methods(name, prediction):
    """Attention, gates and means of probabilities, whose operations plain networks do not have."""
    pytest.importorskip("onnx")
    settings = {"early_fusion": True, "reconstruction": True} if name == "mfef" else {}
    function, variables, images = made(name, prediction, **settings)
    expected = np.asarray(jax.jit(function)(variables, images))
    for count in (1, 3):
        actual = run_onnx(fold(function, variables), images[:count])
        np.testing.assert_allclose(actual, expected[:count], atol=1e-5 * np.abs(expected).max())


def test_onnx_names_are_those_of_modules():
    """Of nodes, of what they give, and of weights; those of copies say which."""
    pytest.importorskip("onnx")
    from ffl_jax.deployment.onnx_operations import convert

    function, variables, _ = made("ffsd", "fused")
    model = convert(fold(function, variables), (8, 8, 3))
    nodes, shapes = model.graph.node, {one.name: list(one.dims) for one in model.graph.initializer}
    assert all(node.name in (node.output[0], node.output[0].removesuffix("_output_0")) for node in nodes)
    assert len({node.name for node in nodes}) == len(nodes)
    kernels = {
        name.removeprefix("params/").replace("/kernel", "")
        for name in predictor.weights(function, variables, (8, 8, 3))
        if "/kernel" in name
    }
    affine = [node for node in nodes if node.op_type in ("Conv", "Gemm")]
    assert {node.name.removesuffix(f"/{node.op_type}") for node in affine} == kernels
    assert any(name.endswith("_conv[1]") for name in kernels)
    for node in affine:
        module = node.name.removesuffix(node.op_type)
        assert list(node.input[1:]) == [f"{module}kernel", f"{module}bias"]
        assert shapes[f"{module}bias"] == shapes[f"{module}kernel"][:1]
    assert (model.producer_name, model.producer_version) == ("ffl_jax", ffl_jax.__version__)
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)


def test_int8_as_documented(small, tmp_path, monkeypatch, in_this_process):
    """The recipe of docs/deploy.md: quantised by channel, biases too, close to what it comes from."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    workdir, dataset, experiment, _ = small
    monkeypatch.chdir(tmp_path)
    options = ("--format=onnx", "--predictor=sub_0", "--opset=18", "--output=sub_0.onnx")
    export_command.command(["export", f"--workdir={workdir}", *options])
    assert onnx.load("sub_0.onnx").opset_import[0].version == 18
    for name in ("ant", "bee"):
        shutil.copytree(dataset / "test" / name, tmp_path / "more_photos" / name)
    blocks = re.findall(r"```python\n(.*?)```", (conftest.ROOT / "docs/deploy.md").read_text(), re.S)
    (recipe,) = (block for block in blocks if "quantize_static" in block)
    exec(recipe.replace("more_photos/*", "more_photos/*/*"), {})
    images = experiment.dataset.test.images
    (actual,) = runtime.InferenceSession("sub_0.int8.onnx").run(["logits"], {"images": images})
    expected = deployment.load("sub_0.onnx").logits(images)
    assert np.abs(actual - expected).max() < 0.1 * np.abs(expected).max()
    constants = onnx.load("sub_0.int8.onnx").graph.initializer
    for kind in ("kernel_scale", "bias_quantized_scale"):  # one for each output channel
        assert sorted(one.dims[0] for one in constants if one.name.endswith(kind)) == [2, 4, 8, 16], kind


def shuffle(x, groups):
    return x.reshape(*x.shape[:3], groups, -1).swapaxes(3, 4).reshape(x.shape)


KERNEL = np.random.default_rng(1).normal(size=(3, 3, 1, 6)).astype(np.float32)


def convolve(x, stride=1):
    return jax.lax.conv_general_dilated(
        x, KERNEL, (stride, 1), ((1, 0), (2, 1)), (1, 1), (1, 2), ("NHWC", "HWIO", "NHWC"), 3
    )


OPERATIONS = {
    "pools": lambda x: nn.max_pool(-x, (3, 3), (2, 2), ((1, 1), (1, 1))),
    "means": lambda x: nn.avg_pool(x, (3, 2), (2, 1), ((1, 1), (0, 1)), count_include_pad=True),
    "convolutions": lambda x: (convolve(x, 2) - 3) * np.arange(6) / 2 + 1,
    "used_twice": lambda x: (lambda y: (y + 1) * y)(convolve(x)),
    "relu6": lambda x: nn.relu6(convolve(x)),
    "shuffled": lambda x: shuffle(nn.relu(convolve(x)), 2),
    "split": lambda x: jnp.concatenate(jnp.split(convolve(x), 3, axis=-1)[::-1], axis=-1),
    "rows": lambda x: jax.lax.slice(convolve(x), (0, 1, 0, 2), (x.shape[0], 5, 3, 6), (1, 3, 2, 1)),
    "transposed": lambda x: convolve(x).sum(2).swapaxes(1, 2),
    "stacked": lambda x: jnp.stack([x * 2, x], axis=3)[:, :, :, 1],
    "over_channels": lambda x: convolve(x) * nn.sigmoid(convolve(x).max(-1, keepdims=True)),
    "pooled": lambda x: jnp.einsum("ph,bhwd->bpwd", np.float32([[1, 2, 0, 0, 0, 0], [0, 0, 3, 4, 5, 6]]), x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_onnx_of_operations(name):
    """Each against JAX, also where its input's channels come first, for a batch that is not known."""
    pytest.importorskip("onnx")
    from ffl_jax.deployment.onnx import OPSETS

    images = np.random.default_rng(2).integers(256, size=(2, 6, 4, 3)).astype(np.uint8)

    def function(variables, images):
        return OPERATIONS[name](images.astype(jnp.float32)).reshape(images.shape[0], -1)

    expected, folded = np.asarray(function(None, images)), fold(function, None)
    for opset in (OPSETS[0], 17, 18, OPSETS[-1]):  # axes move from attributes to inputs with 18
        actual = run_onnx(folded, images, opset=opset)
        np.testing.assert_allclose(actual, expected, atol=2e-6 * np.abs(expected).max(), err_msg=f"{opset}")


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (jnp.sort, "sort has"),
        (lambda x: jnp.take(x, jnp.array([0, 2]), axis=3), "gather is used in a way that has"),
        (
            lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 1, 1, 3), (1,) * 4, "VALID"),
            "sum is used",
        ),
        (lambda x: jax.lax.conv(x, np.ones((3, 4, 1, 1), np.float32), (1, 1), "SAME"), "dilated is used"),
    ],
)
def test_onnx_says_what_it_does_not_know(function, text):
    pytest.importorskip("onnx")
    flat = fold(lambda _, x: function(x.astype(jnp.float32)).reshape(x.shape[0], -1), None)
    with pytest.raises(ConfigError, match=f"{text} .*no translation here; export with --format=stablehlo"):
        run_onnx(flat, np.zeros((1, 4, 4, 3), np.uint8))
