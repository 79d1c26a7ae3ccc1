"""The few exceptions that end a run with an exit code of their own and one line on stderr."""


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
