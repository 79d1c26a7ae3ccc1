"""A safetensors file of the weights with the card in its header, and the card in a .json file beside it.

The program is this project's: `predictor.build` makes it anew from the card.
"""

import json
from pathlib import Path

import jax
from safetensors import safe_open
from safetensors.numpy import save

from ffl_jax.deployment import predictor


def write(path: Path, function, variables, card: dict):
    """Args: function, variables: of `predictor`."""
    weights = predictor.weights(function, variables, (*card["image_size"], 3))
    path.write_bytes(save(weights, {"card": json.dumps(card)}))


def read(path: Path):
    """(card, function of images, the device that computes it)."""
    with safe_open(path, "numpy") as file:
        card = json.loads((file.metadata() or {})["card"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    function, shapes = predictor.build(card)
    variables, run = jax.device_put(predictor.variables(weights, shapes)), jax.jit(function)
    return card, lambda images: run(variables, images), jax.devices()[0].device_kind
