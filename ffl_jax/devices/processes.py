"""Several processes that train together: joining them, and agreeing on what only the host decides.

Process 0 alone writes, and reads what it wrote. What it finds there goes to the others over the network, so
that they need no folder of its.
"""

import json
import os
import socket
import time
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from ffl_jax.devices import preemption
from ffl_jax.errors import ConfigError, ResourceError

_VARIABLES = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
_JOIN_SECONDS = 240  # to wait for process 0
_SECONDS = 30  # without a sign of life of another process, until this one ends too


def join():
    """Makes this process one of those of a run; to be called before any other use of JAX.

    JAX itself finds the others under Slurm, Open MPI, Kubernetes and on Cloud TPUs. Elsewhere the environment
    names them: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ConfigError: they cannot be found, or the variables are no numbers or contradict each other.
      ResourceError: process 0 did not answer in time.
    """
    given = {key: os.environ[name] for key, name in _VARIABLES.items() if name in os.environ}
    for key, value in given.items():
        if not value.isdecimal():
            raise ConfigError(f"{_VARIABLES[key]} must be a whole number, got {value!r}.")
    # JAX's own preemption service would take SIGTERM from `preemption`, which also answers Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    alone = len(given) == len(_VARIABLES) and address is not None
    if alone and int(given["process_id"]) > 0:
        _wait_for(address)
    try:
        jax.distributed.initialize(
            cluster_detection_method="deactivate" if alone else None,
            **{key: int(value) for key, value in given.items()},
            heartbeat_timeout_seconds=_SECONDS,
            shutdown_timeout_seconds=_SECONDS,
        )
    except ValueError as error:
        raise ConfigError(
            f"--distributed: {error} Where no cluster says it, set JAX_NUM_PROCESSES, JAX_PROCESS_ID, and "
            "JAX_COORDINATOR_ADDRESS=host:port of process 0."
        ) from error
    except RuntimeError as error:
        raise ResourceError(f"--distributed: the other processes cannot be reached: {error}") from error


def _wait_for(address: str):
    """Until process 0 listens; JAX itself would end this process in five minutes, with no word of ours."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS must be HOST:PORT of process 0, got {address!r}.")
    end = time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ResourceError(
                    f"--distributed: process 0 does not answer at {address} ({error}): start it, or set "
                    "JAX_COORDINATOR_ADDRESS to where it is."
                ) from error
        time.sleep(0.5)


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


class Agreement:
    """What all processes must do alike: stop, or take so many steps at once.

    Attributes:
      steps: that any process has found fitting, the fewest of all.
    """

    def __init__(self, pace, step: int):
        """Args: pace: a `progress.Pace`. step: the one that the run begins at."""
        self._pace, self._next, self._stopping = pace, step, False
        self.steps = 1

    def stopping(self, step: int) -> bool:
        """Whether a signal came; to any process, when they last agreed."""
        if not several():
            self.steps = self._pace.steps
            return preemption.requested()
        if step >= self._next and not self._stopping:
            # Not before every dispatch: it waits for the devices.
            found = gathered([preemption.requested(), self._pace.steps])
            self._stopping, self.steps = bool(found[:, 0].any()), int(found[:, 1].min())
            self._next = step + self.steps
        return self._stopping


def check_equal(identity):
    """Raises ConfigError in all processes unless they give the same JSON-able value."""
    found = gathered([zlib.crc32(json.dumps(identity, sort_keys=True).encode()) >> 1])
    if (found != found[0]).any():
        raise ConfigError(
            "the processes of this run do not have the same configuration and data: give all of them the "
            "same arguments, and the same dataset."
        )


def gathered(values: Sequence[int]) -> np.ndarray:
    """The whole numbers that each process gives: [processes, values]."""
    values = np.asarray(values, np.int32)
    return multihost_utils.process_allgather(values) if several() else values[None]


def from_first(tree):
    """Process 0's arrays, bit for bit, in every process; each gives a tree of that form."""
    if not several():
        return tree
    keys = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(tree)]
    leaves, form = jax.tree.flatten(tree)
    plain = [np.asarray(jax.random.key_data(x) if key else x) for x, key in zip(leaves, keys, strict=True)]
    sizes = np.cumsum([x.nbytes for x in plain])
    flat = np.frombuffer(b"".join(x.tobytes() for x in plain) + bytes(-int(sizes[-1]) % 4), np.uint32)
    flat = np.asarray(multihost_utils.broadcast_one_to_all(flat)).view(np.uint8)
    parts = np.split(flat[: sizes[-1]], sizes[:-1])
    new = [part.view(x.dtype).reshape(x.shape) for part, x in zip(parts, plain, strict=True)]
    new = [
        jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf)) if key else x
        for x, leaf, key in zip(new, leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(form, new)


def value_of_first(make):
    """`make()` of process 0, JSON-able, in every process; the others do not call it."""
    if not several():
        return make()
    text = json.dumps(make()).encode() if is_first() else b""
    size = int(gathered([len(text)])[0, 0])
    padded = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return json.loads(from_first(padded).tobytes())
