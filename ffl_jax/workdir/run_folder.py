"""The folder of one run: what is written to it, and what is read back. It decides nothing."""

import contextlib
from pathlib import Path

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
        self.log = None
        self._newest = self._best = None

    def newest_step(self) -> int | None:
        """The newest step that is whole; damaged ones are set aside. None where nothing was ever saved."""
        if not checkpoint.exists(self.checkpoints):
            return None
        return checkpoint.find(self.checkpoints, quarantine=True)

    def steps(self) -> list[int]:
        """The steps that look whole, ascending."""
        return checkpoint.whole_steps(self.checkpoints)

    @contextlib.contextmanager
    def open(self, config: dict, step: int, log_bytes: int, keep: int, keep_best: bool):
        """Inside, lines and checkpoints after a step can be written; at the end the last are on the disk.

        Args:
          config: JSON-able, all of it.
          step: that the run begins or continues at.
          log_bytes: of `metrics.jsonl` then; what follows is cut off.
          keep: how many checkpoints.
          keep_best: whether the best one is kept beside them.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        files.write_json(self.path / "config.json", config)
        with contextlib.ExitStack() as stack:
            wandb_run = start_wandb(config["wandb"], self.path, config) if config["wandb"] else None
            self.log = MetricsLog(self.path, log_bytes, step, wandb_run)
            stack.callback(self.log.close)
            self._newest = stack.enter_context(checkpoint.Checkpoints(self.checkpoints, keep))
            if keep_best:
                self._best = stack.enter_context(checkpoint.Checkpoints(self.checkpoints / "best", keep=1))
            yield

    def save(self, step: int, state, record: dict, replace: bool = False):
        """Begins to save a state of one device, and what goes with it."""
        self._newest.save(step, state, record, replace)

    def save_best(self, step: int, state, record: dict):
        """The same for the one that is kept as the best."""
        self._best.save(step, state, record)

    def read_summary(self) -> dict:
        """What `write_summary` wrote; {} if it is missing or not ours."""
        return files.read_json(self.path / "summary.json")

    def write_summary(self, summary: dict):
        """Writes `summary.json`, whole or not at all."""
        files.write_json(self.path / "summary.json", summary)
