"""An ONNX graph that grows: tensors, constants, and where the channels of a map stand.

Maps are [B, H, W, D] in JAX and [B, D, H, W] in ONNX, whose convolutions know nothing else. A map stays in
the order that it came in until an operation needs the other one.
"""

import dataclasses

import numpy as np
import onnx
from jax.extend import core

TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


@dataclasses.dataclass
class Value:
    """A tensor of the graph; `first`: whether it is a map whose channels come first."""

    name: str
    first: bool = False


@dataclasses.dataclass
class Convolution:
    """One that is not in the graph yet, in float64: what follows may still change kernel and bias."""

    image: str
    kernel: np.ndarray
    bias: np.ndarray
    attributes: dict


class Graph:
    """Nodes and constants so far.

    Attributes:
      nodes, initializers: of ONNX.
      values: {variable of the program: `Value`, `Convolution`, or a constant as an array}.
    """

    def __init__(self, values: dict):
        self.nodes, self.initializers, self.values = [], [], values

    def add(self, op: str, inputs: list[str], outputs: int = 1, name: str = "", **attributes):
        """Appends a node; returns the names of its outputs, alone if it is one."""
        names = [name] if name else [f"{op.lower()}_{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(onnx.helper.make_node(op, inputs, names, **attributes))
        return names[0] if len(names) == 1 else names

    def constant(self, array) -> str:
        """The name of a new constant."""
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def take(self, atom, first: bool = False) -> str:
        """The name of what an atom stands for, with channels first or last where it is a map."""
        value, is_map = self.value(atom), len(atom.aval.shape) == 4
        if isinstance(value, np.ndarray):
            return self.constant(value.transpose(TO_FIRST) if first and is_map else value)
        if isinstance(value, Convolution):
            value = self.values[atom] = self._emit(value)
        if not is_map or value.first == first:
            return value.name
        # Kept: each of the others that use it would turn it again.
        name = self.add("Transpose", [value.name], perm=TO_FIRST if first else TO_LAST)
        self.values[atom] = Value(name, first)
        return name

    def value(self, atom) -> Value | Convolution | np.ndarray:
        """What an atom, a variable or a literal, stands for so far."""
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else self.values[atom]

    def first(self, atoms) -> bool:
        """Whether channels come first in one of them, so that the others should follow."""
        values = [self.value(atom) for atom in atoms if len(atom.aval.shape) == 4]
        return any(isinstance(x, Convolution) or (isinstance(x, Value) and x.first) for x in values)

    def _emit(self, one: Convolution) -> Value:
        inputs = [one.image, self.constant(np.float32(one.kernel)), self.constant(np.float32(one.bias))]
        return Value(self.add("Conv", inputs, **one.attributes), True)
