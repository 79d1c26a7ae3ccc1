"""A run's numbers as they come: metrics.jsonl, TensorBoard events, Weights & Biases."""

import contextlib
import hashlib
import json
import logging
import math
import os
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from ffl_jax.errors import ConfigError, of_system
from ffl_jax.workdir import files
from ffl_jax.workdir.onlooker import Onlooker
from ffl_jax.workdir.tensorboard import Events


class Stretches:
    """Joins training's lines that cover little to the next one.

    A mean over five steps beside means over a hundred is a spike that says nothing. So it is with the last
    line of an epoch beside a multiple of `log_every_steps`.
    """

    def __init__(self):
        self._end = self._longest = 0.0  # epochs
        self._waiting: list[tuple[float, dict]] = []  # (how much it covers, row)

    def add(self, row: dict) -> dict | None:
        """The row joined with those that wait, or None: it waits. Of another split, the row itself."""
        if row["split"] != "train":
            return row
        length, self._end = max(0.0, row["epoch"] - self._end), row["epoch"]
        self._longest = max(self._longest, length)
        self._waiting.append((length, row))
        if sum(length for length, _ in self._waiting) < self._longest / 2:
            return None
        joined, self._waiting = _mean(self._waiting), []
        return joined


def over_stretches(rows: Iterable[dict]) -> list[dict]:
    """Rows of `metrics.jsonl` with training's joined; without those that wait still."""
    stretches = Stretches()
    return [joined for row in rows if (joined := stretches.add(row))]


def _mean(parts: list[tuple[float, dict]]) -> dict:
    """The last row, where each number that all have is the mean, weighted by what each covers."""
    lengths, rows = zip(*parts, strict=True)
    last, total = rows[-1], sum(lengths)
    if len(rows) == 1 or total <= 0:
        return last
    shared = [name for name in last if all(isinstance(row.get(name), int | float) for row in rows)]
    means = {name: sum(x * row[name] for x, row in parts) / total for name in shared}
    return last | means | {key: last[key] for key in ("step", "epoch") if key in last}


class MetricsLog:
    """Appends lines to `metrics.jsonl`, and shows them in TensorBoard and, where that is wanted, in W&B.

    The file holds no times and no speeds: an interrupted run leaves the same bytes as one that was not.
    TensorBoard and W&B may fail; that is said once.

    Attributes:
      rows: what the file holds, as `read_metrics` gives it, and what was written since.
    """

    def __init__(
        self, workdir: Path, size: int, step: int, wandb_run=None, guard: Callable[[], None] = lambda: None
    ):
        """Continues after `size` bytes of the file, which held all up to `step`; cuts off what follows.

        Args: wandb_run: of `start_wandb`, or None. guard: raises where this run may no longer write.
        """
        self._path, self._guard = workdir / "metrics.jsonl", guard
        with self._refusals():
            self.rows = _cut(self._path, size, step)
            self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115, held open for the run
        self._board, self._wandb, self._wandb_run = Onlooker("TensorBoard"), Onlooker("W&B"), wandb_run
        self._events = self._board(Events, workdir / "tensorboard", step + 1 if step else None)
        self._stretches = Stretches()
        for row in self.rows:
            self._stretches.add(row)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._file.seek(0, os.SEEK_END)

    def write(
        self,
        step: int,
        epoch: float,
        split: str,
        scalars: dict[str, float],
        gauges: dict[str, float] = types.MappingProxyType({}),
    ) -> dict:
        """Adds one line and returns it. Training's are shown as `Stretches` joins them.

        Args: scalars: means over what the line covers. gauges: of its last step alone.
        """
        self._guard()
        # JSON has finite numbers alone, and what a gradient overflows to shows in the next step's terms.
        gauges = {name: x for name, x in gauges.items() if math.isfinite(x) and name not in scalars}
        self.rows.append({"step": step, "epoch": epoch, "split": split, **scalars, **gauges})
        with self._refusals():
            _write_all(self._file, (json.dumps(self.rows[-1]) + "\n").encode())
        joined = self._stretches.add(self.rows[-1])
        shown = {name: joined[name] for name in scalars if joined} | gauges
        self._show(step, {f"{split}/{name}": value for name, value in shown.items()})
        return self.rows[-1]

    def write_settings(self, step: int, settings: dict, metrics: Sequence[str]):
        """JSON-able hyper-parameters, and the names of what `write_result` will say, to TensorBoard alone."""
        plain = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in settings.items()
        }
        self._board(lambda: self._events.settings(step, plain, metrics))

    def write_result(self, step: int, metrics: dict[str, float]):
        """What became of the run, to TensorBoard alone."""
        self._board(lambda: self._events.result(step, metrics))

    def write_speed(self, step: int, images_per_second: float):
        """Not to the file."""
        self._show(step, {"train/images_per_second": images_per_second})

    def _show(self, step, scalars):
        for name, value in scalars.items():
            self._board(lambda name=name, value=value: self._events.scalar(step, name, value))
        if self._wandb_run:
            self._wandb(self._wandb_run.log, scalars, step=step)

    def write_images(self, step: int, name: str, images: np.ndarray):
        """A grid of uint8 images [B, H, W, 3], to TensorBoard alone."""
        self._board(lambda: self._events.images(step, name, images))

    def write_histograms(self, step: int, tree: dict):
        """The values of each array, named by its path, to TensorBoard alone."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            self._board(lambda name=name, leaf=leaf: self._events.histogram(step, name, np.asarray(leaf)))

    def sync(self):
        """Returns once all lines are on the disk, also where the file was removed meanwhile."""
        with self._refusals():
            if not _has_name(self._file, self._path):
                logging.warning("%s was removed: all its lines are written again.", self._path)
                self._file.seek(0)
                files.write_bytes(self._path, self._file.read())
                self._file.close()
                self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115
            os.fsync(self._file.fileno())
        self._board(lambda: self._events.flush())

    def close(self):
        self._file.close()
        self._board(lambda: self._events.close())
        if self._wandb_run:
            self._wandb(self._wandb_run.finish)

    @contextlib.contextmanager
    def _refusals(self):
        try:
            yield
        except OSError as error:
            raise of_system(error, self._path) from error


def _cut(path: Path, size: int, step: int) -> list[dict]:
    """The rows up to a step that the first `size` bytes of a file hold; afterwards it holds nothing else."""
    files.make_way(path)
    try:
        found = files.read_bytes(path)[:size]
    except FileNotFoundError:
        found = b""
    except OSError:  # beyond use, the disk has lost it perhaps
        files.set_aside(path)
        found = b""
    *lines, torn = found.split(b"\n")
    rows = [_row(line) for line in lines]
    kept = [index for index, row in enumerate(rows) if row and row.get("step", 0) <= step]
    sound = b"".join(lines[index] + b"\n" for index in kept)
    damaged = rows.count(None) + bool(torn)
    if damaged:
        logging.warning("%s has %d damaged line(s), which are left out.", path, damaged)
    if len(found) < size:
        logging.warning("%s has lost lines: it continues at step %d.", path, step)
    if sound != found:
        files.set_aside(path)
        files.write_bytes(path, sound)
    elif path.exists():
        os.truncate(path, len(found))
    return [rows[index] for index in kept]


def _write_all(file, data: bytes):
    """A disk that gets full takes a part first."""
    while data:
        data = data[file.write(data) :]


def _has_name(file, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def start_wandb(project: str, workdir: Path, config: dict):
    """The run of a workdir in a project of Weights & Biases, the same one at every start.

    None, and a line of the log, where it cannot be reached: no run ends for that.

    Raises:
      ConfigError: the package is missing.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("config.wandb needs a package: pip install wandb, or leave it empty.") from error
    return Onlooker(f"config.wandb={project} (wandb login, or set WANDB_MODE=offline)")(
        wandb.init,
        project=project,
        id=hashlib.sha256(str(workdir).encode(errors="surrogateescape")).hexdigest()[:16],
        resume="allow",
        name=workdir.name,
        dir=str(workdir),
        config=config,
        settings=wandb.Settings(console="off", silent=True, reinit="create_new"),
    )


def read_metrics(path: Path) -> tuple[list[dict], int]:
    """The rows of a `metrics.jsonl`, whatever it holds, and how many of its lines are damaged.

    A row has a string `split`, a finite `epoch`, and other numbers; what is none is left out of it. A last
    line without its end is still being written: it is not among the rows, and is no damage.

    Raises:
      OSError: the file is missing or cannot be read.
    """
    *lines, _ = files.read_bytes(path).split(b"\n")
    rows = [row for row in map(_row, lines) if row]
    return rows, len(lines) - len(rows)


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
        numbers = {key: float(x) for key, x in row.items() if isinstance(x, int | float)}
        fine = isinstance(row["split"], str) and math.isfinite(numbers["epoch"])
        return {"split": row["split"], **numbers} if fine else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
