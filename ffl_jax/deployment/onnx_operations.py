"""From a folded program to an ONNX model: an operation for each of JAX's that networks and methods use.

What a convolution's output is multiplied by and added to, channel by channel, goes into its kernel and bias,
batch norms above all.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

import jax
import numpy as np
import onnx
from jax.extend import core

from ffl_jax.deployment.onnx_graph import TO_FIRST, Convolution, Graph, Value
from ffl_jax.errors import ConfigError

OPSET = 17
_AXES = {0: 0, 1: 2, 2: 3, 3: 1}  # of a map, and where they are once channels come first
_SAME = ("stop_gradient", "copy", "copy_p")
_ELEMENTWISE = {
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow"},
    **{"exp": "Exp", "log": "Log", "logistic": "Sigmoid", "tanh": "Tanh", "neg": "Neg", "sqrt": "Sqrt"},
    **{"lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual", "eq": "Equal"},
    "abs": "Abs",
}
_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


def convert(function: Callable, image_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """A model with the input `images`, uint8 [batch, H, W, 3], and the output `logits`, float32 [batch, C].

    Args: function: of `folding.fold`.

    Raises:
      ConfigError: it has an operation that is not known here.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *image_shape), np.uint8))
    graph = _Operations(closed)
    (logits,) = closed.jaxpr.outvars
    graph.add("Identity", [graph.take(logits)], name="logits")
    info = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        graph.nodes,
        "ffl_jax",
        [info("images", onnx.TensorProto.UINT8, ["batch", *image_shape])],
        [info("logits", onnx.TensorProto.FLOAT, ["batch", logits.aval.shape[1]])],
        graph.initializers,
    )
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


class _Operations(Graph):
    """Methods called `_on_NAME` turn JAX's operation NAME into nodes."""

    def __init__(self, closed):
        (images,) = closed.jaxpr.invars
        constants = zip(closed.jaxpr.constvars, map(np.asarray, closed.consts), strict=True)
        super().__init__({**dict(constants), images: Value("images")})
        atoms = [atom for equation in closed.jaxpr.eqns for atom in equation.invars]
        self._uses = Counter(a for a in (*atoms, *closed.jaxpr.outvars) if not isinstance(a, core.Literal))
        for equation in closed.jaxpr.eqns:
            name = equation.primitive.name
            kind = "elementwise" if name in _ELEMENTWISE else "reduce" if name in _REDUCTIONS else name
            convert = self._same if name in _SAME else getattr(self, f"_on_{kind}", None)
            if convert is None:
                raise ConfigError(
                    f"--format=onnx: JAX's operation {name} has no translation here; export with "
                    "--format=stablehlo."
                )
            results = convert(equation)
            results = results if isinstance(results, list) else [results]
            self.values.update(zip(equation.outvars, results, strict=True))

    def _same(self, equation):
        return self.value(equation.invars[0])

    # -- one element after another -------------------------------------------------------------------------

    def _on_elementwise(self, equation):
        name, atoms = equation.primitive.name, equation.invars
        if (absorbed := self._absorbed(name, atoms)) is not None:
            return absorbed
        if name == "max" and isinstance(atoms[1], core.Literal) and atoms[1].val == 0:
            return self._each("Relu", atoms[:1])
        return self._each(_ELEMENTWISE[name], atoms)

    def _each(self, op, atoms, *further, **attributes) -> Value:
        """A node whose operands, and whose result, have their channels at the same place."""
        first = self.first(atoms)
        return Value(
            self.add(op, [*(self.take(atom, first) for atom in atoms), *further], **attributes), first
        )

    def _absorbed(self, name, atoms) -> Convolution | None:
        """The convolution before, if it is used nowhere else, with a constant for each channel taken in."""
        one, other = (self.value(atom) for atom in (*atoms, *atoms)[:2])
        if name in ("add", "mul") and isinstance(other, Convolution):
            (other, one), atoms = (one, other), atoms[::-1]
        if not isinstance(one, Convolution) or not isinstance(other, np.ndarray) or self._uses[atoms[0]] > 1:
            return None
        for_each_channel = other.size in (1, len(one.bias)) and other.shape[-1:] in ((), (other.size,))
        if name not in ("add", "sub", "mul", "div") or not for_each_channel:
            return None
        each = np.broadcast_to(np.float64(other).reshape(-1), one.bias.shape)
        if name in ("add", "sub"):
            return dataclasses.replace(one, bias=one.bias + (each if name == "add" else -each))
        each = each if name == "mul" else 1 / each
        return dataclasses.replace(one, kernel=one.kernel * each[:, None, None, None], bias=one.bias * each)

    def _on_convert_element_type(self, equation):
        return self._each("Cast", equation.invars, to=_type(equation.params["new_dtype"]))

    def _on_integer_pow(self, equation):
        exponent = np.array(equation.params["y"], equation.invars[0].aval.dtype)
        return self._each("Pow", equation.invars, self.constant(exponent))

    def _on_square(self, equation):
        return self._each("Mul", equation.invars * 2)

    def _on_select_n(self, equation):
        condition, otherwise, chosen = equation.invars
        return self._each("Where", [condition, chosen, otherwise])

    def _on_is_finite(self, equation):
        nan, infinite = (self._each(op, equation.invars) for op in ("IsNaN", "IsInf"))
        either = self.add("Or", [nan.name, infinite.name])
        return Value(self.add("Not", [either]), nan.first)

    # -- maps ----------------------------------------------------------------------------------------------

    def _on_conv_general_dilated(self, equation):
        params, (image, kernel) = equation.params, equation.invars
        numbers = params["dimension_numbers"]
        _require(tuple(numbers) == (TO_FIRST, (3, 2, 0, 1), TO_FIRST), equation)
        _require(set(params["lhs_dilation"]) == {1} and params["batch_group_count"] == 1, equation)
        kernel = self.value(kernel)
        _require(isinstance(kernel, np.ndarray), equation)
        kernel = np.float64(kernel).transpose(3, 2, 0, 1)
        attributes = {
            "strides": params["window_strides"],
            "pads": _pads(params["padding"]),
            "dilations": params["rhs_dilation"],
            "group": params["feature_group_count"],
            "kernel_shape": kernel.shape[2:],
        }
        return Convolution(self.take(image, first=True), kernel, np.zeros(len(kernel)), attributes)

    def _pool(self, equation, op, **attributes):
        params, (atom,) = equation.params, equation.invars
        window, strides, padding = (
            params[key][1:3] for key in ("window_dimensions", "window_strides", "padding")
        )
        of_maps = len(atom.aval.shape) == 4 and params["window_dimensions"][::3] == (1, 1)
        _require(of_maps and {*params["base_dilation"], *params["window_dilation"]} == {1}, equation)
        attributes |= {"kernel_shape": window, "strides": strides, "pads": _pads(padding)}
        return self.add(op, [self.take(atom, first=True)], **attributes)

    def _on_reduce_window_max(self, equation):
        return Value(self._pool(equation, "MaxPool"), True)

    def _on_reduce_window_sum(self, equation):
        mean = self._pool(equation, "AveragePool", count_include_pad=1)
        size = np.prod(equation.params["window_dimensions"]).astype(np.float32)
        return Value(self.add("Mul", [mean, self.constant(size)]), True)

    # -- shapes and axes -----------------------------------------------------------------------------------

    def _on_reduce(self, equation):
        (atom,), axes = equation.invars, tuple(equation.params["axes"])
        # The axes that are left stand in the same order either way.
        first = self.first([atom]) and axes in ((1, 2), (3,), (1, 2, 3))
        axes, value = sorted(_AXES[axis] if first else axis for axis in axes), self.take(atom, first)
        op = _REDUCTIONS[equation.primitive.name]
        if op == "ReduceSum":
            return Value(self.add(op, [value, self.constant(np.int64(axes))], keepdims=0))
        return Value(self.add(op, [value], axes=axes, keepdims=0))

    def _on_argmax(self, equation):
        (atom,), (axis,) = equation.invars, equation.params["axes"]
        found = self.add("ArgMax", [self.take(atom)], axis=axis, keepdims=0)
        return Value(self.add("Cast", [found], to=_type(equation.params["index_dtype"])))

    def _on_concatenate(self, equation):
        axis = equation.params["dimension"]
        axis = _AXES[axis] if self.first(equation.invars) else axis
        return self._each("Concat", equation.invars, axis=axis)

    def _on_split(self, equation):
        first, axis = self.first(equation.invars), equation.params["axis"]
        sizes = self.constant(np.int64(equation.params["sizes"]))
        inputs, axis = [self.take(equation.invars[0], first), sizes], _AXES[axis] if first else axis
        names = self.add("Split", inputs, len(equation.outvars), axis=axis)
        return [Value(name, first) for name in names]

    def _on_stack(self, equation):
        axis = equation.params["axis"]
        where = self.constant(np.int64([axis]))
        parts = [self.add("Unsqueeze", [self.take(atom), where]) for atom in equation.invars]
        return Value(self.add("Concat", parts, axis=axis))

    def _on_transpose(self, equation):
        return Value(
            self.add("Transpose", [self.take(equation.invars[0])], perm=equation.params["permutation"])
        )

    def _on_reshape(self, equation):
        return self._reshaped(equation, equation.invars[0], equation.outvars[0].aval.shape)

    _on_squeeze = _on_expand_dims = _on_reshape

    def _reshaped(self, equation, atom, shape):
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        _require(sizes.count(-1) <= 1, equation)  # ONNX finds out one size, that with the batch
        return Value(self.add("Reshape", [self.take(atom), self.constant(np.int64(sizes))]))

    def _on_broadcast_in_dim(self, equation):
        (atom,), shape = equation.invars, equation.params["shape"]
        places = dict(zip(equation.params["broadcast_dimensions"], atom.aval.shape, strict=True))
        aligned = self._reshaped(equation, atom, [places.get(axis, 1) for axis in range(len(shape))])
        spread = {axis: n for axis, n in enumerate(shape) if places.get(axis, 1) != n}
        if not spread:
            return aligned
        if not all(isinstance(n, int) for n in spread.values()):
            # Over the batch, whose size is not known: only what stands beside whole batches, which spread it.
            _require(atom.aval.size == 1, equation)
            return aligned
        sizes = self.constant(np.int64([spread.get(axis, 1) for axis in range(len(shape))]))
        return Value(self.add("Expand", [aligned.name, sizes]))

    def _on_slice(self, equation):
        (atom,), params = equation.invars, equation.params
        steps = params["strides"] or (1,) * len(atom.aval.shape)
        cuts = [
            (axis, *cut)
            for axis, cut in enumerate(
                zip(params["start_indices"], params["limit_indices"], steps, strict=True)
            )
            if cut != (0, atom.aval.shape[axis], 1)
        ]
        axes, starts, stops, steps = (self.constant(np.int64(x)) for x in zip(*cuts, strict=True))
        return Value(self.add("Slice", [self.take(atom), starts, stops, axes, steps]))

    def _on_gather(self, equation):
        (atom, indices), numbers = equation.invars, equation.params["dimension_numbers"]
        _require(numbers.collapsed_slice_dims == numbers.start_index_map, equation)
        _require(len(numbers.start_index_map) == 1, equation)
        (axis,) = numbers.start_index_map
        if numbers.operand_batching_dims:  # `take_along_axis`
            _require(len(numbers.operand_batching_dims) == len(atom.aval.shape) - 1, equation)
            places = self._reshaped(equation, indices, indices.aval.shape[:-1])
            return Value(self.add("GatherElements", [self.take(atom), places.name], axis=axis))
        whole = list(atom.aval.shape)
        whole[axis] = 1
        place = self.value(indices)  # `x[:, 0]`
        _require(list(equation.params["slice_sizes"]) == whole and isinstance(place, np.ndarray), equation)
        _require(place.size == 1, equation)
        return Value(
            self.add("Gather", [self.take(atom), self.constant(np.int64(place).reshape(()))], axis=axis)
        )

    def _on_dot_general(self, equation):
        (contracted, batched), (left, right) = equation.params["dimension_numbers"], equation.invars
        inputs = [self.take(left), self.take(right)]
        if len(left.aval.shape) == len(right.aval.shape) == 2 and contracted == ((1,), (0,)):
            return Value(self.add("MatMul", inputs))
        letters = iter("abcdefghijklmnop")
        names = [[None] * len(atom.aval.shape) for atom in (left, right)]
        for axes in (*zip(*batched, strict=True), *zip(*contracted, strict=True)):
            letter = next(letters)
            for k, axis in enumerate(axes):
                names[k][axis] = letter
        shared = [names[0][axis] for axis in batched[0]]
        names = [[letter or next(letters) for letter in one] for one in names]
        gone = {names[0][axis] for axis in contracted[0]} | set(shared)
        result = [*shared, *(letter for one in names for letter in one if letter not in gone)]
        return Value(
            self.add("Einsum", inputs, equation=f"{','.join(map(''.join, names))}->{''.join(result)}")
        )


def _require(condition, equation):
    if not condition:
        raise ConfigError(
            f"--format=onnx: JAX's operation {equation.primitive.name} is used in a way that has no "
            "translation here; export with --format=stablehlo."
        )


def _type(dtype) -> int:
    """ONNX's number of a type."""
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _pads(padding) -> list[int]:
    """((before, after) of rows, of columns) in ONNX's order."""
    return [int(pair[k]) for k in range(2) for pair in padding]
