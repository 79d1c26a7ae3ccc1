"""Checkpoints that are whole or not there: Orbax writes, a manifest seals, one rename puts them in place.

    directory/<step>/               a whole step: Orbax's files, and the manifest that says what each must be
    directory/.incoming/            what is being written or removed; rubbish, if a killed run left it
    directory/quarantine/<step>/    damaged steps, set aside by `find(..., quarantine=True)`

Orbax alone keeps no checksum of array data, takes any folder named by a number for a step, and loads what a
link points to. Its `training.Checkpointer` also deletes old steps before the new one could be sealed, and
raises the error of a failed save again in later ones: hence its free functions.
One process writes, under `lock`.
"""

import atexit
import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1._src.saving import execution

from ffl_jax.errors import CheckpointError, FFLError, ResourceError
from ffl_jax.workdir import manifest

# Orbax 0.12.8 has all processes compare the folder that they save to, also where it was told that one saves.
_ALL_PROCESSES = execution, "_check_directory_consistency"
_MAX_LISTED = 20
_ABSENT = object()


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
    """Holds `workdir`. The kernel lets go when the process ends, however it ends: the file means nothing.

    Raises:
      CheckpointError: at once, if another process holds it.
    """
    workdir = Path(workdir).absolute()
    with contextlib.ExitStack() as stack:
        with _resource_errors(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((workdir / ".lock").open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = (
                    f"another run is writing to {workdir}: wait for it, stop it, or choose another --workdir"
                )
                raise CheckpointError(message) from None
        yield


class Checkpoints:
    """Writes the checkpoints of one run in the background and keeps the newest `keep`. A context manager."""

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep at least 1 checkpoint, got keep={keep}.")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._incoming = self.directory / ".incoming"
        self._pending: futures.Future | None = None
        self._closed = False
        with _resource_errors(self.directory):
            self._clean()
        self._worker = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        logging.getLogger("absl").addFilter(_is_news)
        # Not closed, Orbax loses the save and hangs for minutes when Python stops its thread pools.
        # `atexit` comes after that; this, the hook of `concurrent.futures` itself, runs newest first.
        getattr(threading, "_register_atexit", atexit.register)(self.close)

    def save(self, step: int, state: Any, run: dict, replace: bool = False) -> None:
        """Starts to save a step; returns when its arrays are copied.

        Args:
          step: names the step.
          state: pytree of non-empty arrays: jax, on one device, typed keys too; or NumPy.
          run: a JSON-able dict, saved in the same commit.
          replace: whether to write anew a step that is there and whole; a damaged one always is.

        Raises:
          ResourceError: this save, or the one before, met a full disk or the like. Older steps are intact.
        """
        self.wait()
        final = self.directory / str(step)
        if not replace and os.path.lexists(final) and manifest.problem(final) is None:
            return
        arrays = _describe(state)
        items = {"state": jax.tree.map(_plain, state), "run": json.loads(json.dumps(run)), "arrays": arrays}
        with (
            _resource_errors(self.directory),
            _orbax(),
            mock.patch.object(*_ALL_PROCESSES, lambda folder: None),
        ):
            self._clean()
            response = ocp.save_checkpointables_async(self._incoming / str(step), items)
        self._pending = self._worker.submit(self._publish, step, response)

    def wait(self) -> None:
        """Returns when the last save is in place, manifest and all; raises its error, once."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        finally:
            if self._pending.done():  # it is not where a signal handler raised
                self._pending = None

    def close(self) -> None:
        """Waits, then stops the thread. Raises what `wait` would. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            logging.getLogger("absl").removeFilter(_is_news)
            shutil.rmtree(self._incoming, ignore_errors=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            logging.error("%s", failure)  # the exception in flight says why the run ends

    def _publish(self, step: int, response: ocp.AsyncResponse) -> None:
        """In the background: waits for Orbax, seals the step, puts it in place, drops what it supersedes."""
        with _resource_errors(self.directory):
            response.result()
            folder, final = self._incoming / str(step), self.directory / str(step)
            manifest.seal(folder, step)
            if os.path.lexists(final):  # damaged, superseded, or no step at all
                self._discard(final)
            os.rename(folder, final)
            manifest.fsync(self.directory)
            # Not before: until the new step is whole and in place, the old ones are all there is.
            others = [other for other in steps(self.directory) if other != step]
            for other in others[: max(0, len(others) - (self._keep - 1))]:
                self._discard(self.directory / str(other))

    def _discard(self, path: Path) -> None:
        rubbish = self._incoming / f"{path.name}.removed"
        os.rename(path, rubbish)  # first, so that a kill leaves no half of it among the steps
        shutil.rmtree(rubbish, ignore_errors=True)

    def _clean(self) -> None:
        if self._incoming.exists():
            shutil.rmtree(self._incoming)
        self._incoming.mkdir(parents=True)


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps that look whole, ascending: by names and sizes only, which is cheap."""
    directory = Path(directory).absolute()
    return [
        step for step in _numbered(directory) if not manifest.problem(directory / str(step), contents=False)
    ]


def exists(directory: str | os.PathLike) -> bool:
    """Whether steps were ever written here, whole or damaged, set aside or not."""
    directory = Path(directory).absolute()
    return bool(_numbered(directory) or _numbered(directory / "quarantine"))


def find(directory: str | os.PathLike, step: int | None = None, quarantine: bool = False) -> int:
    """The newest step with every file as it was written, or `step` if it is such. The log names damaged ones.

    Args:
      directory: where `Checkpoints` wrote.
      step: accept only this one.
      quarantine: move damaged steps out of the way; else nothing is written.

    Raises:
      CheckpointError: there is none, or the one asked for is missing or damaged.
    """
    directory = Path(directory).absolute()
    found = _numbered(directory)
    if step is not None and step not in found:
        there = ", ".join(map(str, steps(directory))) or "none"
        raise CheckpointError(f"no checkpoint of step {step} in {directory}; there are: {there}")
    damaged, vanished = [], False
    for candidate in reversed(found) if step is None else [step]:
        folder = directory / str(candidate)
        problem = manifest.problem(folder)
        if problem is None:
            return candidate
        if not os.path.lexists(folder):  # superseded, just now, by the run that writes here
            vanished = True
            continue
        damaged.append(f"step {candidate}: {problem}")
        logging.warning("checkpoint %s is damaged and not used: %s", folder, problem)
        if quarantine:
            _set_aside(directory, candidate)
    if vanished:
        return find(directory, step, quarantine)
    reasons = "; ".join(damaged) or "it holds no step"
    raise CheckpointError(
        f"no usable checkpoint in {directory}: {reasons}; use another step or another --workdir"
    )


def load_run(directory: str | os.PathLike, step: int) -> dict:
    """The `run` dict of a step that `find` returned."""
    return _load(Path(directory).absolute() / str(step), "run")


def restore(directory: str | os.PathLike, step: int, abstract_state: Any) -> Any:
    """The state of a step that `find` returned, bitwise, on the first device of this process.

    Args:
      directory: where `Checkpoints` wrote.
      step: which one.
      abstract_state: pytree of `jax.ShapeDtypeStruct` or arrays, as wanted; NumPy arrays come back as such.

    Raises:
      CheckpointError: a path, shape or dtype differs: the message lists them, and nothing was loaded.
    """
    folder = Path(directory).absolute() / str(step)
    stored = _load(
        folder, "arrays"
    )  # Orbax casts dtypes in silence, and knows a typed key by its integers only
    _require_equal(folder, stored, _describe(abstract_state))

    def target(leaf):
        if _is_key(leaf):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return np.empty(leaf.shape, leaf.dtype)

    def finish(loaded, leaf):
        if isinstance(leaf, np.ndarray):
            return loaded
        array = jax.device_put(loaded, jax.local_devices()[0])
        return jax.random.wrap_key_data(array, impl=_key_impl(leaf)) if _is_key(leaf) else array

    loaded = _load(folder, "state", jax.tree.map(target, abstract_state))
    state = jax.tree.map(finish, loaded, abstract_state)
    _require_equal(folder, stored, _describe(state))  # 64-bit numbers shrink without jax_enable_x64
    return state


def differences(stored: dict, current: dict) -> list[str]:
    """One line for each value that differs between two nested JSON-able dicts, named by its dotted path."""
    lines = []

    def compare(path: tuple[str, ...], old: Any, new: Any) -> None:
        mappings = [value for value in (old, new) if isinstance(value, dict)]
        if any(mappings) and len(mappings) + [old, new].count(_ABSENT) == 2:
            old, new = ({} if value is _ABSENT else value for value in (old, new))
            for key in sorted(old.keys() | new.keys()):
                compare((*path, key), old.get(key, _ABSENT), new.get(key, _ABSENT))
            return
        old_text, new_text = ("absent" if value is _ABSENT else json.dumps(value) for value in (old, new))
        if old != new and old_text != new_text:  # NaN equals NaN, and 1 equals 1.0
            lines.append(f"{'.'.join(path)}: {old_text} in the checkpoint, {new_text} now")

    compare((), *(json.loads(json.dumps(value)) for value in (stored, current)))  # tuples become lists
    return lines


def _require_equal(folder: Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    lines = [line.replace('"', "") for line in differences(stored, wanted)]
    if lines:
        rest = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
        raise CheckpointError(
            f"checkpoint {folder} does not fit: {'; '.join(lines[:_MAX_LISTED] + rest)}; "
            "use the configuration it was trained with, or another --workdir"
        )


def _is_key(leaf) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf):
    """Of a key that may be there by its shape only, which `key_impl` takes inside a traced function."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _plain(leaf: Any) -> np.ndarray:
    """As Orbax takes it from one of several processes; a typed key as its integers."""
    return np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _describe(state: Any) -> dict[str, str]:
    """{path of a leaf: dtype and shape}, such as {"params/head/bias": "float32[10]", "rng": "key<fry>[]"}."""
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"a checkpoint holds arrays only: {name} is a {type(leaf).__name__}.")
        described[name] = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return described


def _load(folder: Path, name: str, target: Any = None) -> Any:
    try:
        with _orbax():
            return ocp.load_checkpointables(folder, {name: target})[name]
    except Exception as error:
        if not folder.exists():
            message = (
                f"checkpoint {folder} is not there, or no longer: a running training keeps the newest only"
            )
            raise CheckpointError(message) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"checkpoint {folder} cannot be read: {reason}") from error


def _orbax() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    for name in ("run", "arrays"):  # else Orbax takes a dict of numbers for a pytree of arrays
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    # Of several processes one writes and reads; Orbax would else wait for the others.
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    context.checkpointables.registry = registry
    return context


def _is_news(record: logging.LogRecord) -> bool:
    """Logging filter: Orbax tells all it does, and an error, which `wait` raises, once for every thread."""
    return record.levelno == logging.WARNING or "/orbax/checkpoint/" not in record.pathname


def _numbered(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    with _resource_errors(directory):
        names = [name for name in os.listdir(directory) if re.fullmatch("0|[1-9][0-9]*", name)]
        return sorted(int(name) for name in names if (directory / name).is_dir())


def _set_aside(directory: Path, step: int) -> None:
    with _resource_errors(directory):
        target = directory / "quarantine" / str(step)
        target.parent.mkdir(exist_ok=True)
        while os.path.lexists(target):
            target = target.with_name(target.name + "_")
        os.rename(directory / str(step), target)


@contextlib.contextmanager
def _resource_errors(directory: Path) -> Iterator[None]:
    """Turns "no space", "read-only" or "no permission", however wrapped, into a ResourceError."""
    try:
        yield
    except FFLError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            number = re.search(r"os_error_code='(\d+)'", str(cause))  # TensorStore has it in its text only
            if number or isinstance(cause, OSError):
                reason = os.strerror(int(number[1])) if number else cause.strerror or str(cause)
                raise ResourceError(
                    f"cannot use {directory}: {reason}; free space or make it accessible, then run again"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise
