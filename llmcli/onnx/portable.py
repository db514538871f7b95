"""The same decoder in standard operators of ONNX alone (opset 23), for other engines.

Inputs and outputs keep their names. The cache grows by concatenation: past_key_values.{i}.key|value (B, K, past, D) to
present.{i}.key|value (B, K, past + T, D), and rows of unequal length are filled up on the left, as is usual elsewhere.
Quantized matrices are DequantizeLinear in blocks before a MatMul, the form that engines know and fuse.

Invariant: every operator is of the standard domain; what is computed is what `decoder.py` computes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from llmcli.onnx.decoder import DecoderGraph
from llmcli.onnx.families import LayerWeights, Norm
from llmcli.onnx.graph import Graph
from llmcli.onnx.quantize import BLOCKS, FLOAT, BlockQuantized, Scheme
from llmcli.onnx.weights import Array, Matrix


class PortableGraph(Graph):
    """Products and embeddings in standard operators."""

    opsets: ClassVar[dict[str, int]] = {"": 23}
    ir_version = 11

    def linear(self, x: ir.Value, matrix: Matrix, bias: Array | None, name: str, *, role: str = "") -> ir.Value:
        """x W^T + bias: (..., inputs) -> (..., outputs)."""
        scheme = self._scheme(matrix, role)
        if scheme.kind == FLOAT:
            weight = self._streamed(f"{matrix.name}.weight", matrix)
        elif role == "embedding":
            codes, scales = self._embedding_codes(matrix, scheme)
            size = scheme.block_size
            weight = self.op("DequantizeLinear", [codes, scales], f"{name}.weight", axis=1, block_size=size)
        else:
            return self._added(self.op("MatMul", [x, self._dequantized(matrix, scheme)], name), bias, name)
        turned = self.op("Transpose", [weight], f"{name}.turned", perm=[1, 0])
        return self._added(self.op("MatMul", [x, turned], name), bias, name)

    def embedded(self, ids: ir.Value, matrix: Matrix, name: str) -> ir.Value:
        """The rows of an embedding at the ids; of a quantized one, codes and scales are gathered."""
        scheme = self._scheme(matrix, "embedding")
        if scheme.kind == FLOAT:
            return self.op("Gather", [self._streamed(f"{matrix.name}.weight", matrix), ids], name)
        codes, scales = self._embedding_codes(matrix, scheme)
        numbers = self.op("Cast", [self.op("Gather", [codes, ids], f"{name}.codes")], f"{name}.numbers", to=self.dtype)
        blocks = self.numbers(0, 0, -1, scheme.block_size)
        numbers = self.op("Reshape", [numbers, blocks], f"{name}.blocks")
        factors = self.op(
            "Unsqueeze", [self.op("Gather", [scales, ids], f"{name}.scales"), self.numbers(-1)], f"{name}.by"
        )
        return self.op("Reshape", [self.op("Mul", [numbers, factors], f"{name}.rows"), self.numbers(0, 0, -1)], name)

    def _added(self, product: ir.Value, bias: Array | None, name: str) -> ir.Value:
        return product if bias is None else self.op("Add", [product, self.vector(f"{name}.bias", bias)], f"{name}.sum")

    def _scheme(self, matrix: Matrix, role: str) -> Scheme:
        """As the plan says, but codes that are gathered have 8 bits: there is no gathering of 4."""
        scheme = self.plan.scheme(matrix.name, matrix.shape, role)
        return dataclasses.replace(scheme, bits=8) if role == "embedding" and scheme.kind == BLOCKS else scheme

    def _blocks(self, matrix: Matrix, scheme: Scheme) -> list[BlockQuantized]:
        moment = self.plan.moments.get(matrix.name)
        return [self.plan.quantizer.blocks(matrix.name, piece, scheme, moment) for piece in matrix.pieces()]

    def _embedding_codes(self, matrix: Matrix, scheme: Scheme) -> tuple[ir.Value, ir.Value]:
        """int8 codes (V, C) and scales (V, blocks)."""
        stem = f"{matrix.name}.weight"
        if self._known(f"{stem}.codes") is None:
            found = self._blocks(matrix, scheme)
            codes = np.concatenate([each.data.reshape(len(each.data), -1) for each in found])
            scales = np.concatenate([each.scales for each in found])
            held = [
                self.constant(f"{stem}.codes", (codes ^ 128).view(np.int8)),  # the middle code, 128, becomes 0
                self.constant(f"{stem}.scales", scales.astype(self.numpy_dtype)),
            ]
            self._account(matrix.name, math.prod(matrix.shape), scheme, *held)
        return self._constants[f"{stem}.codes"], self._constants[f"{stem}.scales"]

    def _dequantized(self, matrix: Matrix, scheme: Scheme) -> ir.Value:
        """A matrix as (inputs, outputs), dequantized as it is used."""
        stem = f"{matrix.name}.weight"
        if self._known(f"{stem}.codes") is None:
            found = self._blocks(matrix, scheme)
            codes = np.concatenate([each.codes() for each in found]).T
            scales = np.concatenate([each.scales for each in found]).T
            middles = np.concatenate([each.middles() for each in found]).T
            self._account(
                matrix.name,
                math.prod(matrix.shape),
                scheme,
                self._codes(f"{stem}.codes", codes, scheme.bits),
                self.constant(f"{stem}.scales", np.ascontiguousarray(scales.astype(self.numpy_dtype))),
                self._codes(f"{stem}.zeros", middles, scheme.bits),
            )
        parts = [self._constants[f"{stem}.{part}"] for part in ("codes", "scales", "zeros")]
        return self.op("DequantizeLinear", parts, f"{stem}.float", axis=0, block_size=scheme.block_size)

    def _codes(self, name: str, codes: np.ndarray[Any, Any], bits: int) -> ir.Value:
        """Codes as uint8, or as uint4, two a byte in the order of the whole tensor."""
        if bits == 8:
            return self.constant(name, np.ascontiguousarray(codes))
        flat = codes.reshape(-1)
        flat = np.concatenate((flat, np.zeros(len(flat) % 2, np.uint8)))
        nibbles = flat[0::2] | (flat[1::2] << 4)
        return self._hold(name, self.data.add_packed(name, nibbles, codes.shape, ir.DataType.UINT4))


class PortableDecoder(DecoderGraph):
    """The decoder's blocks in standard operators."""

    target = "portable"
    past_length, present_length = "past", "total"

    def _lengths(self, ids: ir.Value, mask: ir.Value) -> None:
        """Positions (B, T) of the new tokens, and which entries (B, 1, T, S) each attends to."""
        graph, one = self.graph, self.graph.numbers(1)
        tokens = graph.op("Shape", [ids], "input_ids.tokens", start=1, end=2)
        total = graph.op("Shape", [mask], "attention_mask.total", start=1, end=2)
        axis, zero, step = (graph.scalar(value) for value in (1, 0, 1))
        counted = graph.op("CumSum", [mask, axis], "attention_mask.counted")
        ends = graph.numbers(2**62)
        newest = graph.op("Slice", [counted, graph.op("Neg", [tokens], "last"), ends, one], "positions.from_1")
        begun = graph.op("Sub", [newest, one], "positions.any")
        self.positions = graph.op("Max", [begun, graph.numbers(0)], "positions")  # of what fills a row up: 0
        past = graph.op("Sub", [total, tokens], "past")
        keys = graph.op("Range", [zero, graph.op("Squeeze", [total], "total"), step], "keys")  # (S,)
        steps = graph.op("Range", [zero, graph.op("Squeeze", [tokens], "tokens"), step], "steps")
        queries = graph.op("Unsqueeze", [graph.op("Add", [steps, past], "queries.row"), one], "queries")  # (T, 1)
        causal = graph.op("LessOrEqual", [keys, queries], "causal")
        if self.config.sliding_window is not None:
            behind = graph.op("Sub", [queries, graph.numbers(self.config.sliding_window)], "behind")
            causal = graph.op("And", [causal, graph.op("Greater", [keys, behind], "within")], "window")
        spread = graph.op("Unsqueeze", [mask, graph.numbers(1, 2)], "attention_mask.spread")  # (B, 1, 1, S)
        held = graph.op("Cast", [spread], "held", to=ir.DataType.BOOL)
        # What fills a row up attends to itself: a softmax over nothing is NaN, which would spread.
        open_to = graph.op("Or", [held, graph.op("Equal", [keys, queries], "itself")], "open")
        self.mask = graph.op("And", [open_to, causal], "mask")

    def _embedding(self, ids: ir.Value) -> ir.Value:
        graph = self.graph
        x = graph.embedded(ids, self.weights.embedding, "embedding")
        if self.config.model_type != "gpt2":
            return x
        table = graph.vector("transformer.wpe.weight", self.weights.positions.rows())
        return graph.op("Add", [x, graph.op("Gather", [table, self.positions], "position_embedding")], "embedding.sum")

    def _normed(self, residual: ir.Value, added: ir.Value | None, norm: Norm) -> tuple[ir.Value, ir.Value]:
        graph, epsilon = self.graph, self.config.norm_eps
        if added is not None:
            residual = graph.op("Add", [residual, added], f"{norm.name}.residual")
        weights = [graph.vector(f"{norm.name}.weight", norm.weight.rows())]
        if norm.bias is not None:
            weights.append(graph.vector(f"{norm.name}.bias", norm.bias.rows()))
        kind = "RMSNormalization" if norm.bias is None else "LayerNormalization"
        return graph.op(kind, [residual, *weights], norm.name, axis=-1, epsilon=epsilon), residual

    def _attention(self, x: ir.Value, layer: LayerWeights, index: int) -> ir.Value:
        config, graph, name, size = self.config, self.graph, f"{layer.name}.attention", self.heads.size
        past = [self._cache_input(index, kind) for kind in ("key", "value")]
        packed = graph.linear(x, layer.qkv, layer.qkv_bias, f"{name}.qkv")
        wide, narrow = config.num_attention_heads * size, config.num_key_value_heads * size
        parts = graph.node("Split", [packed, graph.numbers(wide, narrow, narrow)], f"{name}.parts", outputs=3, axis=-1)
        heads = [self._heads(part, letter, layer, name) for part, letter in zip(parts, "qkv", strict=True)]
        attended, *present = graph.node(
            "Attention", [*heads, self.mask, *past], name, outputs=3, scale=config.head_dim**-0.5
        )
        for kind, value in zip(("key", "value"), present, strict=True):
            self._cache_output(value, index, kind)
        turned = graph.op("Transpose", [attended], f"{name}.rows", perm=[0, 2, 1, 3])
        flat = graph.op("Reshape", [turned, graph.numbers(0, 0, wide)], f"{name}.flat")
        return graph.linear(flat, layer.output, layer.output_bias, f"{name}.output")

    def _heads(self, part: ir.Value, letter: str, layer: LayerWeights, name: str) -> ir.Value:
        """Query, key or value by heads, normed and turned by its position: (B, T, H D) -> (B, H, T, D)."""
        graph, size = self.graph, self.heads.size
        heads = graph.op("Reshape", [part, graph.numbers(0, 0, -1, size)], f"{name}.{letter}.heads")
        if letter != "v" and layer.head_norms is not None:
            weight = graph.vector(f"{layer.name}.self_attn.{letter}_norm.weight", layer.head_norms["qk".index(letter)])
            epsilon = self.config.norm_eps * self.heads.own / size
            heads = graph.op("RMSNormalization", [heads, weight], f"{name}.{letter}.normed", axis=-1, epsilon=epsilon)
        heads = graph.op("Transpose", [heads], f"{name}.{letter}", perm=[0, 2, 1, 3])
        if letter == "v" or not self.rope:
            return heads
        return graph.op("RotaryEmbedding", [heads, *self.rope, self.positions], f"{name}.{letter}.turned")

    def _activated(self, inner: ir.Value, name: str) -> ir.Value:
        graph = self.graph
        if self.config.model_type == "gpt2":
            return graph.op("Gelu", [inner], f"{name}.gelu", approximate="tanh")
        gate, up = graph.node("Split", [inner], f"{name}.halves", outputs=2, axis=-1, num_outputs=2)
        swished = graph.op("Mul", [gate, graph.op("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        return graph.op("Mul", [swished, up], f"{name}.gated")
