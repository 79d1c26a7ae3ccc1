"""Checkpoints that are whole or not there: Orbax writes, a manifest seals, one rename puts them in place.

    directory/<step>/               a whole step: Orbax's files, and the manifest that says what each must be
    directory/.incoming/            what is being written or removed; rubbish, if a killed run left it
    directory/quarantine/<step>/    damaged steps, set aside by `find(..., quarantine=True)`

Orbax alone keeps no checksum of array data, takes any folder named by a number for a step, and loads what a
link points to; its managers of steps also delete old ones before the new one could be sealed. Hence its plain
`Checkpointer` of one folder, in a thread of ours. That is the older of Orbax's two interfaces: in the newer
one, `orbax.checkpoint.v1`, every save has all processes compare the folder, also where one was told to save
alone, and that one waits for ever (seen on 0.12.8). Both read what either wrote.
One process writes, under `lock.Lock`.
"""

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax

from ffl_jax.errors import CheckpointError, FFLError, of_system
from ffl_jax.workdir import contents, files, manifest
from ffl_jax.workdir.contents import differences
from ffl_jax.workdir.lock import Lock

lock = Lock  # "with checkpoint.lock(workdir):"
_MAX_LISTED = 20
# Orbax numbers its saves for the whole process: of two at once, one takes the other's folders for its own.
_SAVING = threading.Lock()


class Checkpoints:
    """Writes the checkpoints of one run in the background and keeps the newest `keep`. A context manager."""

    def __init__(self, directory: str | os.PathLike, keep: int = 2, guard: Callable[[], None] = lambda: None):
        """Args: guard: raises where this process may no longer write: see `lock.Lock.check`."""
        if keep < 1:
            raise ValueError(f"keep at least 1 checkpoint, got keep={keep}.")
        self.directory = Path(directory).absolute()
        self._keep, self._guard = keep, guard
        self._incoming = self.directory / ".incoming"
        self._pending: futures.Future | None = None
        self._closed = False
        with _resource_errors(self.directory):
            self._clean()
        # Not a bare thread: in Python 3.11 its `join`, once a signal handler raised there, waits no more.
        self._worker = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        _quieten()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="checkpoint watch").start()

    def save(self, step: int, state: Any, run: dict, replace: bool = False) -> None:
        """Starts to save a step; returns when its arrays are copied.

        Args:
          step: names the step.
          state: pytree of non-empty arrays: jax, on one device, typed keys too; or NumPy.
          run: a JSON-able dict, saved in the same commit.
          replace: whether to write anew a step that is there and whole; a damaged one always is.

        Raises:
          ResourceError: the save before met a full disk or the like. Older steps are intact.
        """
        self.wait()
        final = self.directory / str(step)
        if not replace and os.path.lexists(final) and manifest.problem(final) is None:
            return
        # Copies: the caller may go on to change all of it.
        items = contents.describe(state), contents.copies(state), json.loads(json.dumps(run))
        self._pending = self._worker.submit(self._write, step, *items)

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
        self._ended.set()
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            with contextlib.suppress(FFLError):  # else another run saves there now
                self._guard()
                shutil.rmtree(self._incoming, ignore_errors=True)

    def _watch(self) -> None:
        """Ends a program that forgot to close.

        Python stops all thread pools when the main thread ends, Orbax's too. A save still going on then
        fails, and leaves threads behind that wait ten minutes for what will not come: this says so, and the
        step before is there. No program that uses `with` comes here: exceptions and sys.exit close first.
        """
        while not self._ended.wait(0.2):
            if not threading.main_thread().is_alive():
                try:
                    self.close()
                except Exception as failure:
                    sys.stderr.write(
                        f"error: Checkpoints.close was not called, and a save failed: {failure}\n"
                    )
                    sys.stderr.flush()
                    os._exit(1)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            logging.error("%s", failure)  # the exception in flight says why the run ends

    def _write(self, step: int, arrays: dict, state: Any, run: dict) -> None:
        """In the background: writes the step, seals it, puts it in place, drops what it supersedes."""
        folder, final = self._incoming / str(step), self.directory / str(step)
        from orbax.checkpoint import args  # a third of a second, which no run waits for here

        items = {"state": args.PyTreeSave(state), "run": args.JsonSave(run), "arrays": args.JsonSave(arrays)}
        self._guard()
        with _resource_errors(self.directory, self._guard):
            self._clean()
            with _SAVING, _orbax() as orbax:
                orbax.save(folder, args.Composite(**items))
            manifest.seal(folder, step)
            self._guard()
            if os.path.lexists(final):  # damaged, superseded, or no step at all
                self._discard(final)
            os.rename(folder, final)
            manifest.fsync(self.directory)
            # Not before: until the new step is whole and in place, the old ones are all there is.
            others = [other for other in whole_steps(self.directory) if other != step]
            for other in others[::-1][self._keep - 1 :]:
                self._discard(self.directory / str(other))

    def _discard(self, path: Path) -> None:
        rubbish = self._incoming / f"{path.name}.removed"
        os.rename(path, rubbish)  # first, so that a kill leaves no half of it among the steps
        shutil.rmtree(rubbish, ignore_errors=True)

    def _clean(self) -> None:
        files.make_folder(self.directory)
        files.make_folder(self._incoming)
        for rubbish in self._incoming.iterdir():
            if rubbish.is_dir() and not rubbish.is_symlink():
                shutil.rmtree(rubbish, ignore_errors=True)  # NFS keeps what a killed process had open
            else:
                rubbish.unlink()


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax logs all it does, and an error, which `wait` raises, once for each of its threads."""
    # Not by the record's path: that is of absl itself where the logger was asked for before absl was loaded.
    names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_stack(None))
    return record.levelno == logging.WARNING or not any(name.startswith("orbax.") for name in names)


@functools.cache
def _quieten() -> None:
    """For good: some threads of Orbax and TensorStore fail after the save that failed, each on its own."""
    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Orbax alone uses it here
    show = sys.unraisablehook

    def hook(failure):
        # TensorStore's threads, started in C++, call back into a loop that has ended, and name no object.
        if failure.object is not None or threading.current_thread() is threading.main_thread():
            show(failure)

    sys.unraisablehook = hook


def whole_steps(directory: str | os.PathLike) -> list[int]:
    """The steps that look whole, ascending: by names and sizes only, which is cheap."""
    found = _numbered(directory)
    return [step for step in found if not manifest.problem(Path(directory, str(step)), contents=False)]


def exists(directory: str | os.PathLike) -> bool:
    """Whether steps were ever written here, whole or damaged, set aside or not."""
    return bool(_numbered(directory) or _numbered(Path(directory, "quarantine")))


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
        there = ", ".join(map(str, whole_steps(directory))) or "none"
        raise CheckpointError(f"no checkpoint of step {step} in {directory}; there are: {there}")
    damaged = []
    for candidate in reversed(found) if step is None else [step]:
        folder = directory / str(candidate)
        problem = manifest.problem(folder)
        if problem is None:
            return candidate
        if not os.path.lexists(folder):  # superseded, just now, by the run that writes here
            return find(directory, step, quarantine)
        damaged.append(f"step {candidate}: {problem}")
        logging.warning("checkpoint %s is damaged and not used: %s", folder, problem)
        if quarantine:
            _set_aside(folder)
    reasons = "; ".join(damaged) or "it holds no step"
    raise CheckpointError(
        f"no usable checkpoint in {directory}: {reasons}; use another step or another --workdir"
    )


def locate(
    directory: str | os.PathLike, step: int | None = None, quarantine: bool = False
) -> tuple[Path, int]:
    """(folder, step) of what `find` gives; the folder is that of the best where only there it is whole."""
    directory = Path(directory).absolute()
    try:
        return directory, find(directory, step, quarantine)
    except CheckpointError as error:
        best = directory / "best"
        if not exists(best):
            raise
        with contextlib.suppress(CheckpointError):
            found = best, find(best, step, quarantine)
            logging.warning("%s; now taken: %s, which was kept as the best", error, best / str(found[1]))
            return found
        raise


def copy(source: str | os.PathLike, target: str | os.PathLike, step: int) -> None:
    """Puts a whole step of one folder of checkpoints into another."""
    source, target = Path(source).absolute(), Path(target).absolute()
    folder, final = target / ".incoming" / str(step), target / str(step)
    with _resource_errors(target):
        for place in (target, folder.parent):
            files.make_folder(place)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source / str(step), folder, ignore=lambda *_: [manifest.NAME])
        manifest.seal(folder, step)
        os.rename(folder, final)
        manifest.fsync(target)


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
    # Orbax casts dtypes in silence, and knows a typed key by its integers only.
    stored = _load(folder, "arrays")
    _require_equal(folder, stored, contents.describe(abstract_state))
    loaded = _load(folder, "state", contents.buffers(abstract_state))
    state = contents.as_wanted(loaded, abstract_state)
    _require_equal(folder, stored, contents.describe(state))  # 64-bit numbers shrink without jax_enable_x64
    return state


def _require_equal(folder: Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    lines = [line.replace('"', "") for line in differences(stored, wanted)]
    if lines:
        rest = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
        raise CheckpointError(
            f"checkpoint {folder} does not fit: {'; '.join(lines[:_MAX_LISTED] + rest)}; "
            "use the configuration it was trained with, or another --workdir"
        )


def _load(folder: Path, name: str, target: Any = None) -> Any:
    """One item: the arrays of the tree `target`, or without it what was saved as JSON."""
    from orbax.checkpoint import args

    wanted = args.JsonRestore() if target is None else args.PyTreeRestore(target)
    try:
        with _orbax() as orbax:
            return orbax.restore(folder, args.Composite(**{name: wanted}))[name]
    except Exception as error:
        reason = f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
        if not folder.exists():
            reason = "is not there, or no longer: a running training keeps the newest only"
        raise CheckpointError(f"checkpoint {folder} {reason}") from error


def _orbax():
    """Orbax's `Checkpointer` of one folder."""
    import orbax.checkpoint as ocp

    # Of several processes one writes and reads; Orbax would else wait for the others.
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_zarr3=True, multiprocessing_options=alone),
        run=ocp.JsonCheckpointHandler("data.json", multiprocessing_options=alone),
        arrays=ocp.JsonCheckpointHandler("data.json", multiprocessing_options=alone),
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _numbered(directory: str | os.PathLike) -> list[int]:
    directory = Path(directory).absolute()
    with _resource_errors(directory):
        names = os.listdir(directory) if directory.is_dir() else []
        names = [name for name in names if re.fullmatch("0|[1-9][0-9]*", name)]
        return sorted(int(name) for name in names if (directory / name).is_dir())


def _set_aside(folder: Path) -> None:
    with _resource_errors(folder.parent):
        target = folder.parent / "quarantine" / folder.name
        files.make_folder(target.parent)
        os.rename(folder, files.free_name(target))


@contextlib.contextmanager
def _resource_errors(directory: Path, guard: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turns what the system refuses, however wrapped, into a ResourceError; `guard` may know better why."""
    try:
        yield
    except FFLError:
        raise
    except Exception as error:
        guard()
        cause: BaseException | None = error
        while cause is not None:
            number = re.search(r"os_error_code='(\d+)'", str(cause))  # TensorStore has it in its text only
            if number:
                cause = OSError(int(number[1]), os.strerror(int(number[1])))
            if isinstance(cause, OSError):
                raise of_system(cause, directory) from error
            cause = cause.__cause__ or cause.__context__
        raise
