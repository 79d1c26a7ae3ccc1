"""The few exceptions that end a run with an exit code of their own and one line on stderr."""

import errno
import os


class FFLError(Exception):
    """A refusal that a user can act on: its message says what, where, and what to do."""

    exit_code = 1


class ConfigError(FFLError):
    """Usage or configuration: an unknown key, a value out of its domain, parts that do not go together."""

    exit_code = 2


class DatasetError(FFLError):
    """The dataset is missing, incomplete, damaged, or does not fit the configuration."""

    exit_code = 3


class CheckpointError(FFLError):
    """A checkpoint is missing, damaged, in use, or belongs to another model, configuration or dataset."""

    exit_code = 4


class NonFiniteError(FFLError):
    """Training diverged: a loss or a parameter became infinite or not a number."""

    exit_code = 5


class ResourceError(FFLError):
    """The machine said no: disk full, memory exhausted, permission denied."""

    exit_code = 6


class Preempted(FFLError):
    """A signal asked the run to stop; its state is saved, and the same command continues it."""

    exit_code = 75


_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it accessible, or name another place"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n)"),
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENOMEM: "free memory, or raise the limit on it (ulimit -v)",
    errno.ESTALE: "it was moved or removed elsewhere on the network",
    errno.EIO: "look at the disk",
}


def of_system(error: OSError, where: str | os.PathLike = "") -> ResourceError:
    """What the system refused, as an error of ours.

    Args: where: the place in question, where the error itself names none.
    """
    place = where or error.filename
    if not place and error.errno == errno.ENOENT:  # so only says the system of where a command is started
        return ResourceError("cannot use the current folder: it is gone; change to another, then run again")
    place = os.fsdecode(place) if isinstance(place, str | bytes | os.PathLike) else "the system"
    reason = error.strerror or str(error) or type(error).__name__
    advice = _ADVICE.get(error.errno or 0, "look at that place, or name another one")
    return ResourceError(f"cannot use {place}: {reason}; {advice}, then run again")
