"""A safetensors file of the weights with the card in its header, and the card in a .json file beside it.

The program is this project's: `predictor.build` makes it anew from the card.
"""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load, save

from ffl_jax.deployment import card as cards
from ffl_jax.deployment import jax_device, predictor
from ffl_jax.errors import CheckpointError, ConfigError
from ffl_jax.workdir import sealing

_MAX_HEADER = 2**25  # bytes


def write(path: Path, function, variables, card: dict, more: dict[str, str] | None = None):
    """Args: function, variables: of `predictor`. more: metadata."""
    weights = predictor.weights(function, variables, (*card["image_size"], 3))
    about = {"card": json.dumps(card), sealing.KEY: sealing.EMPTY, **(more or {})}
    sealing.write(path, save(weights, about))


def metadata(data: bytes) -> dict[str, str]:
    """Raises CheckpointError for a header that is too large."""
    size = int.from_bytes(data[:8], "little")
    if size > min(len(data) - 8, _MAX_HEADER):
        raise CheckpointError(
            f"its header has {size:,} bytes, more than there are or may be: export it again."
        )
    return json.loads(data[8 : 8 + size])["__metadata__"]


def read(data: bytes):
    """(card, function of images, the device that computes it)."""
    device, card = jax_device(), cards.parse(metadata(data)["card"])
    try:
        function, shapes = predictor.build(card)
    except ConfigError as error:
        raise CheckpointError(f"its card's architecture is not known here: {error}") from error
    weights = load(data)
    if infinite := sorted(name for name, array in weights.items() if not np.isfinite(array).all()):
        raise CheckpointError(f"{infinite[0]} is not finite: export it again.")
    variables, logits = predictor.variables(function, weights, shapes, (*card["image_size"], 3))
    cards.check_program(
        card, ("uint8", (None, *card["image_size"], 3)), (str(logits.dtype), (None, *logits.shape[1:]))
    )
    variables, run = jax.device_put(variables), jax.jit(function)
    return card, lambda images: run(variables, images), device
