"""Names that configurations use for methods, networks and datasets, each registered where it is defined."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from ffl_jax.errors import ConfigError

Entry = TypeVar("Entry")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "Did you mean …?" for the known names nearest to `name`, or the list of all where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}."


def check_choice(key: str, value: str, known: Collection[str]) -> None:
    """Raises ConfigError that lists the known ones, unless `value` of a setting is one of `known`."""
    if value not in known:
        raise ConfigError(f"{key} must be one of {', '.join(known)}, got {value!r}.")


def import_modules(names: Iterable[str]) -> None:
    """Imports modules of a user's own, which register methods, networks and datasets.

    They are looked for in the folder of the command too. Raises ConfigError for one that cannot be imported.
    """
    if not {"", os.getcwd()} & set(sys.path):  # as where a console script was started
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"config.modules: {name!r} cannot be imported ({type(error).__name__}: {error}): start in "
                "its folder, or name that in PYTHONPATH."
            ) from error


class Registry(dict):
    """Maps a lower-case name to what builds the thing."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, *names: str) -> Callable[[Entry], Entry]:
        """Decorator: enters a class or function under each of `names`."""

        def enter(entry: Entry) -> Entry:
            for name in names:
                assert name not in self, f"{self.kind} {name!r} is registered twice"
                self[name] = entry
            return entry

        return enter

    def lookup(self, name: str) -> Any:
        """The entry called `name`; raises ConfigError that names the nearest known ones."""
        if name not in self:
            raise ConfigError(f"unknown {self.kind} {name!r}: {nearest(name, self)}")
        return self[name]
