"""What every command shares: flags, signals, and one line with the right exit code in place of a traceback.

Light on imports, so that a mistyped flag and a signal are answered at once.
"""

import contextlib
import errno
import gc
import io
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags

from ffl_jax.devices import compiled, preemption
from ffl_jax.errors import ConfigError, FFLError, Preempted, ResourceError, of_system
from ffl_jax.registry import import_modules
from ffl_jax.workdir.paths import programs_directory


def new_flags() -> flags.FlagValues:
    """Flags of one command: `--help` and `--debug` to begin with."""
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Shows this text.", flag_values=values, allow_hide_cpp=True)
    flags.DEFINE_bool("debug", False, "Shows the traceback of an error.", flag_values=values)
    return values


class HelpShown(SystemExit):
    """The command was asked for no more than its usage."""


class _Outlet(io.FileIO):
    """Standard output or error that never fails: once it cannot be written, what is written goes nowhere.

    Attributes:
      error: of the first write that failed.
    """

    error: OSError | None = None

    def write(self, data) -> int:
        written = None
        try:
            while self.error is None and (written := super().write(data)) is None:
                time.sleep(0.01)  # Somebody made this pipe one that does not block, and its reader is slow.
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes if written is None else written


def _secure_standard_files() -> _Outlet | None:
    """Whoever has closed standard input, output or error, or stops reading, does not end a run.

    Returns: standard output; None where something else has taken its place, a test perhaps.
    """
    if os.name != "posix":  # a console of Windows takes text, not bytes
        return None
    closed = []
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError as error:  # Else the next file that is opened takes its number, and what is printed.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            closed.append((descriptor, error))
    if sys.stdin is None:
        sys.stdin = os.fdopen(0)
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        return None
    outlets = [_Outlet(descriptor, "wb", closefd=False) for descriptor in (1, 2)]
    for descriptor, error in closed:
        if descriptor:
            outlets[descriptor - 1].error = error
    encodings = [file.encoding if file else "utf-8" for file in (sys.stdout, sys.stderr)]
    # A terminal may have no "±", and a file's name may be no text.
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(outlet), encoding, "backslashreplace", line_buffering=True)
        for outlet, encoding in zip(outlets, encodings, strict=True)
    )
    return outlets[0]


def run(command: Callable[[list[str]], None], huge_pages: bool = False, answers: bool = False):
    """Runs `command(arguments)` and ends the process with the contract's exit code.

    Args:
      huge_pages: the command trains in this process; begins anew where that makes it faster.
      answers: what it prints is its work, so that a full disk under its output is an error. A reader who has
        seen enough, `head` perhaps, is none.
    """
    preemption.install()
    if huge_pages:
        _use_huge_pages()
    _keep_programs()
    gc.set_threshold(100_000, 50, 100)  # tracing makes millions of objects that live on: a sixth of a start
    compiled.mend()
    output = _secure_standard_files()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for talkative in ("absl", "jax", "matplotlib", "tensorboardX"):  # Orbax and TFDS speak as absl
        logging.getLogger(talkative).setLevel(logging.WARNING)
    debug, code = "--debug" in sys.argv, 0
    try:
        try:
            command(sys.argv)
        except HelpShown:
            answers = True
        except SystemExit as end:  # of a user's own module, say: what was to be done is not
            raise ConfigError(
                f"a module called sys.exit({end.code!r}): only the command ends itself."
            ) from end
        sys.stdout.flush()
        if answers and output and output.error and output.error.errno != errno.EPIPE:
            raise ResourceError(
                f"standard output: {output.error.strerror}, so that the answer is lost: run it again."
            )
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(refusal).split())}", file=sys.stderr, flush=True)
        code = refusal.exit_code
        # Else JAX waits for the other processes, which cannot go on, and Orbax, after a save that failed, for
        # threads of its own.
        left = [thread for thread in threading.enumerate() if not thread.daemon]
        if (code == ResourceError.exit_code and len(left) > 1) or (
            code != Preempted.exit_code and _is_one_of_several()
        ):
            sys.stdout.flush()
            os._exit(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _use_huge_pages():
    """Starts the process anew where large blocks of memory would else come in pages of 4 kB.

    XLA's CPU backend asks for a gigabyte in every step and gives it back; to touch that much for the first
    time, page by page, takes a quarter of the step. The C library reads this setting as a process starts.
    """
    tunables = [item for item in os.environ.get("GLIBC_TUNABLES", "").split(":") if item]
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:  # no Linux
        return
    if "[madvise]" in setting and not any(item.startswith("glibc.malloc.hugetlb=") for item in tunables):
        preemption.hold_back()
        os.environ["GLIBC_TUNABLES"] = ":".join([*tunables, "glibc.malloc.hugetlb=1"])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _keep_programs():
    """Has JAX keep compiled programs in the cache folder, unless the environment says otherwise."""
    # Not only those that took a second: reading a program takes a fifth of compiling it or less.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(RuntimeError, OSError):  # There is no home folder, or it cannot be written.
        folder = programs_directory()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def _refusal(error: Exception) -> FFLError | None:
    """The error as one that a user can act on, or None where it is our mistake."""
    if isinstance(error, FFLError):
        return error
    if isinstance(error, flags.Error):
        return ConfigError(str(error))
    if isinstance(error, OSError):
        return of_system(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return ResourceError(
            f"out of memory: lower config.batch_size or config.evaluation.batch_size ({error})."
        )
    from ffl_jax.devices import start  # here, since it may ask JAX

    return start.problem(error)


def parse(
    values: flags.FlagValues, argv: list[str], usage: str, config: bool = False, arguments: bool = False
) -> list[str]:
    """Reads the flags; prints `usage` and ends where `--help` is among them.

    Args:
      values: the command's flags.
      argv: the command line, as in `sys.argv`.
      usage: what `--help` shows first.
      config: adds `--config=FILE[:PRESETS]` and `--config.KEY=VALUE`, which set what the file gives.
      arguments: the command takes arguments that are no flags, before, between or behind these.

    Returns:
      These arguments.

    Raises:
      ConfigError: a flag is unknown, or its value of another type, or an argument stands alone; the file is
        missing or broken; a key is unknown (the nearest right ones are named).
    """
    if any(argument in ("--help", "-help", "-h") for argument in argv[1:]):
        described = "\n".join(f"  --{name}: {values[name].help}" for name in sorted(values))
        print(f"{usage.strip()}\n\nFlags:\n{described}")
        raise HelpShown(0)
    values.set_gnu_getopt(arguments)
    rest = (_parse_config(values, argv) if config else values(argv))[1:]
    if rest and not arguments:
        raise ConfigError(f"unexpected argument {rest[0]!r}: flags are written --name=value.")
    return rest


def _parse_config(values, argv):
    from ml_collections import config_flags

    from ffl_jax.training import config as config_lib
    from ffl_jax.training import config_file

    given = []
    for position in reversed(range(1, len(argv))):
        name, equals, value = argv[position].partition("=")
        if name == "--config":
            given.append(value if equals else "".join(argv[position + 1 : position + 2]))
            del argv[position : position + (1 if equals else 2)]
        elif name == "--config.modules":  # before a preset may name what they register
            last = position + (1 if equals else 2)
            modules = tuple(re.findall(r"[\w.]+", value if equals else "".join(argv[position + 1 : last])))
            import_modules(modules)
            argv[position:last] = [f"{name}={modules!r}"]
    config = config_file.read(given[0] if given else "configs/digits.py")
    known = config_lib.flatten(config.to_dict())
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        places = config_lib.nearest_keys(error.flagname.removeprefix("no"), known)
        if not places:
            raise
        hint = " or ".join(f"--config.{key}" for key in places)
        raise ConfigError(f"unknown flag --{error.flagname}: did you mean {hint}?") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        for argument in argv[1:]:
            key = argument.split("=", 1)[0].removeprefix("--").removeprefix("no")
            if key.startswith("config.") and (key := key.removeprefix("config.")) not in known:
                raise config_lib.unknown_key(key, known) from error
        raise ConfigError(str(error)) from error
    config_lib.check_keys(values.config)
    return rest


def default_workdir(config) -> str:
    """Where a run goes that was given no --workdir."""
    from ffl_jax.training.config import dataset_title

    seeds = f"seed{config.seed}"
    if config.num_seeds > 1:
        seeds = f"seeds{config.seed}-{config.seed + config.num_seeds - 1}"
    title = re.sub(r"[^\w.+-]", "_", dataset_title(config))
    return os.path.join("runs", f"{title}_{config.method.name}_{config.subnetworks.network}_{seeds}")
