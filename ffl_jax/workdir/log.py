"""A run's numbers as they come: metrics.jsonl, TensorBoard events, Weights & Biases."""

import hashlib
import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import tensorboardX
from absl import logging

from ffl_jax.errors import ConfigError


class MetricsLog:
    """Appends lines to `metrics.jsonl`, and shows them in TensorBoard and, where that is wanted, in W&B.

    The file holds no times and no speeds: an interrupted run leaves the same bytes as one that was not.

    Attributes:
      rows: what the file holds, as `read_metrics` gives it, and what was written since.
    """

    def __init__(self, workdir: Path, size: int, step: int, wandb_run=None):
        """Continues after `size` bytes of the file, which held all up to `step`; cuts off what follows.

        Args: wandb_run: of `start_wandb`, or None.
        """
        path = workdir / "metrics.jsonl"
        self._wandb = wandb_run
        self._file = open(path, "ab")  # noqa: SIM115, held open for the run
        if self._file.tell() < size:
            logging.warning("%s has lost lines: it continues at step %d.", path, step)
        else:
            self._file.truncate(size)
        self.rows, damaged = read_metrics(path)
        if damaged:
            logging.warning("%s has %d damaged line(s), which curves lack.", path, damaged)
        self._events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1 if step else None, write_to_disk=True
        )

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._file.seek(0, os.SEEK_END)

    def write(self, step: int, epoch: float, split: str, scalars: dict[str, float]):
        """Adds one line."""
        self.rows.append({"step": step, "epoch": epoch, "split": split, **scalars})
        self._file.write((json.dumps(self.rows[-1]) + "\n").encode())
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


def read_metrics(path: Path) -> tuple[list[dict], int]:
    """The rows of a `metrics.jsonl`, whatever it holds, and how many of its lines are damaged.

    A row has a string `split`, a finite `epoch`, and other numbers; what is none is left out of it. A last
    line without its end is still being written: it is not among the rows, and is no damage.

    Raises:
      OSError: the file is missing or cannot be read.
    """
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [row for row in map(_row, lines) if row]
    return rows, len(lines) - len(rows)


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
        numbers = {key: float(x) for key, x in row.items() if isinstance(x, int | float)}
        fine = isinstance(row["split"], str) and math.isfinite(numbers["epoch"])
        return {"split": row["split"], **numbers} if fine else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
