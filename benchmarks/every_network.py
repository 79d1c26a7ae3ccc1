"""Every network with every method: two training steps and an export each, and a table of what came out.

    python benchmarks/every_network.py --output=cells.jsonl [--methods=ffl,dml] [--networks=resnet8,vgg8]
    python benchmarks/every_network.py --output=cells.jsonl --table

A cell is what `method=M,network=N` stands for, with the fewest sub-networks from two on, on four images of
noise of 16 pixels, or of 32. After both steps all losses are finite and every trained network has moved. What
is shipped is written as StableHLO, read back, and computes the logits of the checkpoint within 1e-5 of the
largest one, or of 1. The file has one line for each cell; those that are there are not run again.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time

import jax
import numpy as np

from ffl_jax.deployment import exporting, load, predictor, stablehlo
from ffl_jax.errors import FFLError
from ffl_jax.measure import speed
from ffl_jax.methods import METHODS
from ffl_jax.models import NETWORKS
from ffl_jax.training import config as config_lib
from ffl_jax.training import scoring
from ffl_jax.training.defaults import get_config
from ffl_jax.training.experiment import Experiment, run_record

# As in tests/conftest.py: little is optimised, for compiling takes longer than running.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
CLASSES, IMAGES = 10, 4
SIDES = dict.fromkeys(("convnext_tiny", "vgg16_pool5", "vgg16_pool5_linear3"), 32)
SIDES |= dict.fromkeys(("vit_tiny_patch16", "vit_small_patch16", "vit_base_patch16"), 32)  # all others: 16
# One of each family, which every method runs on before others do.
FAMILIES = ("resnet8", "wrn16_1_unbiased", "densenet_bc40_12", "vgg8", "mobilenetv2_x0_5", "shufflenetv2")
FAMILIES += ("shufflenetv1", "vit_tiny_patch4", "convnext_tiny_patch2", "resnet18", "googlenet")


def configuration(method: str, network: str, side: int):
    """That of `method=METHOD,network=NETWORK`, small, for images of `side` pixels."""
    config = get_config(f"method={method},network={network},recipe=common")
    least, most = METHODS[method].num
    config.subnetworks.num = max(least, min(2, most or 2))
    config.subnetworks.execution = "vmap"  # half as long to compile
    if "teachers" in config:
        config.teachers.update({"network": network, "num": 1})
    config.update({"batch_size": IMAGES, "epochs": 300})
    config.optimizer.learning_rate = 0.001
    config.data.update({"name": "noise", "pad": 0, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    config.data.image_size, config.evaluation.batch_size = side, IMAGES
    config_lib.check(config)
    return config


def drawn(state):
    """A state like this one: weights at random, norms near the identity, all else 0; nothing is compiled."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        name = path[-1].key
        if name in ("scale", "var", "weights"):
            return rng.uniform(0.8, 1.2, x.shape).astype(x.dtype)
        scale = np.prod(x.shape[-min(4, x.ndim) : -1]) ** -0.5 if name == "kernel" else 0.02
        return rng.standard_normal(x.shape, x.dtype) * np.float32(scale)

    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.replace(rng=None))
    params, model_state = jax.tree_util.tree_map_with_path(leaf, (state.params, state.model_state))
    return zeros.replace(params=params, model_state=model_state, rng=jax.random.key(0))


def trained(config) -> scoring.Restored:
    """A checkpoint after two steps; raises AssertionError where a loss is not finite or a network stays."""
    experiment = Experiment(config, speed.noise(config, CLASSES, 2 * IMAGES))
    method, state = experiment.method, drawn(experiment.abstract_state())
    first, step = state.variables, jax.jit(experiment.train_step)
    images, labels = experiment.dataset.train.images, experiment.dataset.train.labels
    for number in range(2):
        part = slice(IMAGES * number, IMAGES * (number + 1))
        view = (images[part] / 255 - 0.5) / 0.25
        view = np.broadcast_to(view, experiment.abstract_batch()["image"].shape)  # once, or for each network
        state = step(state, {"image": view.astype(np.float32), "label": labels[part]})
    state = jax.device_get(state)
    assert int(state.record["finite_steps"]) == 2, "a loss was not finite"
    for name in method.subnetwork_names():
        before, after = (method.extract(tree, name)[1]["params"] for tree in (first, state.variables))
        moved = jax.tree.map(lambda x, y: bool((np.asarray(x) != np.asarray(y)).any()), before, after)
        share = np.mean(jax.tree.leaves(moved))
        assert share > 0.9, f"only {share:.0%} of the arrays of {name} moved"
    return scoring.Restored(experiment, 2, run_record(experiment), state)


def export_difference(restored: scoring.Restored) -> float:
    """The largest difference of a logit of the exported file, over the largest logit or 1."""
    card, variables = exporting.describe(restored)
    images = restored.experiment.dataset.test.images[:3]
    expected = exporting.reference(restored, card["predictor"], images)
    function, shapes = predictor.build(card)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.stablehlo")
        stablehlo.write(path, function, predictor.in_types_of(shapes, variables), card)
        found = load(str(path)).logits(images)
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def cell(method: str, network: str) -> dict:
    """What came out: `works`, or `refused` or `failed` with the reason."""
    start, outcome = time.monotonic(), {"method": method, "network": network}
    try:
        restored = trained(configuration(method, network, SIDES.get(network, 16)))
        difference = export_difference(restored)
        assert difference <= 1e-5, f"the exported logits differ by {difference:.1e}"
        outcome |= {"outcome": "works", "difference": difference}
    except FFLError as error:
        outcome |= {"outcome": "refused", "reason": str(error)}
    except Exception as error:
        outcome |= {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
    jax.clear_caches()
    return outcome | {"seconds": round(time.monotonic() - start, 1)}


def order(methods, networks) -> list[tuple[str, str]]:
    """All cells: each network with two methods, then one network of each family with all, then the rest."""
    cells = [(method, network) for network in networks for method in methods]
    first = ("ffl", "independent")
    return sorted(cells, key=lambda cell: 0 if cell[0] in first else 1 if cell[1] in FAMILIES else 2)


def read(path: pathlib.Path) -> dict:
    """{(method, network): the newest line}."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = map(json.loads, lines)
    return {(one["method"], one["network"]): one for one in cells}


def table(cells: dict, methods, networks) -> str:
    """Markdown: yes, a number of a reason below, or nothing where it was not run."""
    reasons: list[str] = []

    def shown(one):
        if one is None or one["outcome"] == "works":
            return "yes" if one else ""
        if one["reason"] not in reasons:
            reasons.append(one["reason"])
        return f"{one['outcome']} ({reasons.index(one['reason']) + 1})"

    lines = ["| network | " + " | ".join(f"`{method}`" for method in methods) + " |"]
    lines.append("| --- |" + " --- |" * len(methods))
    for network in networks:
        row = [shown(cells.get((method, network))) for method in methods]
        lines.append(f"| `{network}` | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"{n}. {reason}" for n, reason in enumerate(reasons, start=1))])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a line of JSON for each cell")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"  # not read yet
    methods, networks = arguments.methods.split(","), arguments.networks.split(",")
    done = read(arguments.output)
    for pair in () if arguments.table else order(methods, networks):
        if done.get(pair, {}).get("outcome") in (None, "failed"):
            done[pair] = cell(*pair)
            print(*done[pair].values(), flush=True)
            with arguments.output.open("a") as file:
                file.write(json.dumps(done[pair]) + "\n")
    print(table(done, methods, networks))


if __name__ == "__main__":
    main()
