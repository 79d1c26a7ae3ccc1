"""The folder of one run: what is written to it, and what is read back. It decides nothing."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ffl_jax.errors import CheckpointError
from ffl_jax.workdir import checkpoint, files
from ffl_jax.workdir.log import MetricsLog, start_wandb


class RunFolder:
    """Checkpoints, log and summary of one run.

    Attributes:
      path, checkpoints: the folder, and the one of its checkpoints.
      log: a `MetricsLog` while the folder is open.
    """

    def __init__(self, path: Path):
        """What is there is left alone."""
        self.path, self.checkpoints = path, path / "checkpoints"
        self.log: Any = None  # a MetricsLog while it is open
        self._newest = self._best = self._config = None

    def newest_step(self) -> int | None:
        """The newest step that is whole; damaged ones are set aside. None where nothing was ever saved.

        Where no other is left it is the one that was kept as the best.
        """
        if not any(map(checkpoint.exists, (self.checkpoints, self.checkpoints / "best"))):
            return None
        place, step = checkpoint.locate(self.checkpoints, quarantine=True)
        if place != self.checkpoints.absolute():
            checkpoint.copy(place, self.checkpoints, step)
        return step

    def mend_best(self, step: int):
        """Sees to it that the best checkpoint, of this step, is whole, where a copy of it is left."""
        best = self.checkpoints / "best"
        with contextlib.suppress(CheckpointError):
            checkpoint.find(best, step, quarantine=True)
            return
        try:
            checkpoint.copy(self.checkpoints, best, checkpoint.find(self.checkpoints, step))
        except CheckpointError:
            text = "%s, the best so far, is lost: the next one that is better is kept there again."
            logging.warning(text, best / str(step))

    def steps(self) -> list[int]:
        """The steps that look whole, ascending."""
        return checkpoint.whole_steps(self.checkpoints)

    @contextlib.contextmanager
    def open(
        self,
        config: dict,
        step: int,
        log_bytes: int,
        keep: int,
        keep_best: bool,
        guard: Callable[[], None],
    ):
        """Inside, lines and checkpoints after a step can be written; at the end the last are on the disk.

        Args:
          config: JSON-able, all of it.
          step: that the run begins or continues at.
          log_bytes: of `metrics.jsonl` then; what follows is cut off.
          keep: how many checkpoints.
          keep_best: whether the best one is kept beside them.
          guard: raises where this run may no longer write.
        """
        self._config = config
        self.write_config(config)
        with contextlib.ExitStack() as stack:
            wandb_run = start_wandb(config["wandb"], self.path, config) if config["wandb"] else None
            self.log = MetricsLog(self.path, log_bytes, step, wandb_run, guard)
            stack.callback(self.log.close)
            self._newest = stack.enter_context(checkpoint.Checkpoints(self.checkpoints, keep, guard))
            if keep_best:
                best = checkpoint.Checkpoints(self.checkpoints / "best", 1, guard)
                self._best = stack.enter_context(best)
            yield

    def save(self, step: int, state, record: dict, replace: bool = False):
        """Begins to save a state of one device, and what goes with it."""
        self.write_config(self._config, anew=False)  # it may have been removed meanwhile
        self._newest.save(step, state, record, replace)

    def save_best(self, step: int, state, record: dict):
        """The same for the one that is kept as the best."""
        self._best.save(step, state, record)

    def write_config(self, config: dict, anew: bool = True):
        """Writes `config.json`. With `anew` False only where none can be read."""
        if anew or not files.read_json(self.path / "config.json"):
            files.make_folder(self.path)
            files.write_json(self.path / "config.json", config)

    def read_summary(self) -> dict:
        """What `write_summary` wrote; {} if it is missing or not ours."""
        return files.read_json(self.path / "summary.json")

    def write_summary(self, summary: dict):
        """Writes `summary.json`, whole or not at all."""
        files.write_json(self.path / "summary.json", summary)

    def write_confusion(self, table: str):
        """Writes `confusion.csv`, whole or not at all."""
        # The name of a class is that of a folder, which may be no text.
        files.write_bytes(self.path / "confusion.csv", table.encode("utf-8", "backslashreplace"))
