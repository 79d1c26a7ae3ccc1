"""One zip file: `program.bin`, serialized by `jax.export`, and `card.json`; the seal is the zip's comment."""

import io
import json
import zipfile
from pathlib import Path

import jax

from ffl_jax.deployment import card as cards
from ffl_jax.deployment import jax_device
from ffl_jax.errors import CheckpointError
from ffl_jax.workdir import sealing

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def write(path: Path, function, variables, card: dict):
    """Args: function, variables: of `predictor`."""
    from ffl_jax.deployment.folding import fold

    (batch,) = jax.export.symbolic_shape("batch")
    dtype, shape = cards.input_of(card)
    images = jax.ShapeDtypeStruct((batch, *shape), dtype)
    program = jax.export.export(jax.jit(fold(function, variables)), platforms=PLATFORMS)(images)
    content = io.BytesIO()
    # Not packed: what is read then takes no more memory than the file does.
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("card.json", json.dumps(card, indent=2))
        archive.writestr("program.bin", program.serialize())
        archive.comment = sealing.EMPTY.encode()
    sealing.write(path, content.getvalue())


def read(data: bytes):
    """(card, function of images, the device that computes it)."""
    device = jax_device()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError("it is packed, and what export writes is not: export it again.")
        card = cards.parse(archive.read("card.json"))
        program = jax.export.deserialize(bytearray(archive.read("program.bin")))
    (images,), (logits,) = program.in_avals, program.out_avals
    cards.check_program(card, *((str(one.dtype), one.shape) for one in (images, logits)))
    run = jax.jit(program.call)
    return card, lambda images: run(cards.as_input(card, images)), device
