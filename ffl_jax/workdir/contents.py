"""What a checkpoint holds: in words, to be compared before anything is loaded, and as plain arrays."""

import json
from typing import Any

import jax
import numpy as np

_ABSENT = object()


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


def describe(state: Any) -> dict[str, str]:
    """{path of a leaf: dtype and shape}, such as {"params/head/bias": "float32[10]", "rng": "key<fry>[]"}."""
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"a checkpoint holds arrays only: {name} is a {type(leaf).__name__}.")
        described[name] = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return described


def copies(state: Any) -> Any:
    """The arrays as Orbax takes them from one of several processes, in NumPy; a typed key as its integers."""
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if _is_key(x) else x), state)


def buffers(abstract_state: Any) -> Any:
    """What `copies` would give of such a state, but for the values: for Orbax to fill."""

    def buffer(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        return np.empty(data.shape, data.dtype)

    return jax.tree.map(buffer, abstract_state)


def as_wanted(loaded: Any, abstract_state: Any) -> Any:
    """The state that `loaded` are the `copies` of, on the first device of this process; see `restore`."""

    def wanted(array, leaf):
        if isinstance(leaf, np.ndarray):
            return array
        array = jax.device_put(array, jax.local_devices()[0])
        return jax.random.wrap_key_data(array, impl=_key_impl(leaf)) if _is_key(leaf) else array

    return jax.tree.map(wanted, loaded, abstract_state)


def _is_key(leaf) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf):
    """Of a key that may be there by its shape only, which `key_impl` takes inside a traced function."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]
