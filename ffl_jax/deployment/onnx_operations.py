"""From a folded program to an ONNX model: an operation for each of JAX's that networks and methods use.

What the output of a convolution or a matrix product is multiplied by and added to, channel by channel, goes
into its kernel and bias, batch norms above all.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable

import jax
import numpy as np
import onnx
from jax.extend import core

from ffl_jax import __version__
from ffl_jax.deployment.onnx_graph import TO_FIRST, TO_LAST, Affine, Graph, Value
from ffl_jax.errors import ConfigError

_AXES = {0: 0, 1: 2, 2: 3, 3: 1}  # of a map, and where they are once channels come first
_SAME = ("stop_gradient", "copy", "copy_p")
_ELEMENTWISE = {
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow"},
    **{"exp": "Exp", "log": "Log", "logistic": "Sigmoid", "tanh": "Tanh", "neg": "Neg", "sqrt": "Sqrt"},
    **{"lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual", "eq": "Equal"},
    "abs": "Abs",
}
_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


def convert(
    function: Callable, image_shape: tuple[int, int, int], dtype: str = "uint8", opset: int = 17
) -> onnx.ModelProto:
    """A model with the input `images`, [batch, *image_shape], and the output `logits`, float32 [batch, C].

    Args:
      function: of `folding.fold`.
      dtype: of the images.
      opset: one of `onnx.OPSETS`.

    Raises:
      ConfigError: it has an operation that is not known here.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *image_shape), dtype))
    graph = _Operations(closed, opset)
    (logits,) = closed.jaxpr.outvars
    graph.add("Identity", [graph.take(logits)], name="logits")
    info = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        graph.nodes,
        "ffl_jax",
        [info("images", _type(dtype), ["batch", *image_shape])],
        [info("logits", onnx.TensorProto.FLOAT, ["batch", logits.aval.shape[1]])],
        graph.initializers,
    )
    opsets = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(
        made,
        producer_name="ffl_jax",
        producer_version=__version__,
        opset_imports=opsets,
        ir_version=onnx.helper.find_min_ir_version_for(opsets),
    )
    onnx.checker.check_model(model, full_check=True)
    return model


class _Operations(Graph):
    """Methods called `_on_NAME` turn JAX's operation NAME into nodes."""

    def __init__(self, closed, opset: int):
        (images,) = closed.jaxpr.invars
        constants = zip(closed.jaxpr.constvars, map(np.asarray, closed.consts), strict=True)
        super().__init__({**dict(constants), images: Value("images")})
        self._opset, modules = opset, {images: "images"}
        uses = [(a, equation.primitive.name) for equation in closed.jaxpr.eqns for a in equation.invars]
        self._uses = defaultdict(list)  # of a variable, by which operations
        for atom, name in (*uses, *((a, "output") for a in closed.jaxpr.outvars)):
            if not isinstance(atom, core.Literal):
                self._uses[atom].append(name)
        for equation in closed.jaxpr.eqns:
            name = equation.primitive.name
            kind = "elementwise" if name in _ELEMENTWISE else "reduce" if name in _REDUCTIONS else name
            convert = self._same if name in _SAME else getattr(self, f"_on_{kind}", None)
            if convert is None:
                raise ConfigError(
                    f"--format=onnx: JAX's operation {name} has no translation here; export with "
                    "--format=stablehlo."
                )
            inherited = (modules.get(a, "") for a in equation.invars if not isinstance(a, core.Literal))
            self.module = str(equation.source_info.name_stack) or next(filter(None, inherited), "")
            modules |= dict.fromkeys(equation.outvars, self.module)
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

    def _absorbed(self, name, atoms) -> Affine | Value | None:
        """The operation before, if it is used nowhere else, with a constant for each channel taken in."""
        one, other = (self.value(atom) for atom in (*atoms, *atoms)[:2])
        if name in ("add", "mul") and isinstance(one, np.ndarray):
            (other, one), atoms = (one, other), atoms[::-1]
        if isinstance(one, np.ndarray) or not isinstance(other, np.ndarray) or len(self._uses[atoms[0]]) > 1:
            return None
        if isinstance(one, Value):
            return self._scaled(name, one, other)
        for_each_channel = other.size in (1, len(one.bias)) and other.shape[-1:] in ((), (other.size,))
        if name not in ("add", "sub", "mul", "div") or not for_each_channel:
            return None
        each = np.broadcast_to(np.float64(other).reshape(-1), one.bias.shape)
        if name in ("add", "sub"):
            return dataclasses.replace(one, bias=one.bias + (each if name == "add" else -each))
        each = each if name == "mul" else 1 / each
        return dataclasses.replace(one, kernel=(one.kernel.T * each).T, bias=one.bias * each)

    def _scaled(self, name, one, other) -> Value | None:
        """A mean that is to become a sum, and then a mean again."""
        if one.factor == 1 or other.size > 1 or name not in ("mul", "div"):
            return None
        each = float(other.reshape(()))
        return dataclasses.replace(one, factor=one.factor * each if name == "mul" else one.factor / each)

    def _on_convert_element_type(self, equation):
        (atom,), dtype = equation.invars, equation.params["new_dtype"]
        floating = _floating(atom.aval.dtype) and _floating(dtype)
        if isinstance(self.value(atom), Affine) and len(self._uses[atom]) == 1 and floating:
            return self.value(atom)  # cast as it is taken, if it still has to be
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

    def _on_rsqrt(self, equation):
        root = self._each("Sqrt", equation.invars)
        return Value(self.add("Reciprocal", [root.name]), root.first)

    def _on_erfc(self, equation):
        erf, one = self._each("Erf", equation.invars), np.ones((), equation.invars[0].aval.dtype)
        return Value(self.add("Sub", [self.constant(one), erf.name]), erf.first)

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
        return self._affine("Conv", self.take(image, first=True), equation, kernel, attributes)

    def _affine(self, op, image, equation, kernel, attributes) -> Affine:
        dtype = equation.invars[0].aval.dtype
        return Affine(op, self.module, image, dtype, kernel, np.zeros(len(kernel)), attributes)

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
        return Value(mean, True, math.prod(equation.params["window_dimensions"]))

    # -- shapes and axes -----------------------------------------------------------------------------------

    def _on_reduce(self, equation):
        (atom,), axes = equation.invars, tuple(equation.params["axes"])
        # The axes that are left stand in the same order either way.
        first = self.first([atom]) and axes in ((1, 2), (3,), (1, 2, 3))
        sizes = [atom.aval.shape[axis] for axis in axes]
        axes, value = sorted(_AXES[axis] if first else axis for axis in axes), self.take(atom, first)
        op, factor = _REDUCTIONS[equation.primitive.name], 1
        to_be_divided = self._uses[equation.outvars[0]] == ["div"] and _floating(atom.aval.dtype)
        if op == "ReduceSum" and to_be_divided and all(isinstance(n, int) for n in sizes):
            op, factor = "ReduceMean", math.prod(sizes)  # which most sums become
        if self._opset < 18 and op != "ReduceSum":
            return Value(self.add(op, [value], axes=axes, keepdims=0), factor=factor)
        return Value(self.add(op, [value, self.constant(np.int64(axes))], keepdims=0), factor=factor)

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
        (atom,), order = equation.invars, tuple(equation.params["permutation"])
        value, same = self.value(atom), ((TO_LAST, False), (TO_FIRST, True))
        if isinstance(value, Value) and (order, value.first) in same:  # as it is, by another name
            return dataclasses.replace(value, first=not value.first)
        return Value(self.add("Transpose", [self.take(atom)], perm=order))

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
        sizes = [spread.get(axis, 1) for axis in range(len(shape))]
        if all(isinstance(n, int) for n in sizes):
            return Value(self.add("Expand", [aligned.name, self.constant(np.int64(sizes))]))
        if atom.aval.size == 1:  # whole batches that it stands beside spread it
            return aligned
        batch = self.add("Gather", [self.add("Shape", ["images"]), self.constant(np.int64([0]))])
        parts = [self.constant(np.int64([n])) if isinstance(n, int) else batch for n in sizes]
        return Value(self.add("Expand", [aligned.name, self.add("Concat", parts, axis=0)]))

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
        rank, kernel = len(left.aval.shape), self.value(right)
        if len(right.aval.shape) == 2 and contracted == ((rank - 1,), (0,)) and not batched[0]:
            if rank == 2 and isinstance(kernel, np.ndarray):
                kernel = np.float64(kernel).T
                return self._affine("Gemm", self.take(left), equation, kernel, {"transB": 1})
            return Value(self.add("MatMul", [self.take(left), self.take(right)]))
        inputs = [self.take(left), self.take(right)]
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


def _floating(dtype) -> bool:
    return np.issubdtype(dtype, np.floating)


def _type(dtype) -> int:
    """ONNX's number of a type."""
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _pads(padding) -> list[int]:
    """((before, after) of rows, of columns) in ONNX's order."""
    return [int(pair[k]) for k in range(2) for pair in padding]
