"""What a person sees while a run trains: a bar on a terminal, now and then a line in a log file."""

import contextlib
import sys
import time

import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_LINE_SECONDS = 15.0


class Progress:
    """Counts steps, measures speed, shows both with loss, accuracy and the time left.

    Attributes:
      step: the last step that was begun.
    """

    def __init__(self, total_steps: int, step: int, batch_size: int, steps_per_epoch: int):
        self.step = step
        self._batch_size, self._steps_per_epoch, self._total = batch_size, steps_per_epoch, total_steps
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=total_steps, initial=step, unit="step", disable=not self._terminal, dynamic_ncols=True
        )
        self._redirection = contextlib.ExitStack()
        if self._terminal:  # log lines go above the bar, not into it
            self._redirection.enter_context(logging_redirect_tqdm())
        self._line_time = time.monotonic()
        self._clock: float | None = None  # not before the first line: compilation is no speed
        self._clock_step = step
        self._seconds, self._steps = 0.0, 0

    @property
    def images_per_second(self) -> float | None:
        """Over all steps between two lines of the log, evaluation and compilation left out; None at first."""
        return self._steps * self._batch_size / self._seconds if self._seconds else None

    def advance(self):
        """One more step was begun."""
        self.step += 1
        self._bar.update()

    def show(self, loss: float, accuracy: float):
        """All steps so far have finished, with these means since the last time."""
        now = time.monotonic()
        if self._clock is not None:
            self._seconds += now - self._clock
            self._steps += self.step - self._clock_step
        self._clock, self._clock_step = now, self.step
        speed = self.images_per_second
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, accuracy {100 * accuracy:.1f}%" + (f", {speed:.0f} images/s" if speed else "")
        )
        if not self._terminal and now - self._line_time > _LINE_SECONDS and speed:
            self._line_time = now
            left = tqdm.tqdm.format_interval((self._total - self.step) * self._batch_size / speed)
            print(
                f"step {self.step}/{self._total}, epoch {self.step / self._steps_per_epoch:.1f}: "
                f"loss {loss:.3f}, "
                f"accuracy {100 * accuracy:.1f}%, {speed:.0f} images/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def restart_clock(self):
        """Leaves what happened since the last `show` out of the speed."""
        self._clock, self._clock_step = time.monotonic(), self.step

    def close(self):
        self._bar.close()
        self._redirection.close()
