"""Exported predictors, ready to run: `load(path).logits(images)`.

A file, or a folder of the format huggingface, holds one prediction of a training as a function from raw
images to logits, and a card, JSON that says what it is. Each format is one file here, which needs the
packages that `FORMATS` names and no others; of this project only what decodes images is loaded beside it.
`exporting` writes the files.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ffl_jax.data import crops, images, limits
from ffl_jax.errors import CheckpointError, ConfigError, DatasetError, FFLError, ResourceError
from ffl_jax.workdir import sealing

# What `pip install` must be given to read a file, beside numpy and pillow.
FORMATS = {
    "stablehlo": "jax flatbuffers",
    "safetensors": "jax flax safetensors",
    "onnx": "onnxruntime",
    "huggingface": "jax flax safetensors",
}
FOLDER = ("model.safetensors", "config.json", "README.md")  # what that of huggingface holds


class Model:
    """An exported predictor.

    Attributes:
      card: what it is, see docs/deploy.md.
      format: one of `FORMATS`.
      class_names: of the C classes, in the order of the logits.
      image_shape: (H, W, 3).
      device: what computes it, in words.
    """

    def __init__(self, card: dict, format: str, run: Callable | None, device: str):
        """Args: run: uint8 [B, H, W, 3] -> float32 [B, C]; None for one that reads images alone."""
        self.card, self.format, self.device = card, format, device
        self.class_names = tuple(card["class_names"])
        self.image_shape = (*card["image_size"], 3)
        self._run = run

    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] -> float32 [B, C]; RGB, not normalised. A new B may be compiled first."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images must be uint8 [B, {', '.join(map(str, self.image_shape))}], got {images.dtype} "
                f"{list(images.shape)}."
            )
        assert self._run
        return np.asarray(self._run(images))

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """As `logits`: the classes' probabilities, which add up to 1 over the last axis."""
        logits = self.logits(images)
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    def read_image(self, encoded: bytes) -> np.ndarray:
        """Decodes an image file of any size and brings it to the model's as evaluation does: uint8 [H, W, 3].

        Raises:
          Exception: it cannot be decoded; Pillow has a dozen types.
          ValueError: the model's images are not square, and this one has another size.
        """
        height, width, _ = self.image_shape
        square = height == width
        crop, white = self.card["crop"], self.card.get("max_value", limits.MAX_GREY)
        image = crops.evaluation_image(encoded, crop, height if square else 0, white)
        if image.shape != self.image_shape:
            raise ValueError(
                f"it has {image.shape[1]}x{image.shape[0]} pixels and this model takes {width}x{height}, "
                "which is no square: bring it to that size"
            )
        return image


def load(path: str | Path) -> Model:
    """The exported predictor in a file of any of `FORMATS`, which its content tells apart.

    Args:
      path: a StableHLO program, which JAX compiles for the device that it finds; weights by safetensors, or a
        folder in the layout of the Hugging Face hub, of which this project builds the network again; or an
        ONNX graph, which onnxruntime computes on the CPU. Whatever its program takes, `Model` takes the same.

    Raises:
      ConfigError: a package that the format needs is not installed.
      CheckpointError: the file is missing, or is not, to the bit, what was exported.
      ResourceError: it needs more memory than there is.
    """
    name, data, *beside = _contents(path)
    with needs(name, f"{path} is an export of the format {name}"):
        module = importlib.import_module(f"ffl_jax.deployment.{name}")
        try:
            sealing.check(data)
            card, run, device = module.read(data, *beside)
        except CheckpointError as error:
            raise CheckpointError(f"{path} cannot be used: {error}") from error
        except MemoryError as error:
            raise ResourceError(f"{path} needs more memory than there is: free some.") from error
        except (FFLError, ImportError):
            raise
        except Exception as error:  # every format has its own types
            reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
            raise CheckpointError(
                f"{path} cannot be read as an exported predictor: {reason}; export it again."
            ) from error
    return Model(card, name, run, device)


def _contents(path: str | Path) -> tuple:
    """(one of `FORMATS`, the bytes of the file; of a folder, those of two of its files)."""
    if os.path.isdir(path):
        weights, config = (os.path.join(path, name) for name in FOLDER[:2])
        if not os.path.exists(weights):
            raise CheckpointError(
                f"{path} is a folder, not a file, and has no model.safetensors: name what "
                "python -m ffl_jax.export wrote."
            )
        return "huggingface", _content(weights), _content(config)
    data = _content(path)
    # ONNX has no mark of its own: a message that begins with the number of its version.
    marks = {
        "stablehlo": data.startswith(b"PK"),
        "safetensors": data[8:9] == b"{",
        "onnx": data[:1] == b"\x08",
    }
    name = next((name for name, found in marks.items() if found), None)
    if name is None:
        raise CheckpointError(f"{path} is no exported predictor: name what python -m ffl_jax.export wrote.")
    return name, data


def _content(path: str | Path) -> bytes:
    try:
        return images.read_file(path, sealing.MAX_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no file {path}: name what python -m ffl_jax.export wrote."
        ) from error
    except PermissionError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; name what python -m ffl_jax.export wrote."
        ) from error
    except DatasetError as error:
        raise CheckpointError(f"{error}; name what python -m ffl_jax.export wrote.") from error
    except MemoryError as error:
        raise ResourceError(f"{path} needs more memory than there is: free some.") from error


def jax_device() -> str:
    """What JAX computes on, in words; raises ConfigError where it finds nothing."""
    import jax

    try:
        return jax.devices()[0].device_kind
    except Exception as error:  # a RuntimeError, or an AssertionError without a word
        reason = str(error) or "there is none of that kind"
        raise ConfigError(f"JAX finds no device: {reason}; set JAX_PLATFORMS to what is here.") from error


@contextlib.contextmanager
def needs(name: str, what: str) -> Iterator[None]:
    """Turns a package that is missing inside into a ConfigError that says how to install it.

    Args: name: of the format. what: is to be done, or is the matter.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ConfigError(
            f"{what}, and the package {package} is not installed: `pip install {FORMATS[name]}`."
        ) from error
