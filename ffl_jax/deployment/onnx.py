"""An ONNX file, the card and the seal among its metadata."""

import json
import os
from pathlib import Path

from ffl_jax.deployment import card as cards
from ffl_jax.errors import CheckpointError
from ffl_jax.workdir import sealing

OPSETS = range(13, 24)  # that were tried
_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}


def write(path: Path, function, variables, card: dict, opset: int = 17):
    """Args: function, variables: of `predictor`. opset: one of `OPSETS`."""
    import onnx

    from ffl_jax.deployment.folding import fold
    from ffl_jax.deployment.onnx_operations import convert

    dtype, shape = cards.input_of(card)
    model = convert(fold(function, variables), shape, dtype, opset)
    onnx.helper.set_model_props(model, {"card": json.dumps(card), sealing.KEY: sealing.EMPTY})
    sealing.write(path, model.SerializeToString())


def read(data: bytes):
    """(card, function of images, the device that computes it)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised, and that is enough
    # Weights in files of their own are none of ours: there is no such folder.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    card = cards.parse(session.get_modelmeta().custom_metadata_map["card"])
    images, logits = session.get_inputs(), session.get_outputs()
    names = [one.name for one in (*images, *logits)]
    if names != ["images", "logits"]:
        raise CheckpointError(f"its input and output are {names}, not images and logits: export it again.")
    cards.check_program(card, *((_TYPES.get(one.type, one.type), one.shape) for one in (*images, *logits)))

    def run(images):
        return session.run(["logits"], {"images": cards.as_input(card, images)})[0]

    return card, run, "cpu"
