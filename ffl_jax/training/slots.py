"""Processes that run at once on one machine: what each may use, and what each says."""

import contextlib
import dataclasses
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable

from ffl_jax.devices import preemption

_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"}  # which a user may have set
_SIGNS = ("cuda", "gpu")  # of GPUs in JAX_PLATFORMS


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one process may use.

    Attributes:
      environment: variables that name its GPUs.
      cores: numbers of its processor cores; empty for all.
    """

    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    cores: tuple[int, ...] = ()

    def __str__(self):
        """For people."""
        cores = f"cores {', '.join(map(str, self.cores))}" if self.cores else "all cores"
        gpus = self.environment.get("CUDA_VISIBLE_DEVICES")
        return f"GPU {gpus}, {cores}" if gpus else cores

    def start(self, arguments: list[str], **options) -> subprocess.Popen:
        """Starts a process that has no more than this."""
        with self._cores():
            return subprocess.Popen(arguments, env=os.environ | self.environment, **options)

    @contextlib.contextmanager
    def _cores(self):
        # A process has the cores of the thread that starts it; XLA takes as many threads as it has cores.
        if not self.cores:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def deal(count: int) -> list[Slot]:
    """Equal parts of this machine: each NVIDIA GPU, and each core, belongs to one of them.

    Where GPUs are fewer they are shared, and their memory is divided. Nothing here starts JAX, which would
    take the GPUs for itself.
    """
    if count == 1:
        return [Slot()]
    gpus, cores = _gpus(), _cores()
    each, share = len(gpus) // count, -(-count // max(1, len(gpus)))
    slots = []
    for index in range(count):
        own = gpus[index * each : (index + 1) * each] if each else gpus[index % max(1, len(gpus)) :][:1]
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}
        if own and share > 1 and not _MEMORY & os.environ.keys():
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / share:.3f}"
        begin, end = (len(cores) * i // count for i in (index, index + 1))
        some = cores[begin:end] or cores[index % max(1, len(cores)) :][:1]
        slots.append(Slot(environment, tuple(some)))
        logging.info("Run at once %d of %d has %s.", index + 1, count, slots[-1])
    return slots


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the NVIDIA GPUs that processes started here would take."""
    platform = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if platform and platform not in _SIGNS:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        query = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):  # no driver, or one that hangs
            return []
        return done.stdout.split() if done.returncode == 0 else []
    found = []
    for one in map(str.strip, named.split(",")):
        if one in ("", "-1"):  # CUDA looks no further
            break
        found.append(one)
    return found


def _cores() -> list[int]:
    """Those of this process; none where the system does not say, and they cannot be dealt out."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []


def run(
    arguments: list[str],
    slot: Slot = Slot(),
    prefix: str = "",
    stopping: Callable[[], bool] = preemption.requested,
) -> int:
    """Runs a process to its end and returns its exit code, below 0 that of a signal.

    Args:
      slot: what it may use.
      prefix: of each line that it writes, all to standard output; with "" it writes by itself.
      stopping: asked again and again; once it says yes the process gets SIGTERM, once, and is waited for. A
        signal that comes here makes it say so.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with preemption.deferred():
        # In a session of its own: Ctrl-C would reach it a second time, and a second signal ends it at once.
        process = slot.start(arguments, start_new_session=True, **pipes if prefix else {})
        reader = threading.Thread(target=_relay, args=(process.stdout, prefix), daemon=True)
        if prefix:
            reader.start()
        told = False
        while process.poll() is None:
            if not told and stopping():
                process.terminate()
                told = True
            time.sleep(0.1)
        if prefix:
            reader.join(timeout=5)  # a process that it has left behind may hold the pipe for ever
    return process.returncode


def _relay(lines, prefix: str):
    for line in lines:
        if line.strip():
            print(f"{prefix}: {line.rstrip()}", flush=True)
