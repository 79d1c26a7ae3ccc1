"""Where a parameter of a sub-network lies: below its head or in it, and how far from it."""

import collections
import math
import re
from collections.abc import Iterable
from typing import Any

import jax

from ffl_jax.errors import ConfigError

_LAYER = re.compile(r"stem\w*|stage(\d+)(?:_(\w+?)(\d*))?")


def body(params) -> Any:
    """A tree like a method's parameters that says of each whether it is in a sub-network below its head."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_body(_keys(path)), params)


def depths(params) -> Any:
    """A tree like a method's parameters: of a sub-network's, how far it is from the head; 0 for all others.

    The last block has 1, the first of n, over trunk and branch, has n, and the stem n + 1, as for the layer
    decay of BEiT and timm. Blocks are what is numbered in a stage (`stage2_block3`), or a stage that numbers
    nothing. What leads to a stage (`stage2_halving_norm`) counts with its first block, what ends it
    (`stage4_norm`) with its last.

    Raises:
      ConfigError: layers of a network are called otherwise.
    """
    paths = [_keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    layers = collections.defaultdict(set)
    for keys in filter(_is_body, paths):
        layers[_of(keys)].add(keys[2])
    found = {network: _layer_depths(some) for network, some in layers.items()}

    def depth(path, _):
        keys = _keys(path)
        return found[_of(keys)][keys[2]] if _is_body(keys) else 0

    return jax.tree_util.tree_map_with_path(depth, params)


def _keys(path):
    return [key.key for key in path]


def _is_body(keys):
    return keys[0] == "subnetworks" and not keys[2].endswith("head")


def _of(keys):
    """The network of a parameter; trunk and branches are one."""
    return keys[1] if keys[1].startswith("networks_") else "copies"


def _layer_depths(layers: Iterable[str]) -> dict[str, int]:
    """{layer: see `depths`} of one network."""
    places, numbers = {}, collections.defaultdict(set)  # numbers of each stage
    for layer in layers:
        match = _LAYER.fullmatch(layer)
        if match is None:
            raise ConfigError(
                "config.optimizer.layer_decay counts layers that are called stem…, stageN… and …head, but a "
                f"network has {layer!r}: rename it, or set layer_decay to 1."
            )
        stage, kind, number = match.groups()
        leads = "_" in (kind or "")  # such a layer's name says what it is for, and what it is
        places[layer] = int(stage or 0), int(number) if number else -math.inf if leads else math.inf
        if number:
            numbers[int(stage)].add(int(number))
    for layer, (stage, number) in places.items():
        known = numbers[stage] or {0}
        places[layer] = stage, min(max(number, min(known)), max(known))
    units = sorted({place for place in places.values() if place[0]}, reverse=True)
    powers = {place: power for power, place in enumerate(units, start=1)}
    return {layer: powers.get(place, len(units) + 1) for layer, place in places.items()}
