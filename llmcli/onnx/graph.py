"""A graph under construction: values, constants and products, by name.

Invariant: names mirror the paths of the model's modules; a constant is stored once, whoever uses it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir

from llmcli.onnx.external import ExternalData
from llmcli.onnx.quantize import BLOCKS, CHANNELS, FLOAT, Plan, Scheme, round_channels
from llmcli.onnx.weights import Array, Matrix

MICROSOFT = "com.microsoft"
_INLINE = 16 << 10  # bytes; smaller constants stand in the graph itself
_QUANTIZED_AT_ONCE = 1 << 26  # elements of a matrix that a quantizer gets at once
# What MatMulNBits computes with (its accuracy_level): activations in int8, row by row and block by block; in float32.
_INT8, _FLOAT32 = 4, 1

_LEVELS = 127  # codes of a row reach so far on either side of ...
_MIDDLE = 128  # ... this one, which stands for 0

Parts = Sequence[tuple[int, Scheme]]  # of a matrix: how many rows, and how they are held


class Rows(NamedTuple):
    """A value in int8 with a scale of its own for each row, so that no row depends on its neighbours."""

    codes: ir.Value  # (..., inputs), uint8
    scales: ir.Value  # (..., 1): what the products of the codes are multiplied with


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """Some rows of a matrix as a product takes them."""

    rows: int
    scheme: Scheme
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    last: bool  # whether no more of the matrix follows


class Graph:
    """Nodes, inputs, outputs and constants. `beside`: a graph over the same data, whose constants are used again."""

    opsets: ClassVar[dict[str, int]] = {"": 21, MICROSOFT: 1}
    ir_version = 10

    def __init__(self, plan: Plan, data: ExternalData, beside: Graph | None = None) -> None:
        self.plan, self.data, self.beside = plan, data, beside
        half = plan.precision == "fp16"
        self.dtype = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
        self.numpy_dtype: Any = np.float16 if half else np.float32
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.matrices: dict[str, tuple[int, int, Scheme]] = {}  # weights, bytes and scheme by name
        self._nodes: list[ir.Node] = []
        self._constants: dict[str, ir.Value] = {}
        self._widths: dict[str, ir.Value] = {}
        self._middles: ir.Value | None = None  # zero points of rows

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A new input of the graph."""
        value = ir.val(name, dtype, list(shape))
        self.inputs.append(value)
        return value

    def optional_input(self, name: str, default: np.ndarray[Any, Any]) -> ir.Value:
        """An input that is a constant where it is not given."""
        value = self.constant(name, default)
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Makes a value an output of the graph."""
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(list(shape))
        self.outputs.append(value)

    def node(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        outputs: int = 1,
        **more: Any,
    ) -> tuple[ir.Value, ...]:
        """Adds a node; its outputs."""
        made = [ir.Value(name=name if index == 0 else f"{name}.{index}") for index in range(outputs)]
        self._nodes.append(ir.node(kind, inputs, more, domain=domain, outputs=made, name=f"{name}/{kind}"))
        return tuple(made)

    def op(self, kind: str, inputs: Sequence[ir.Value | None], name: str, *, domain: str = "", **more: Any) -> ir.Value:
        """Adds a node of one output."""
        return self.node(kind, inputs, name, domain=domain, **more)[0]

    # ------------------------------------------------------------------------------------------------------------
    # Constants

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """A constant of this name, made once."""
        if self._known(name) is None:
            tensor: Any = ir.tensor(array, name=name)
            if array.nbytes > _INLINE:
                tensor = self.data.add(name, [array], array.shape)
            self._hold(name, tensor)
        return self._constants[name]

    def numbers(self, *values: int) -> ir.Value:
        """An int64 vector, such as a shape."""
        return self.constant("numbers." + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: int) -> ir.Value:
        """An int64 number."""
        return self.constant(f"scalar.{value}", np.array(value, np.int64))

    def vector(self, name: str, values: Array) -> ir.Value:
        """A vector in the graph's precision: a norm's weight, a bias."""
        return self.constant(name, values.astype(self.numpy_dtype))

    def _known(self, name: str) -> ir.Value | None:
        """A constant that was made before, here or in the graph beside: names say what is in them."""
        if name not in self._constants and self.beside is not None and name in self.beside._constants:
            self._hold(name, self.beside._constants[name].const_value)
        return self._constants.get(name)

    def _hold(self, name: str, tensor: Any) -> ir.Value:
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._constants[name] = value
        return value

    def _streamed(self, name: str, matrix: Matrix) -> ir.Value:
        """A matrix (outputs, inputs) in the graph's precision, piece by piece."""
        if self._known(name) is None:
            pieces = (piece.astype(self.numpy_dtype, copy=False) for piece in matrix.pieces())
            stored = self._hold(name, self.data.add(name, pieces, matrix.shape))
            self._account(matrix.name, math.prod(matrix.shape), Scheme(FLOAT, 8 * self.numpy_dtype().itemsize), stored)
        return self._constants[name]

    # ------------------------------------------------------------------------------------------------------------
    # Products

    def linear(self, x: ir.Value, matrix: Matrix, bias: Array | None, name: str, *, role: str = "") -> ir.Value:
        """x W^T + bias: (..., inputs) -> (..., outputs), with the operator that the plan says."""
        parts = self.plan.parts(matrix.name, matrix.shape, role)
        scheme = parts[-1][1]
        if scheme.kind == CHANNELS and self.plan.activations == "row":
            return self.row_product(self.rows(x, matrix.shape[1], name), matrix, bias, name)
        added = None if bias is None else self.vector(f"{name}.bias", bias)
        if scheme.kind == BLOCKS:
            floating = self.plan.float_prompts and scheme.bits == 4 and not role  # a head sees one row
            accuracy = _FLOAT32 if floating else _INT8
            return self._block_product(x, matrix, added, parts, name, accuracy)
        if scheme.kind == CHANNELS:
            return self.products(x, [(matrix, bias, name)], name)[0]
        weight = self._streamed(f"{matrix.name}.weight", matrix)
        product = self.op("FusedMatMul", [x, weight], name, domain=MICROSOFT, transB=1)
        return product if added is None else self.op("Add", [product, added], f"{name}.sum")

    def _block_product(
        self, x: ir.Value, matrix: Matrix, bias: ir.Value | None, parts: Parts, name: str, accuracy: int
    ) -> ir.Value:
        """A product for each part of the outputs; of several parts, the bias is none."""
        found = []
        for held in self._quantized(matrix, parts):
            given = [x, held.codes, held.scales, held.zeros, None, bias]
            while given[-1] is None:
                given.pop()
            sizes = {
                "K": matrix.shape[1],
                "N": held.rows,
                "bits": held.scheme.bits,
                "block_size": held.scheme.block_size,
            }
            label = name if held.last else f"{name}.common"
            found.append(self.op("MatMulNBits", given, label, domain=MICROSOFT, **sizes, accuracy_level=accuracy))
        return found[0] if len(found) == 1 else self.op("Concat", found, f"{name}.all", axis=-1)

    def _channels(self, matrix: Matrix) -> tuple[ir.Value, ir.Value, ir.Value]:
        """int8 codes (inputs, outputs), a scale an output and zero points of a matrix, made once."""
        stem = f"{matrix.name}.weight"
        if self._known(f"{stem}.int8") is None:
            found = round_channels(matrix.rows(0, matrix.shape[0]))
            held = [self.constant(f"{stem}.int8", found.data), self.constant(f"{stem}.scale", found.scales)]
            held.append(self.constant(f"{stem}.zero", np.zeros(matrix.shape[0], np.int8)))
            self._account(matrix.name, math.prod(matrix.shape), Scheme(CHANNELS, 8), *held)
        codes, scales, zeros = (self._constants[f"{stem}.{part}"] for part in ("int8", "scale", "zero"))
        return codes, scales, zeros

    def takes_rows(self, matrix: Matrix) -> bool:
        """Whether `linear` quantizes what this matrix is multiplied with row by row, once for the whole product."""
        scheme = self.plan.parts(matrix.name, matrix.shape)[-1][1]
        return scheme.kind == CHANNELS and self.plan.activations == "row"

    def rows(self, x: ir.Value, inputs: int, name: str, times: ir.Value | None = None) -> Rows:
        """x (B, T, inputs) in int8, row by row, as many steps on either side of 0.

        `times`: (B, T, 1), what x is still to be multiplied with. A row of zeros has codes that mean nothing and a
        scale of 0.
        """
        peaks = self.op("ReduceMax", [self.op("Abs", [x], f"{name}.sizes"), self.numbers(-1)], f"{name}.peaks")
        step = self.constant("rows.step", np.array(1 / _LEVELS, np.float32))
        scales = self.op("Mul", [peaks, step], f"{name}.steps")
        if self._middles is None:
            middle = self.constant("rows.middle", np.array(_MIDDLE, np.uint8))
            shape = self.op("Shape", [scales], "rows.shape")  # (B, T, 1), the same for all products
            self._middles = self.op("Expand", [middle, shape], "rows.middles")
        codes = self.op("QuantizeLinear", [x, scales, self._middles], f"{name}.int8", axis=2, block_size=inputs)
        return Rows(codes, scales if times is None else self.op("Mul", [scales, times], f"{name}.scales"))

    def row_product(self, rows: Rows, matrix: Matrix, bias: Array | None, name: str) -> ir.Value:
        """What `linear` gives, of rows that other products may use too. For a matrix that `takes_rows`."""
        product = self.op("Mul", [self.unscaled(rows, matrix, f"{name}.codes"), rows.scales], name)
        return product if bias is None else self.op("Add", [product, self.vector(f"{name}.bias", bias)], f"{name}.sum")

    def unscaled(self, rows: Rows, matrix: Matrix, name: str) -> ir.Value:
        """x W^T but for the scales of x's rows: what follows may take them along."""
        unit, middle = self.constant("rows.unit", np.array(1, np.float32)), self._constants["rows.middle"]
        weight, scale, zero = self._channels(matrix)
        given = [rows.codes, weight, unit, scale, middle, zero]
        return self.op("MatMulIntegerToFloat", given, name, domain=MICROSOFT)

    def shares_inputs(self, matrix: Matrix) -> bool:
        """Whether `products` quantizes what this matrix is multiplied with once for it and its neighbours.

        All rows together then, with one scale.
        """
        return self.plan.parts(matrix.name, matrix.shape)[-1][1].kind == CHANNELS

    def products(self, x: ir.Value, wanted: Sequence[tuple[Matrix, Array | None, str]], name: str) -> list[ir.Value]:
        """x W^T + bias for several matrices, their biases and names: x is quantized once for all that take it so.

        The same as `linear` computes where the plan has one scale for the whole tensor.
        """
        taken: list[ir.Value] = []
        found = []
        for matrix, bias, label in wanted:
            if not self.shares_inputs(matrix):
                found.append(self.linear(x, matrix, bias, label))
                continue
            if not taken:
                taken = list(self.node("DynamicQuantizeLinear", [x], f"{name}.int8", outputs=3))
            weight, scale, zero = self._channels(matrix)
            added = None if bias is None else self.vector(f"{label}.bias", bias)
            given = [taken[0], weight, taken[1], scale, taken[2], zero, added]
            found.append(self.op("MatMulIntegerToFloat", given if added else given[:6], label, domain=MICROSOFT))
        return found

    def embedded(self, ids: ir.Value, matrix: Matrix, name: str) -> ir.Value:
        """The rows of an embedding (vocabulary, C) at the ids."""
        parts = self.plan.parts(matrix.name, matrix.shape, "embedding")
        if parts[-1][1].kind != BLOCKS:
            return self.op("Gather", [self._streamed(f"{matrix.name}.weight", matrix), ids], name)
        held = self._quantized(matrix, parts)
        if len(held) == 1:
            return self._gathered(ids, matrix, held[0], name)
        # Each part gathers a row for every id; those that it has are taken.
        count = self.constant(f"{name}.common.rows", np.array(held[0].rows, np.int64))
        low = self.op("Min", [ids, self.scalar(held[0].rows - 1)], f"{name}.common.ids")
        high = self.op("Max", [self.op("Sub", [ids, count], f"{name}.rest"), self.scalar(0)], f"{name}.rest.ids")
        is_common = self.op(
            "Unsqueeze", [self.op("Less", [ids, count], f"{name}.is_common"), self.numbers(-1)], f"{name}.which"
        )
        rows = [
            self._gathered(low, matrix, held[0], f"{name}.common"),
            self._gathered(high, matrix, held[1], f"{name}.others"),
        ]
        return self.op("Where", [is_common, *rows], name)

    def _gathered(self, ids: ir.Value, matrix: Matrix, held: _Held, name: str) -> ir.Value:
        """Rows of one part: the product's codes under another shape."""
        flat_name, stored = f"{held.codes.name}.rows", held.codes.const_value
        shape = (held.rows, matrix.shape[1] * held.scheme.bits // 8)
        if isinstance(stored, ir.ExternalTensor):
            flat = self._known(flat_name) or self._hold(flat_name, self.data.again(flat_name, stored, shape))
        else:
            assert stored is not None
            flat = self.constant(flat_name, stored.numpy().reshape(shape))
        given = [flat, ids, held.scales] + ([] if held.zeros is None else [held.zeros])
        sizes = {"bits": held.scheme.bits, "block_size": held.scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
        return self.op("GatherBlockQuantized", given, name, domain=MICROSOFT, **sizes)

    def _quantized(self, matrix: Matrix, parts: Parts) -> list[_Held]:
        """Codes, scales and zero points of the parts of a matrix, made once."""
        found, begin, moment = [], 0, None
        for place, (rows, scheme) in enumerate(parts):
            last = place == len(parts) - 1
            name = matrix.name if last else f"{matrix.name}.common"
            stem = f"{name}.weight"
            if self._known(f"{stem}.codes") is None:
                moment = self.plan.moments.get(matrix.name) if moment is None else moment
                pieces = matrix.pieces(_QUANTIZED_AT_ONCE, begin, begin + rows)
                blocks = [self.plan.quantizer.blocks(matrix.name, piece, scheme, moment) for piece in pieces]
                held = [self.constant(f"{stem}.codes", _joined([each.data for each in blocks]))]
                held.append(self.constant(f"{stem}.scales", _stored(_joined([each.scales for each in blocks]))))
                zero_points = [each.zero_points for each in blocks if each.zero_points is not None]
                if zero_points:
                    held.append(self.constant(f"{stem}.zeros", _joined(zero_points)))
                self._account(name, rows * matrix.shape[1], scheme, *held)
            codes, scales, zeros = (self._known(f"{stem}.{part}") for part in ("codes", "scales", "zeros"))
            assert codes is not None
            assert scales is not None
            found.append(_Held(rows, scheme, codes, self._widened(scales), zeros, last))
            begin += rows
        return found

    def _widened(self, scales: ir.Value) -> ir.Value:
        """Scales in the graph's precision: a product takes no other. onnxruntime casts a constant once, at load."""
        assert scales.name is not None
        if scales.dtype == self.dtype:
            return scales
        if scales.name not in self._widths:
            self._widths[scales.name] = self.op("Cast", [scales], f"{scales.name}.wide", to=self.dtype)
        return self._widths[scales.name]

    def _account(self, name: str, weights: int, scheme: Scheme, *held: ir.Value) -> None:
        size = sum(value.const_value.nbytes for value in held if value.const_value is not None)
        self.matrices[name] = (weights, size, scheme)

    # ------------------------------------------------------------------------------------------------------------

    def model(self, name: str, metadata: dict[str, str], version: str) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self._nodes,
            # Codes that are only gathered are known to the graph by the name of their rows alone.
            initializers=[value for value in self._constants.values() if value.uses() or value in self.inputs],
            opset_imports=dict(self.opsets),
            name=name,
        )
        model = ir.Model(graph, ir_version=self.ir_version, producer_name="llmcli", producer_version=version)
        model.metadata_props.update(metadata)
        return model


def _stored(scales: Array) -> Any:
    """Scales in float16 where nothing is lost."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scales) else scales


def _joined(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
