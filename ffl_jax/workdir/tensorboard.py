"""Event files for TensorBoard, written at once: a thread of tensorboardX would tell its errors to nobody."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from ffl_jax.workdir import files

_BUCKETS = 1e-12 * 1.1 ** np.arange(773)  # up to 1e20, as TensorFlow has them
_BINS = [*-_BUCKETS[::-1], 0.0, *_BUCKETS]


class Events:
    """One file of a folder; what older ones hold from step `purge_step` on is no longer shown."""

    def __init__(self, folder: Path, purge_step: int | None):
        files.make_folder(folder)
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(purge_step, session_log=start)

    def scalar(self, step: int, name: str, value: float):
        self._write(step, summary=summary.scalar(name, value))

    def images(self, step: int, name: str, images: np.ndarray):
        """A grid of uint8 images [B, H, W, 3]."""
        self._write(step, summary=summary.image(name, images, dataformats="NHWC"))

    def histogram(self, step: int, name: str, values: np.ndarray):
        self._write(step, summary=summary.histogram(name, values, _BINS))

    def settings(self, step: int, settings: dict[str, bool | float | str], metrics: Sequence[str]):
        """A row of the page HParams, with a column for each setting and each metric."""
        for one in summary.hparams(settings, dict.fromkeys(metrics))[:2]:
            self._write(step, summary=one)

    def result(self, step: int, metrics: dict[str, float]):
        """The metrics of that row, and that the run is complete."""
        for name, value in metrics.items():
            self.scalar(step, name, value)
        self._write(step, summary=summary.hparams({}, {})[2])

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()

    def _write(self, step, **content):
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))
