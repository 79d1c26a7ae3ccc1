"""An ONNX graph that grows: tensors, constants, their names, and where the channels of a map stand.

Maps are [B, H, W, D] in JAX and [B, D, H, W] in ONNX, whose convolutions know nothing else. A map stays in
the order that it came in until an operation needs the other one.
"""

import dataclasses
from collections import Counter

import numpy as np
import onnx
from jax.extend import core

TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


@dataclasses.dataclass
class Value:
    """A tensor of the graph.

    Attributes:
      first: whether it is a map whose channels come first.
      factor: what it is still to be multiplied by.
    """

    name: str
    first: bool = False
    factor: float = 1.0


@dataclasses.dataclass
class Affine:
    """A convolution or a matrix product that is not in the graph yet: what follows may change it still.

    Attributes:
      op: Conv or Gemm.
      module: the path of its own.
      image: name of its input.
      dtype: of that, in which it is computed.
      kernel, bias: float64, output channels first.
      attributes: of the node.
    """

    op: str
    module: str
    image: str
    dtype: np.dtype
    kernel: np.ndarray
    bias: np.ndarray
    attributes: dict


class Graph:
    """Nodes and constants so far.

    A node, its output and its constants are called by the path of the module whose parameters were used last
    before it.

    Attributes:
      nodes, initializers: of ONNX.
      values: {variable of the program: `Value`, `Affine`, or a constant as an array}.
      module: path of the module where the graph grows.
    """

    def __init__(self, values: dict):
        self.nodes, self.initializers, self.values, self.module = [], [], values, ""
        self._names = Counter()

    def add(self, op: str, inputs: list[str], outputs: int = 1, name: str = "", **attributes):
        """Appends a node; returns the names of its outputs, alone if it is one."""
        name = name or self._name(op)
        names = [name] if outputs == 1 else [f"{name}_output_{k}" for k in range(outputs)]
        self.nodes.append(onnx.helper.make_node(op, inputs, names, name, **attributes))
        return names[0] if len(names) == 1 else names

    def constant(self, array, name: str = "constant") -> str:
        """The name of a new constant."""
        name = self._name(name)
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def _name(self, what: str) -> str:
        name = f"{self.module}/{what}".removeprefix("/")
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name] - 1}"

    def take(self, atom, first: bool = False) -> str:
        """The name of what an atom stands for, with channels first or last where it is a map."""
        value, is_map = self.value(atom), len(atom.aval.shape) == 4
        if isinstance(value, np.ndarray):
            return self.constant(value.transpose(TO_FIRST) if first and is_map else value)
        if isinstance(value, Affine) or value.factor != 1:
            value = self.values[atom] = self._emit(value, atom.aval.dtype)
        if not is_map or value.first == first:
            return value.name
        # Kept: each of the others that use it would turn it again.
        name = self.add("Transpose", [value.name], perm=TO_FIRST if first else TO_LAST)
        self.values[atom] = Value(name, first)
        return name

    def value(self, atom) -> Value | Affine | np.ndarray:
        """What an atom, a variable or a literal, stands for so far."""
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else self.values[atom]

    def first(self, atoms) -> bool:
        """Whether channels come first in one of them, so that the others should follow."""
        values = [self.value(atom) for atom in atoms if len(atom.aval.shape) == 4]
        return any(isinstance(x, Affine) or (isinstance(x, Value) and x.first) for x in values)

    def _emit(self, one: Affine | Value, dtype) -> Value:
        """Args: dtype: of the program's variable."""
        if isinstance(one, Value):
            return Value(self.add("Mul", [one.name, self.constant(dtype.type(one.factor))]), one.first)
        here, self.module = self.module, one.module
        kernel, bias = one.kernel.astype(one.dtype), one.bias.astype(one.dtype)
        inputs = [one.image, self.constant(kernel, "kernel"), self.constant(bias, "bias")]
        name = self.add(one.op, inputs, **one.attributes)
        if dtype != one.dtype:
            name = self.add("Cast", [name], to=onnx.helper.np_dtype_to_tensor_dtype(dtype))
        self.module = here
        return Value(name, one.op == "Conv")
