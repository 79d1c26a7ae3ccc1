"""Writes a prediction of a checkpoint as a file, and has a new process show that it computes the same."""

import dataclasses
import importlib.util
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ffl_jax import __version__
from ffl_jax.data import StreamedSplit, augment, crops
from ffl_jax.deployment import FOLDER, Model, classify, onnx, predictor
from ffl_jax.deployment import card as cards
from ffl_jax.errors import CheckpointError, ConfigError, DatasetError
from ffl_jax.models import NETWORKS
from ffl_jax.registry import check_choice, nearest
from ffl_jax.training import config as config_lib
from ffl_jax.training import cost, scoring, steps
from ffl_jax.workdir import files, manifest

# Of the largest logit, or of 1 where all are smaller. float16 rounds weights and every map by up to 2^-11,
# which makes some times that after fifty layers, and more on devices that also add in float16.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2}
_REMEDY = {
    "float32": "export in another format, and report this",
    "float16": "its numbers are too large or too many for float16, export with --precision=float32",
}
_IMAGES = 64
_MODULES = {
    "stablehlo": ("flatbuffers",),
    "safetensors": ("safetensors",),
    "huggingface": ("safetensors",),
    "onnx": ("onnx", "onnxruntime"),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written, and what the new process found.

    Attributes:
      card: of the file.
      bytes: of the file, or of all in the folder.
      images: how many were compared, in one batch, and some of them alone; the card says which, `checked_on`.
      difference: the largest between a logit of the file and of the checkpoint.
      scale: the largest logit of the checkpoint, but at least 1.
      milliseconds: {batch size: median time of one call}.
      device: what computed them.
    """

    card: dict
    bytes: int
    images: int
    difference: float
    scale: float
    milliseconds: dict[int, float]
    device: str


def export(
    workdir: str | Path,
    output: str | Path,
    format: str = "stablehlo",
    name: str | None = None,
    step: int | None = None,
    data_dir: str | None = None,
    images: Sequence[str] = (),
    input: str = "nhwc-uint8",
    precision: str = "float32",
    opset: int | None = None,
) -> Report:
    """Writes one prediction of a checkpoint; `output` is the old file or the whole new one, never a part.

    Args:
      workdir, step, data_dir: see `scoring.restore_checkpoint`.
      output: the file, or the folder of huggingface; the folder around it is made. A safetensors file gets
        its card beside it, with the ending .json.
      format: one of `FORMATS`.
      name: of the prediction; None takes the method's headline.
      images: files and folders of images to compare on, without the dataset; of none the test split, or
        random images where the dataset is not what was trained on any more.
      input, precision: of `card.INPUTS` and `card.PRECISIONS`.
      opset: of ONNX, one of `onnx.OPSETS`; None takes the default.

    Raises:
      ConfigError: there is no such prediction, a package is missing, or `output` cannot be a file's name.
      CheckpointError: the file computes something else than the checkpoint, and is not kept; or see there.
      DatasetError: `data_dir` is given and the data is not there; one of `images` cannot be used.
    """
    output = Path(output)
    check_choice("format", format, _MODULES)
    _check(output, format)
    _check_choices(format, input, precision, opset)
    if images and data_dir is not None:
        raise ConfigError("--images takes the place of the dataset: leave out --data_dir, or --images.")
    restored, checked_on = _restored(Path(workdir), step, data_dir, images)
    card, variables = describe(restored, name)
    card |= {"input": input, "precision": precision, "checked_on": checked_on}
    compared = _images(restored.experiment, card, images)
    expected = reference(restored, card["predictor"], compared)
    module = importlib.import_module(f"ffl_jax.deployment.{format}")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    _remove(temporary)  # of an export that was killed
    try:
        function, shapes = predictor.build(card)
        options = {} if opset is None else {"opset": opset}
        module.write(temporary, function, predictor.in_types_of(shapes, variables), card, **options)
        report = _compare(temporary, card, compared, expected)
        for path in (*_files(temporary), temporary):
            manifest.fsync(path)
        _replace(temporary, output)
    finally:
        _remove(temporary)
    if format == "safetensors":
        files.write_json(output.with_suffix(".json"), card)
    return report


def _restored(workdir, step, data_dir, images) -> tuple[scoring.Restored, str]:
    """(a checkpoint, with its dataset where that is to be had; one of `cards.CHECKED_ON`)."""
    if images:
        return scoring.restore_checkpoint(workdir, step, with_data=False), "given images"
    try:
        return scoring.restore_checkpoint(workdir, step, data_dir), "test split"
    except (DatasetError, CheckpointError) as error:
        if data_dir is not None:
            raise
        restored = scoring.restore_checkpoint(workdir, step, with_data=False)  # or it is the checkpoint
        logging.warning(
            "The dataset cannot be used: %s Random images take its place; --data_dir=DIR says where it is "
            "now, --images=FOLDER gives others.",
            error,
        )
        return restored, "random images"


def _check(output, format):
    missing = [name for name in _MODULES[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format={format} needs what is not installed here: run `pip install {' '.join(missing)}`."
        )
    if format == "huggingface":
        _check_folder(output)
    elif output.is_dir():
        raise ConfigError(f"--output={output} is a folder: give the name of a file.")
    elif output.exists() and not output.is_file():
        raise ConfigError(
            f"--output={output} is a pipe or a device, and would be replaced: give a file's name."
        )
    if format == "safetensors" and output.suffix == ".json":
        raise ConfigError(f"--output={output}: the card goes into that file; end it in .safetensors.")


def _check_folder(output):
    if output.is_symlink() or output.name in ("", "..") or (output.exists() and not output.is_dir()):
        raise ConfigError(
            f"--output={output} is no folder that could be replaced: give the name of a new one."
        )
    held = {path.name for path in output.iterdir()} if output.exists() else set()
    others = sorted(held - set(FOLDER))
    if others:
        raise ConfigError(
            f"--output={output} holds {', '.join(others[:3])} too, and would be replaced as a whole: give "
            "the name of a new one."
        )


def _files(path: Path) -> list[Path]:
    """It, or what is in it."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _remove(path: Path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _replace(new: Path, old: Path):
    """Puts a file or a folder where another of its kind may be."""
    if not old.is_dir():
        os.replace(new, old)
        return
    aside = old.with_name(f".{old.name}.old")  # a folder that is not empty cannot be replaced in one step
    _remove(aside)
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    _remove(aside)


def _check_choices(format, input, precision, opset):
    check_choice("--input", input, cards.INPUTS)
    check_choice("--precision", precision, cards.PRECISIONS)
    if input != "nhwc-uint8" and format in ("safetensors", "huggingface"):
        raise ConfigError(
            f"--input={input} says what a program takes, and --format={format} holds weights alone: leave it "
            "out, or choose onnx or stablehlo."
        )
    if opset is not None and format != "onnx":
        raise ConfigError(f"--opset={opset} is of ONNX: leave it out, or add --format=onnx.")
    if opset is not None and opset not in onnx.OPSETS:
        raise ConfigError(
            f"--opset={opset} was not tried: choose one from {onnx.OPSETS[0]} to {onnx.OPSETS[-1]}."
        )


def describe(restored: scoring.Restored, name: str | None = None) -> tuple[dict, dict]:
    """(card of one prediction, the variables that `predictor.build` of it takes).

    Raises:
      ConfigError: the method has no such prediction.
    """
    experiment, config, dataset = restored.experiment, restored.experiment.config, restored.experiment.dataset
    method, num_classes = experiment.method, len(dataset.class_names)
    variables = restored.state.variables
    costs = cost.prediction_costs(method, variables, experiment.image_shape)
    name = name or method.headline
    if name not in costs:
        raise ConfigError(f"{config.method.name} has no prediction {name!r}: {nearest(name, costs)}")
    sections = config_lib.to_json(config)
    if name in method.network_names():
        network, variables = method.extract(variables, name)
        known = dict.fromkeys(config_lib.network_names(config))
        networks = [one for one in known if NETWORKS.lookup(one)(num_classes) == network]
        architecture = {"network": networks[0], "num_classes": num_classes}
    else:
        networks = config_lib.network_names(config)
        architecture = {
            key: sections[key] for key in ("method", "subnetworks", "teachers") if key in sections
        }
        architecture["num_classes"] = num_classes
        if config.ema_decay:  # which versions before did not know
            architecture["ema_decay"] = config.ema_decay
    scores = None
    if restored.run["evaluated_step"] == restored.step:
        scores = restored.run["scores"].get("test", {}).get("predictions", {}).get(name)
    card = {
        "card_version": cards.VERSION,
        "ffl_jax": __version__,
        "modules": list(config.modules),
        "predictor": name,
        "method": config.method.name,
        "networks": networks,
        "dataset": config_lib.dataset_title(config),
        "class_names": list(dataset.class_names),
        "image_size": list(experiment.image_shape[:2]),
        "channels": "RGB",
        "crop": config.data.crop,
        "max_value": config.data.max_value,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        **costs[name],
        "step": restored.step,
        "epoch": restored.step / experiment.steps_per_epoch,
        "seed": config.seed,
        # JSON has no other numbers.
        "test": scores and {key: x if math.isfinite(x) else None for key, x in scores.items()},
        "input": "nhwc-uint8",
        "precision": "float32",
        "checked_on": "test split",
        "architecture": architecture,
    }
    return card, variables


def reference(restored: scoring.Restored, name: str, images: np.ndarray) -> np.ndarray:
    """A checkpoint's own logits [B, C] of images uint8 [B, H, W, 3], by the whole method as in evaluation."""
    experiment = restored.experiment

    @jax.jit
    def logits(variables, images):
        # Some accelerators would round the factors of a product.
        with jax.default_matmul_precision("float32"):
            images = augment.normalize(images, experiment.config.data.mean, experiment.config.data.std)
            outputs = steps.apply(experiment.method, variables, images, train=False)
            return experiment.method.predictions(outputs)[name]

    return np.asarray(logits(restored.state.variables, images))


def _images(experiment, card, arguments) -> np.ndarray:
    """Some images to compare on, uint8 [B, H, W, 3], as the card's `checked_on` says."""
    if arguments:
        return _given_images(card, arguments)
    if card["checked_on"] == "random images":
        rng = np.random.default_rng(0)
        return rng.integers(256, size=(_IMAGES, *experiment.image_shape), dtype=np.uint8)
    split = experiment.dataset.test
    chosen = _spread(len(split))
    if not isinstance(split, StreamedSplit):
        return split.images[chosen]
    crop = experiment.config.data.crop
    records = split.records.read(split.positions[chosen])
    size, white = split.image_size, split.max_value
    return np.stack([crops.evaluation_image(encoded, crop, size, white) for _, encoded, _ in records])


def _given_images(card, arguments) -> np.ndarray:
    def refuse(message):
        raise DatasetError(f"--images: {message.rstrip('.')}: name what predict takes.")

    model, paths = Model(card, "", run=None, device=""), list(classify.find(arguments, refuse))
    read = [classify.read(model, paths[k], refuse) for k in _spread(len(paths))]
    return np.stack([image for image in read if image is not None])  # `refuse` raises: none is


def _spread(count: int) -> np.ndarray:
    """Some of so many positions, from all of them: files are sorted by class."""
    return np.linspace(0, count - 1, min(_IMAGES, count)).astype(int)


def _compare(path, card, images, expected) -> Report:
    """Raises CheckpointError unless a new process that reads the file computes what is expected."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = os.path.join(folder, "images.npy"), os.path.join(folder, "logits.npz")
        np.save(given, images)
        package = str(Path(__file__).resolve().parent.parent.parent)
        path_before = filter(None, [package, os.environ.get("PYTHONPATH")])
        process = subprocess.run(
            [sys.executable, "-m", "ffl_jax.deployment.check", path, given, found],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path_before)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
            reason = lines[-1].removeprefix("error: ")
            raise CheckpointError(f"the exported file cannot be used, and is not kept: {reason}")
        with np.load(found) as results:
            batch, alone, times = results["batch"], results["alone"], json.loads(str(results["times"]))
    both = np.concatenate([batch - expected, alone - expected[: len(alone)]])
    difference, scale = float(np.abs(both).max()), max(1.0, float(np.abs(expected).max()))
    allowed = TOLERANCE[card["precision"]] * scale
    if not difference <= allowed:  # NaN is not either
        raise CheckpointError(
            f"the exported file computes other logits than the checkpoint, by up to {difference:.2g} where "
            f"{allowed:.2g} is allowed, and is not kept: {_REMEDY[card['precision']]}."
        )
    milliseconds = {int(size): time for size, time in times["milliseconds"].items()}
    size = sum(one.stat().st_size for one in _files(path))
    return Report(card, size, len(images), difference, scale, milliseconds, times["device"])
