"""What watches a run and must never end it."""

import logging
from collections.abc import Callable


class Onlooker:
    """Calls what may fail: the first failure is said, and the run goes on without it.

    Attributes:
      fails: whether it has failed.
    """

    def __init__(self, name: str):
        """Args: name: as the line of the log begins."""
        self._name, self.fails = name, False

    def __call__(self, act: Callable, *arguments, **options):
        """What `act` returns; None where it fails, or anything has failed before."""
        if self.fails:
            return None
        try:
            return act(*arguments, **options)
        except Exception as error:
            self.fails = True
            reason = " ".join(str(error).split()) or type(error).__name__
            logging.warning("%s fails, and the run goes on without it: %s", self._name, reason)
            return None
