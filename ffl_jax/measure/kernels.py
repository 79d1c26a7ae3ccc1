"""What a compiled program spends its time on, by JAX's profiler and the names that operations have in it."""

import collections
import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

_NAMED = re.compile(r"%?([\w.-]+) = .*metadata=\{.*?op_name=\"([^\"]*)\"")
# Their time is that of what they hold, which has rows of its own.
_CONTAINERS = ("while", "call", "conditional")
# What a module is called -> what it is; the first that matches counts.
_LAYERS = {"norm": "norms", "conv": "convolutions", "head": "heads"}
_SCOPES = {"input_gradient": ", gradients of inputs", "kernel_gradient": ", gradients of kernels"}


@dataclasses.dataclass(frozen=True)
class Share:
    """Of one step: `milliseconds` of all threads or streams together, in so many kernels, called `name`."""

    name: str
    milliseconds: float
    kernels: float


def measure(compiled, step: Callable[[], object], calls: int = 5) -> tuple[list[Share], list[Share]]:
    """(shares by layer and pass, shares by operation), the largest first.

    Args:
      compiled: the program that `step` calls once.
      step: gives what is waited for.
      calls: over how many it is averaged.
    """
    paths = dict(_NAMED.findall(compiled.as_text()))
    module = compiled.as_text().split(",", 1)[0].removeprefix("HloModule ")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(step())
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    layers, operations = (collections.defaultdict(list) for _ in range(2))
    for name, nanoseconds in _events(profile, module):
        # A kernel of a GPU is called after its operation, with "_" for ".", unless a library named it.
        operation = name if name in paths else re.sub(r"_(\d+)$", r".\1", name)
        layer = _layer(paths.get(operation, ""))
        layers[layer].append(nanoseconds)
        operations[f"{name} ({layer})"].append(nanoseconds)
    return tuple(_sorted(each, calls) for each in (layers, operations))


def _events(profile, module):
    """(operation, nanoseconds) of what ran of a module; of a GPU, of whatever ran."""
    for plane in profile.planes:
        gpu = plane.name.startswith("/device:")
        for line in plane.lines:
            if gpu and not line.name.startswith("Stream"):  # others tell the same again
                continue
            for event in line.events:
                found = dict(event.stats)
                operation = found.get("hlo_op", event.name if gpu else None)
                ours = gpu or found.get("hlo_module") == module
                if operation and ours and not operation.startswith(_CONTAINERS):
                    yield operation, event.duration_ns


def _layer(path: str) -> str:
    """ "jit(f)/transpose(jvp(FFL))/…/norm1/mul" -> "norms, backward"."""
    way = "backward" if "transpose(" in path else "forward" if "jvp(" in path else ""
    parts = path.split("/")[1:-1]
    kind = next((kind for part in reversed(parts) for key, kind in _LAYERS.items() if key in part), None)
    if kind is None:
        return f"losses and the rest, {way}" if way else "optimiser, statistics and copies"
    return f"{kind}, {way or 'forward'}" + next(
        (text for scope, text in _SCOPES.items() if scope in parts), ""
    )


def _sorted(times, calls):
    shares = [Share(name, sum(each) / calls / 1e6, len(each) / calls) for name, each in times.items()]
    return sorted(shares, key=lambda share: -share.milliseconds)
