"""An ONNX file of the default operator set, the card among its metadata."""

import json
import os
from pathlib import Path


def write(path: Path, function, variables, card: dict):
    """Args: function, variables: of `predictor`."""
    import onnx

    from ffl_jax.deployment.folding import fold
    from ffl_jax.deployment.onnx_operations import convert

    model = convert(fold(function, variables), (*card["image_size"], 3))
    onnx.helper.set_model_props(model, {"card": json.dumps(card)})
    onnx.save_model(model, path)


def read(path: Path):
    """(card, function of images, the device that computes it)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    card = json.loads(session.get_modelmeta().custom_metadata_map["card"])
    return card, lambda images: session.run(["logits"], {"images": images})[0], "cpu"
