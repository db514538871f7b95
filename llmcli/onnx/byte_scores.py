"""A graph of one product: how near rows of bytes are to one vector of bytes, in whole numbers.

Invariant: the sums are exact in int32 wherever the processor multiplies bytes exactly (VNNI, AMX).
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from llmcli.files.vector_index import ZERO


@functools.cache
def byte_scores(size: int) -> bytes:
    """`rows` uint8 (n, size), `vector` int8 (size, 1) -> `scores` int32 (n, 1): the sums of (row - 128) x vector."""
    rows = ir.Value(name="rows", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(["n", size]))
    vector = ir.Value(name="vector", type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape([size, 1]))
    zero = ir.Value(name="zero", const_value=ir.tensor(np.array(ZERO, np.uint8), name="zero"))
    node = ir.Node("", "MatMulInteger", [rows, vector, zero], name="product")
    scores = node.outputs[0]
    scores.name, scores.type, scores.shape = "scores", ir.TensorType(ir.DataType.INT32), ir.Shape(["n", 1])
    graph = ir.Graph([rows, vector], [scores], nodes=[node], initializers=[zero], opset_imports={"": 21}, name="scores")
    content: bytes = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    return content
