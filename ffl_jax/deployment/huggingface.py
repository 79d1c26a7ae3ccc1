"""A folder as the Hugging Face hub has it: `model.safetensors`, `config.json`, and the card, `README.md`.

The first is a file of the format safetensors, whose header also has the SHA-256 of what is in the second. The
third is for people, who may write it anew.
"""

import hashlib
import json
from pathlib import Path

from ffl_jax.deployment import FOLDER, safetensors
from ffl_jax.errors import CheckpointError

WEIGHTS, CONFIG, README = FOLDER
_KEY = "config"  # of the metadata
# {score of a run: (type and name of the hub's metric)}
_METRICS = {
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("accuracy", "top-5 accuracy"),
    "nll": ("nll", "negative log-likelihood, nats"),
    "ece": ("ece", "expected calibration error"),
}


def write(folder: Path, function, variables, card: dict):
    """Args: folder: a new one. function, variables: of `predictor`."""
    folder.mkdir()
    names = dict(enumerate(card["class_names"]))
    config = {
        "model_type": "ffl_jax",
        "architectures": card["networks"],
        "image_size": card["image_size"],
        "num_channels": 3,
        "num_labels": len(names),
        "id2label": {str(index): name for index, name in names.items()},
        "label2id": {name: index for index, name in names.items()},
        "ffl_jax": card,
    }
    safetensors.write(folder / WEIGHTS, function, variables, card, {_KEY: _digest(config)})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / README).write_text(_readme(card))


def read(data: bytes, config: bytes):
    """(card, function of images, the device that computes it). Args: the content of the first two files."""
    card, run, device = safetensors.read(data)
    try:
        same = safetensors.metadata(data).get(_KEY) == _digest(json.loads(config))
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise CheckpointError(f"its {CONFIG} is not what was exported: export it again.")
    return card, run, device


def _digest(config) -> str:
    """Of the values, not of how they are laid out: line ends change on their way through git."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _readme(card) -> str:
    import yaml

    title, scores = f"{card['predictor']} of {card['method']}", (card["test"] or {}).items()
    metrics = [(*_METRICS.get(key, (key, key)), value) for key, value in scores if value is not None]
    about = {
        "library_name": "ffl_jax",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "ffl_jax", card["method"]],
    }
    if metrics:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": card["dataset"], "type": card["dataset"], "split": "test"},
            "metrics": [{"type": kind, "name": name, "value": value} for kind, name, value in metrics],
        }
        about["model-index"] = [{"name": title, "results": [result]}]
    rows = "".join(f"| {name} | {value:.4f} |\n" for _, name, value in metrics)
    table = f"\n| on the test split | |\n| --- | --- |\n{rows}" if metrics else ""
    height, width = card["image_size"]
    own = f" `load` imports the trainer's own {', '.join(card['modules'])} first." if card["modules"] else ""
    return f"""---
{yaml.safe_dump(about, sort_keys=False)}---

# {title}

An image classifier of {len(card["class_names"])} classes, by ffl_jax {card["ffl_jax"]}:
{" + ".join(card["networks"])}, {card["parameters"]:,} parameters, {card["flops"] or 0:,} FLOPs an image,
trained on {json.dumps(card["dataset"])} with {card["method"]}, seed {card["seed"]}, to step {card["step"]}.
Names of the classes and all else are in `{CONFIG}`.
{table}
It takes RGB images of {width}x{height} pixels; `read_image` brings others to that size.{own}

```python
from ffl_jax.deployment import load

model = load("path of this folder")  # or python -m ffl_jax.predict --model=FOLDER IMAGE
image = model.read_image(open("photo.jpg", "rb").read())
print(dict(zip(model.class_names, model.probabilities(image[None])[0])))
```

No licence of these weights is known here: it depends on the images that they learned from. State one as
`license:` above. This page may be edited; `{WEIGHTS}` and `{CONFIG}` are refused when they have changed.
"""
