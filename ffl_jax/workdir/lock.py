"""One writer for each workdir."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
import uuid
from pathlib import Path

from ffl_jax.errors import CheckpointError, ConfigError, of_system
from ffl_jax.workdir import files

# What file systems answer that have no locks: those of some clusters, and most in user space.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Lock:
    """Holds a workdir. A context manager.

    The kernel lets go when the process ends, however it ends; that the file is there means nothing. Two
    things the kernel does not see: the file may be removed, and some file systems have no locks. So whoever
    writes asks `check` before, and it is the older of two runs that stops then. Without locks, the file's
    content says who came last.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._path = Path(workdir).absolute() / ".lock"
        self._name = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}\n".encode()
        self._file = None
        self._kernel = True
        self._one_thread = threading.Lock()

    def __enter__(self) -> "Lock":
        """CheckpointError, at once, if another process holds it; ConfigError if its name is no text."""
        try:
            str(self._path).encode()
        except UnicodeEncodeError:
            place = os.fsencode(self._path.parent).decode(errors="backslashreplace")
            raise ConfigError(
                f"--workdir={place} is not UTF-8: no checkpoint can be written there."
            ) from None
        self._take()
        return self

    def __exit__(self, *_):
        self._file.close()

    def check(self):
        """Takes the workdir again if `.lock` was removed; CheckpointError if another run has it now."""
        with self._one_thread:
            try:
                if self._kernel:
                    mine = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
                else:
                    mine = files.read_bytes(self._path) == self._name
                    if not mine:
                        raise self._taken()
            except OSError:  # removed, or moved with all that is beside it
                mine = False
            if not mine:
                logging.warning("%s is gone: this run goes on, and makes it again.", self._path)
                self._take()

    def _take(self):
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.make_way(self._path)
            file = open(self._path, "a+b", buffering=0)  # noqa: SIM115, held open for the run
        except OSError as error:
            raise of_system(error, self._path.parent) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise self._taken() from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise of_system(error, self._path) from error
            if self._kernel:
                text = "%s has no locks: of two runs there, the one that was started last goes on."
                logging.warning(text, self._path.parent)
            self._kernel = False
        with contextlib.suppress(OSError):  # a full disk, say: the kernel's lock is held all the same
            file.truncate(0)
            file.write(self._name)
        if self._file:
            self._file.close()
        self._file = file

    def _taken(self) -> CheckpointError:
        try:
            who = files.read_bytes(self._path, 1000).decode(errors="replace").partition(",")[0]
        except OSError:
            who = ""
        return CheckpointError(
            f"another run is writing to {self._path.parent}{f' ({who})' if who else ''}: wait for it, stop "
            "it, or choose another --workdir"
        )
