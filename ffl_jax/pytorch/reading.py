"""What files of PyTorch weights hold: read without running anything, and told apart.

A file is read as {"GROUP/NAME": array}; groups are the dictionaries that it nests ("state_dict", "weight"),
or what stands before the last "/" of a name ("final/net"). A group with running statistics is a state dict.
"""

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ffl_jax.errors import CheckpointError, ConfigError, FFLError


def read(path: str | Path, given: str = "--input") -> dict[str, np.ndarray]:
    """All arrays of a file, {"GROUP/NAME": array}; nothing in it is run. `given` names it, for errors."""
    path = Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    readers |= dict.fromkeys((".pth", ".pt", ".tar"), _read_pytorch)
    if path.suffix not in readers:
        raise ConfigError(f"{given}={path}: give a file that ends in one of {', '.join(readers)}.")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: name the published weights with {given}.")
    try:
        return readers[path.suffix](path)
    except (FFLError, PermissionError):
        raise
    except Exception as error:  # zipfile, zlib, pickle, safetensors and PyTorch have a dozen types
        reason = str(error).strip().split("\n")[0].rstrip(".")
        if " " not in reason:  # a key that was looked up, or nothing
            reason = f"{type(error).__name__} {reason}".strip()
        raise CheckpointError(f"{path} cannot be read: {reason}; download it again.") from error


def _read_npz(path):
    # NumPy would take another file for a pickle, and tell how to load that all the same.
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a whole .npz archive")
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive.items())


def _read_safetensors(path):
    from safetensors.numpy import load_file

    return load_file(path)


def _read_pytorch(path):
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"{path} can only be read with PyTorch, which is not installed: `pip install torch`, or convert "
            "the file to .npz or .safetensors where it is."
        ) from None
    arrays = {}

    def collect(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}/{key}" if prefix else str(key), inner)
        elif isinstance(value, torch.Tensor):
            value = value.detach()
            # NumPy knows no bfloat16.
            arrays[prefix] = (value.float() if value.is_floating_point() else value).numpy()

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than weights, and a pickle of anything could run any program: "
            "where you trust it, save the network's state_dict() alone."
        ) from error
    collect("", content)
    return arrays


def state_dicts(paths: Sequence[str | Path], state: str = "") -> dict[str, dict[str, np.ndarray]]:
    """{"FILE" or "FILE:GROUP": {name: array}} of all state dicts, or of those in the group `state`.

    Raises:
      CheckpointError: a file is missing or damaged.
      ConfigError: a file's ending is not known, PyTorch is needed and missing, or there is no such group.
    """
    found, known = {}, set()
    for path in paths:
        for group, entries in groups(read(path)).items():
            known.add(group)
            if not state or f"{group}/".startswith(f"{state}/"):
                found[f"{path}:{group}".rstrip(":")] = entries
    if state and not found:
        raise ConfigError(f"--state={state}: there is no such group; there are: {', '.join(sorted(known))}.")
    # Gradients and moments have names like parameters, but no running statistics.
    return {
        where: entries
        for where, entries in found.items()
        if any(x.endswith(".running_mean") for x in entries)
    }


def groups(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{group: {name: array}} of what `read` gives; what only PyTorch counts is left out."""
    found = {}
    for name, value in arrays.items():
        group, _, entry = name.rpartition("/")
        if not entry.endswith("num_batches_tracked"):
            found.setdefault(group, {})[entry] = value
    for group, entries in found.items():
        if all(name.startswith("module.") for name in entries):  # written from within DataParallel
            found[group] = {name.removeprefix("module."): value for name, value in entries.items()}
    return found


def pick(found: dict[str, dict], what: str, *patterns: str) -> tuple[str, dict[str, np.ndarray]]:
    """(where, state dict) of the only one that has names beginning with each of the patterns.

    Args:
      found: from `state_dicts`.
      what: which one is wanted, for errors.
      *patterns: regular expressions.

    Raises:
      CheckpointError: there is none.
      ConfigError: there is more than one.
    """
    fitting = [
        where
        for where, entries in found.items()
        if all(any(re.match(pattern, name) for name in entries) for pattern in patterns)
    ]
    if not fitting:
        raise CheckpointError(f"--input has no {what}, but {', '.join(found) or 'no state dict at all'}.")
    if len(fitting) > 1:
        raise ConfigError(
            f"--input has more than one {what}: {', '.join(fitting)}; give one file, and choose one of its "
            "groups, named after the colon, with --state=GROUP."
        )
    return fitting[0], found[fitting[0]]
