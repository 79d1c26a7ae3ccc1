"""What a person sees while a run trains: a bar on a terminal, now and then a line in a log file."""

import contextlib
import logging
import os
import sys
import time

import jax
import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ffl_jax.devices import processes

_LINE_SECONDS = 15.0
_DISPATCH_SECONDS = 0.5


def process_seconds() -> float:
    """Since the start of this process, or, where the system does not tell, of the processor's work for it."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        return time.process_time()


class Progress:
    """Counts steps, measures speed, shows both with loss, accuracy and the time left.

    Attributes:
      step: the last step that was begun.
    """

    def __init__(self, total_steps: int, step: int, batch_size: int, steps_per_epoch: int):
        self.step = step
        self._batch_size, self._steps_per_epoch, self._total = batch_size, steps_per_epoch, total_steps
        self._silent = not processes.is_first()
        self._terminal = sys.stderr.isatty() and not self._silent
        self._bar = tqdm.tqdm(
            total=total_steps, initial=step, unit="step", disable=not self._terminal, dynamic_ncols=True
        )
        self._tells = not (self._silent or logging.root.handlers)
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

    def advance(self, steps: int):
        """So many more steps were begun."""
        self.step += steps
        self._bar.update(steps)

    def show(self, step: int, loss: float, accuracy: float):
        """All steps up to this one have finished just now, with these means since the last time."""
        now = time.monotonic()
        if self._clock is not None:
            self._seconds += now - self._clock
            self._steps += step - self._clock_step
        self._clock, self._clock_step = now, step
        speed = self.images_per_second
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, accuracy {100 * accuracy:.1f}%" + (f", {speed:.0f} images/s" if speed else "")
        )
        if not (self._terminal or self._silent) and now - self._line_time > _LINE_SECONDS and speed:
            self._line_time = now
            left = tqdm.tqdm.format_interval((self._total - step) * self._batch_size / speed)
            print(
                f"step {step}/{self._total}, epoch {step / self._steps_per_epoch:.1f}: "
                f"loss {loss:.3f}, "
                f"accuracy {100 * accuracy:.1f}%, {speed:.0f} images/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def tell(self, text: str):
        """A line of the log; printed where nobody has set one up, as in a notebook."""
        logging.info(text)
        if self._tells:
            tqdm.tqdm.write(text, file=sys.stderr)

    def restart_clock(self):
        """Leaves what happened since the last `show` out of the speed."""
        self._clock, self._clock_step = time.monotonic(), self.step

    def close(self):
        self._bar.close()
        self._redirection.close()


class Pace:
    """How many steps the devices are given at once, and when: they never wait, and a signal not for long.

    Attributes:
      steps: that last about as long as `_DISPATCH_SECONDS`.
      start_seconds: from the start of the process until the first of them were done; None before.
    """

    def __init__(self):
        self.steps = 1
        self.start_seconds: float | None = None
        self._given = None  # to the devices last: (an array that is there when it is done, steps)
        self._time: float | None = None

    def wait(self, result, steps: int):
        """Returns when all that was given to the devices before this is done.

        Args:
          result: arrays of what was given just now.
          steps: how many these were.
        """
        given, self._given = self._given, (result, steps)
        if given is None:
            return
        jax.block_until_ready(given[0])
        now = time.monotonic()
        if self.start_seconds is None:
            self.start_seconds = process_seconds()
            logging.info("The first step was done %.1f s after the start of the process.", self.start_seconds)
        if self._time is not None:
            fitting = _DISPATCH_SECONDS * given[1] / max(now - self._time, 1e-9)
            self.steps = int(min(2 * self.steps, max(1, fitting)))
        self._time = now

    def restart_clock(self):
        """Something else took time."""
        self._given = self._time = None
