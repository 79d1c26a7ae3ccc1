"""The files of a run that people and scripts read: metrics.jsonl, TensorBoard events, curves.png, JSON."""

import json
import os
from pathlib import Path

import tensorboardX
from absl import logging


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
    """Appends lines to `metrics.jsonl` and scalars to TensorBoard.

    The file holds no times and no speeds: an interrupted run leaves the same bytes as one that was not.
    """

    def __init__(self, workdir: Path, size: int, step: int):
        """Continues after `size` bytes of the file, which held all up to `step`; cuts off what follows."""
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
        for name, value in scalars.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def write_speed(self, step: int, images_per_second: float):
        """To TensorBoard alone."""
        self._events.add_scalar("train/images_per_second", images_per_second, step)

    def sync(self):
        """Returns once all lines are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self):
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`, without a last one that is still being written."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def draw_curves(workdir: Path, title: str):
    """Draws `curves.png` from `metrics.jsonl`: the loss terms in training, and every prediction's error."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(workdir / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in train]
    terms = [name for name in train[0] if "cross_entropy" in name or "distillation/" in name] if train else []
    for name in terms:
        style = "-" if "cross_entropy" in name else "--"
        losses.plot(epochs, [row[name] for row in train], style, label=name, linewidth=1.4)
    losses.set(title="Training loss terms", xlabel="epoch", ylabel="nats per example")
    losses.set_yscale("symlog", linthresh=1e-2)
    splits = [split for split in ("validation", "test") if any(row["split"] == split for row in rows)]
    colors = {}
    for split, style in zip(splits, ("-", "--") if len(splits) == 2 else ("-",), strict=True):
        scored = [row for row in rows if row["split"] == split]
        for name in (key for key in scored[0] if key.endswith("/top1")):
            label = name.removesuffix("/top1") + (f" ({split})" if len(splits) == 2 else "")
            (line,) = accuracy.plot(
                [row["epoch"] for row in scored],
                [100 * row[name] for row in scored],
                style,
                color=colors.get(name),
                label=label,
                marker="o" if len(scored) < 30 else None,
                markersize=3.5,
                linewidth=1.4,
            )
            colors[name] = line.get_color()
    accuracy.set(title=f"Top-1 accuracy ({' and '.join(splits)} split)", xlabel="epoch", ylabel="%")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(title)
    temporary = workdir / ".curves.png.tmp"
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, workdir / "curves.png")
