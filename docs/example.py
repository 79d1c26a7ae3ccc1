"""A worked example: train FFL, see what its two networks disagree on early and late, ship one of them.

    python docs/example.py --output=runs/example

Takes a minute or two on two CPU cores; docs/example.md tells what comes out.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone

import ffl_jax
from configs import digits
from ffl_jax.data import augment
from ffl_jax.training import scoring, steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/example"), help="folder for all that is made"
    )
    parser.add_argument("--network", default="resnet8")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    # 1. Train, and keep the checkpoint of every epoch.
    config = digits.get_config(f"method=ffl,network={options.network},epochs={options.epochs}")
    config.checkpoint.keep = options.epochs
    config.evaluation.every_epochs = 1
    workdir = options.output / "run"
    summary = ffl_jax.train(config, workdir)

    # 2. What does each network say to the test images, after the first epoch and after the last?
    last = scoring.restore_checkpoint(workdir)
    first = scoring.restore_checkpoint(workdir, step=last.step // options.epochs)
    test = last.experiment.dataset.test
    stages = {
        f"after epoch {run.step * options.epochs // last.step}": predict(run, test.images)
        for run in (first, last)
    }
    for title, logits in stages.items():
        classes = {name: one.argmax(-1) for name, one in logits.items()}
        differ = classes["sub_0"] != classes["sub_1"]
        right = {name: 100 * (one == test.labels).mean() for name, one in classes.items()}
        print(f"\n{title}: the networks disagree on {differ.sum()} of {len(differ)} images")
        print("right, %:      " + ", ".join(f"{name} {value:.2f}" for name, value in right.items()))
        if differ.any():
            right = {name: 100 * (one == test.labels)[differ].mean() for name, one in classes.items()}
            print("on these alone: " + ", ".join(f"{name} {value:.0f}" for name, value in right.items()))
    draw(options.output / "disagreements.png", test, stages)

    # 3. Ship one network, and use the file as another program would.
    path = options.output / "sub_0.stablehlo"
    report = ffl_jax.export_checkpoint(workdir, path, name="sub_0")
    model = ffl_jax.load(path)
    top1 = (model.logits(test.images).argmax(-1) == test.labels).mean()
    print(
        f"\n{path}: {report.bytes:,} bytes, {model.card['parameters']:,} parameters, top-1 {100 * top1:.2f} %"
    )
    print(f"the run's own summary says {100 * summary['predictors']['sub_0']['top1']:.2f} %")


def predict(restored: scoring.Restored, images: np.ndarray) -> dict[str, np.ndarray]:
    """{prediction: logits [N, C]} of a checkpoint for raw images uint8 [N, H, W, 3]."""
    experiment, state = restored.experiment, restored.state
    settings = experiment.config.data

    @jax.jit
    def logits(variables, images):
        images = augment.normalize(images, settings.mean, settings.std)
        return experiment.method.predictions(steps.apply(experiment.method, variables, images, train=False))

    return jax.device_get(logits({"params": state.params, **state.model_state}, images))


def draw(path: Path, test, stages: dict[str, dict[str, np.ndarray]], columns: int = 8):
    """The images on which the networks disagree, the most opposed first, with what each says."""
    figure = Figure(figsize=(1.35 * columns, 4.6), layout="constrained")
    rows = figure.subfigures(len(stages), 1)
    for row, (title, logits) in zip(rows, stages.items(), strict=True):
        classes = {name: one.argmax(-1) for name, one in logits.items()}
        differ = np.flatnonzero(classes["sub_0"] != classes["sub_1"])
        p, q = (np.exp(jax.nn.log_softmax(logits[name][differ])) for name in ("sub_0", "sub_1"))
        opposed = (p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1)
        row.suptitle(f"{title}: {len(differ)} of {len(test)} test images", fontsize=11)
        for axes, index in zip(row.subplots(1, columns), differ[np.argsort(-opposed)], strict=False):
            axes.imshow(test.images[index])
            said = "  ".join(str(classes[name][index]) for name in ("sub_0", "sub_1", "fused"))
            axes.set_title(f"is {test.labels[index]}\n{said}", fontsize=9)
        for axes in row.axes:
            axes.axis("off")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
