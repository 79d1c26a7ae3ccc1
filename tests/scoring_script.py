"""Run by scoring_test.py with 4 devices: scores splits of several sizes on some of them."""

import json
import sys

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ffl_jax import methods
from ffl_jax.data import Split
from ffl_jax.devices import parallel
from ffl_jax.models import NetworkOutputs
from ffl_jax.training import steps
from ffl_jax.training.scoring import Evaluator

SIZES = (1, 8, 9, 33)
DEVICES = (1, 4)  # of 4, a batch of 8 has two images for each, and a split of one image leaves three idle


class Linear(nn.Module):
    """Two linear classifiers in place of sub-networks: programs that compile in no time."""

    num: int = 2

    @nn.compact
    def __call__(self, images, train):
        flat = images.reshape(len(images), -1)
        logits = [nn.Dense(4, name=f"head_{k}")(flat) for k in range(self.num)]
        self.sow("intermediates", "feature_maps", [images] * self.num)
        return [NetworkOutputs(z, flat, (images,)) for z in logits]


class Plain(methods.Method):
    """No training: only what evaluation asks of a method."""

    def __call__(self, images, train):
        return {"logits": jnp.stack([peer.logits for peer in self.subnetworks(images, train)])}


def main(path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(33, 2, 2, 3)).astype(np.uint8), rng.integers(4, size=33)
    config = ConfigDict(
        {
            "precision": "float32",
            "num_seeds": 1,
            "evaluation": {"batch_size": 8},
            "data": {"mean": (0.5,) * 3, "std": (0.25,) * 3},
        }
    )
    method = Plain(Linear(), num_classes=4)
    kernels = rng.normal(size=(2, 12, 4)).astype(np.float32)
    params = {
        "subnetworks": {
            f"head_{k}": {"kernel": kernels[k], "bias": np.zeros(4, np.float32)} for k in range(2)
        }
    }
    results = {}
    for devices in DEVICES:
        runner = parallel.Parallel("pmap", devices)
        zero = np.zeros((), np.int32)
        state = runner.place(steps.TrainState(zero, params, {}, {}, zero, {}))
        for size in SIZES:
            split = Split(images[:size], labels[:size].astype(np.int32))
            results[f"{devices} {size}"] = Evaluator(method, split, config, runner)(state)[0]
    with open(path, "w") as file:
        json.dump(
            {
                "images": images.tolist(),
                "labels": labels.tolist(),
                "kernels": kernels.tolist(),
                "scores": results,
            },
            file,
        )


if __name__ == "__main__":
    main(sys.argv[1])
