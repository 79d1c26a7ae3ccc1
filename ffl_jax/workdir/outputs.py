"""The files of a run that people and scripts read: metrics.jsonl, TensorBoard events, curves.png, JSON."""

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np
import tensorboardX
from absl import logging

from ffl_jax.errors import ConfigError


def write_json(path: Path, values: dict):
    """Writes `values` so that a reader sees the old file or the new one, never a part."""
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes):
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """What `write_json` wrote; {} if the file is missing or not ours."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class MetricsLog:
    """Appends lines to `metrics.jsonl`, and shows them in TensorBoard and, where that is wanted, in W&B.

    The file holds no times and no speeds: an interrupted run leaves the same bytes as one that was not.
    """

    def __init__(self, workdir: Path, size: int, step: int, wandb_run=None):
        """Continues after `size` bytes of the file, which held all up to `step`; cuts off what follows.

        Args: wandb_run: of `start_wandb`, or None.
        """
        self._wandb = wandb_run
        self._file = open(workdir / "metrics.jsonl", "ab")  # noqa: SIM115, held open for the run
        if self._file.tell() < size:
            logging.warning("%s has lost lines: it continues at step %d.", self._file.name, step)
        else:
            self._file.truncate(size)
        self._events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1 if step else None, write_to_disk=True
        )

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._file.seek(0, os.SEEK_END)

    def write(self, step: int, epoch: float, split: str, scalars: dict[str, float]):
        """Adds one line."""
        line = {"step": step, "epoch": epoch, "split": split, **scalars}
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        self._show(step, {f"{split}/{name}": value for name, value in scalars.items()})

    def write_speed(self, step: int, images_per_second: float):
        """Not to the file."""
        self._show(step, {"train/images_per_second": images_per_second})

    def _show(self, step, scalars):
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def write_images(self, step: int, name: str, images: np.ndarray):
        """A grid of uint8 images [B, H, W, 3], to TensorBoard alone."""
        self._events.add_images(name, images, step, dataformats="NHWC")

    def write_histograms(self, step: int, tree: dict):
        """The values of each array, named by its path, to TensorBoard alone."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            self._events.add_histogram(name, np.asarray(leaf), step)

    def sync(self):
        """Returns once all lines are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self):
        self._file.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()


def start_wandb(project: str, workdir: Path, config: dict):
    """The run of a workdir in a project of Weights & Biases, the same one at every start.

    Raises:
      ConfigError: the package is missing, or nobody is logged in.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("config.wandb needs a package: pip install wandb, or leave it empty.") from error
    try:
        return wandb.init(
            project=project,
            id=hashlib.sha256(str(workdir).encode()).hexdigest()[:16],
            resume="allow",
            name=workdir.name,
            dir=str(workdir),
            config=config,
            settings=wandb.Settings(console="off", silent=True, reinit="create_new"),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"config.wandb={project}: {error}; wandb login, or set WANDB_MODE=offline."
        ) from error


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`, without a last one that is still being written."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def draw_curves(workdir: Path, title: str, headline: str):
    """Draws `curves.png` from `metrics.jsonl`.

    Three panels: the loss terms in training, every prediction's accuracy, and how the sub-networks differ. A
    prediction has one colour in all of them.

    Args: headline: the prediction to be shipped, which is drawn thicker.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(workdir / "metrics.jsonl")
    by_split = {
        split: [row for row in rows if row["split"] == split] for split in ("train", "validation", "test")
    }
    scored = [split for split in ("validation", "test") if by_split[split]]
    names = {
        key.rsplit("/", 1)[0]: None for split in scored for key in by_split[split][0] if key.endswith("/top1")
    }
    terms = [
        key
        for row in by_split["train"][:1]
        for key in row
        if "cross_entropy/" in key or "distillation/" in key
    ]
    names |= dict.fromkeys(key.rsplit("/", 1)[1] for key in terms)
    colors = {name: f"C{index % 10}" for index, name in enumerate(names)}
    different = [row for row in by_split["test"] if "diversity/kl" in row]

    figure = Figure(figsize=(15 if different else 11, 4.4), layout="constrained")
    losses, accuracy, *more = figure.subplots(1, 3 if different else 2)

    def draw(axes, rows, key, style, name, factor=1.0, **settings):
        many = len(rows) > 30
        return axes.plot(
            [row["epoch"] for row in rows],
            [factor * row[key] for row in rows],
            style,
            color=colors[name],
            linewidth=2.6 if name == headline else 1.3,
            marker=None if many else "o",
            markersize=3.5,
            **settings,
        )

    for key in terms:
        style = "-" if "cross_entropy/" in key else "--"
        draw(losses, [row for row in by_split["train"] if key in row], key, style, key.rsplit("/", 1)[1])
    losses.set(title="Training: cross-entropy (–) and distillation (- -)", ylabel="nats per example")
    losses.set_yscale("symlog", linthresh=1e-2)
    for split in scored:
        for key in (key for key in by_split[split][0] if key.endswith("/top1")):
            style = "-" if split == scored[0] else "--"
            draw(accuracy, by_split[split], key, style, key.removesuffix("/top1"), 100)
    shown = " (–) and ".join(scored) + (" (- -)" if len(scored) == 2 else "")
    accuracy.set(title=f"Top-1 accuracy, {shown} split", ylabel="%")
    for axes in more:
        colors |= {"disagreement": "0.1", "cka": "0.5", "kl": "C3"}
        lines = draw(
            axes, different, "diversity/disagreement", "-", "disagreement", 100, label="disagreement, %"
        )
        lines += draw(axes, different, "diversity/cka", "--", "cka", 100, label="CKA of feature maps, %")
        axes.set(title="Between sub-networks, test split", ylabel="%", ylim=(0, 100))
        nats = axes.twinx()
        lines += draw(nats, different, "diversity/kl", ":", "kl", label="KL, nats (right)")
        nats.set_ylim(bottom=0)
        axes.legend(handles=lines, fontsize=8)
    last = max((row["epoch"] for row in rows), default=1.0)
    for axes in (losses, accuracy, *more):
        axes.grid(alpha=0.3)
        axes.set(xlabel="epoch", xlim=(0, 1.02 * last))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [
        losses.plot([], [], color=colors[name], linewidth=2.6 if name == headline else 1.3, label=name)[0]
        for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=10, fontsize=9, frameon=False)
    figure.suptitle(title)
    temporary = workdir / ".curves.png.tmp"
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, workdir / "curves.png")
