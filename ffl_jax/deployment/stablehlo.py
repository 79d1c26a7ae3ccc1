"""One zip file: `program.bin`, serialized by `jax.export`, and `card.json`."""

import json
import zipfile
from pathlib import Path

import jax
import numpy as np

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def write(path: Path, function, variables, card: dict):
    """Args: function, variables: of `predictor`."""
    from ffl_jax.deployment.folding import fold

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *card["image_size"], 3), np.uint8)
    program = jax.export.export(jax.jit(fold(function, variables)), platforms=PLATFORMS)(images)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("card.json", json.dumps(card, indent=2))
        archive.writestr("program.bin", program.serialize())


def read(path: Path):
    """(card, function of images, the device that computes it)."""
    with zipfile.ZipFile(path) as archive:
        card, program = json.loads(archive.read("card.json")), archive.read("program.bin")
    run = jax.jit(jax.export.deserialize(bytearray(program)).call)
    return card, run, jax.devices()[0].device_kind
