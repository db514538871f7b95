"""The graph of a decoder, mirroring `models/decoder.py` function by function.

Inputs and outputs have the ecosystem's names: input_ids (B, T), attention_mask (B, S) with ones for what a row holds
once the run ends, past_key_values.{i}.key|value and present.{i}.key|value (B, K, capacity, D), which may share one
buffer, logits (B, kept, V). num_logits_to_keep is optional; all are kept where it is not given.

Invariant: logits agree with the torch decoder's within 1e-3 in float32, at every length, batch and fill of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from llmcli import __version__
from llmcli.models.config import DecoderConfig
from llmcli.onnx.families import LayerWeights, ModelWeights, Norm
from llmcli.onnx.graph import MICROSOFT, Graph
from llmcli.onnx.weights import Array

KEEP_ALL = 2**31


def rope_tables(config: DecoderConfig) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles: (context, D / 2) each. Follows `models.decoder.rope_frequencies`."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = 1.0 / np.float32(config.rope_theta) ** exponents
    if config.rope_scaling is not None:
        rule = config.rope_scaling
        low, high = rule["low_freq_factor"], rule["high_freq_factor"]
        turns = rule["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * ((1 - smooth) / rule["factor"] + smooth)
    angles = np.arange(config.max_position_embeddings, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    return np.cos(angles), np.sin(angles)


class DecoderGraph:
    """Builds the graph of a decoder, block by block."""

    target = "ort"
    past_length = present_length = "capacity"

    least = 0  # of a graph for prompts: how many tokens they must have; 0: as many as the session takes for them

    def __init__(self, config: DecoderConfig, weights: ModelWeights, graph: Graph) -> None:
        self.config, self.weights, self.graph, self.heads = config, weights, graph, weights.heads

    def build(self) -> Iterator[int]:
        """Builds it; yields the number of blocks that are done."""
        config, graph = self.config, self.graph
        ids = graph.input("input_ids", ir.DataType.INT64, ("batch", "tokens"))
        mask = graph.input("attention_mask", ir.DataType.INT64, ("batch", "total"))
        self._lengths(ids, mask)
        self._tables()
        residual = self._embedding(ids)
        x: ir.Value | None = None
        added: ir.Value | None = None  # what the block before adds to the residual
        for index in range(config.num_hidden_layers):
            layer = self.weights.layer(index)
            x, residual = self._normed(residual, added, layer.norms[0])
            attended = self._attention(x, layer, index)
            x, residual = self._normed(residual, attended, layer.norms[1])
            added = self._mlp(x, layer)
            yield index + 1
        x, _ = self._normed(residual, added, self.weights.last_norm)
        self._logits(x)

    # ------------------------------------------------------------------------------------------------------------

    def _lengths(self, ids: ir.Value, mask: ir.Value) -> None:
        """What GroupQueryAttention asks for: tokens a row holds after the run, less one; the longest row's."""
        graph, one = self.graph, self.graph.numbers(1)
        self.sums = graph.op("ReduceSum", [mask, one], "attention_mask.sum", keepdims=0)
        last = graph.op("Sub", [self.sums, one], "attention_mask.last")
        self.seqlens = graph.op("Cast", [last], "seqlens_k", to=ir.DataType.INT32)
        shape = graph.op("Shape", [mask], "attention_mask.shape", start=1, end=2)
        total = graph.op("Squeeze", [shape], "attention_mask.total")
        self.total = graph.op("Cast", [total], "total_sequence_length", to=ir.DataType.INT32)
        self.ids = ids

    def _tables(self) -> None:
        self.rope: tuple[ir.Value, ...] = ()
        if self.config.model_type != "gpt2":
            missing = ((0, 0), (0, (self.heads.size - self.heads.own) // 2))  # of entries that are zero: any angle does
            cos, sin = (np.pad(table, missing) for table in rope_tables(self.config))
            self.rope = (self.graph.vector("cos_cache", cos), self.graph.vector("sin_cache", sin))

    def _embedding(self, ids: ir.Value) -> ir.Value:
        """Embedded tokens; of GPT-2, with those of their positions: (B, T) -> (B, T, C)."""
        graph = self.graph
        x = graph.embedded(ids, self.weights.embedding, "embedding")
        if self.config.model_type != "gpt2":
            return x
        table = graph.vector("transformer.wpe.weight", self.weights.positions.rows())
        found = graph.op("Gather", [table, self._positions(ids)], "position_embedding")
        return graph.op("Add", [x, found], "embedding.sum")

    def _positions(self, ids: ir.Value) -> ir.Value:
        """Of the tokens, behind what each row holds: (B, T)."""
        graph = self.graph
        shape = graph.op("Shape", [ids], "input_ids.shape", start=1, end=2)
        begin = graph.op("Unsqueeze", [graph.op("Sub", [self.sums, shape], "past"), graph.numbers(1)], "past.column")
        steps = graph.op("Range", [graph.scalar(0), graph.op("Squeeze", [shape], "tokens"), graph.scalar(1)], "steps")
        return graph.op("Add", [begin, steps], "positions")

    def _normed(self, residual: ir.Value, added: ir.Value | None, norm: Norm) -> tuple[ir.Value, ir.Value]:
        """(the norm of residual + added, that sum).

        On a CPU the fused operator is no faster for one token and half as fast for many; of Add onnxruntime would make
        it. A GPU runs float16, where each node is a launch.
        """
        graph, epsilon = self.graph, self.config.norm_eps
        if added is not None and graph.dtype == ir.DataType.FLOAT:
            residual, added = graph.op("Sum", [residual, added], f"{norm.name}.sum"), None
        weight = graph.vector(f"{norm.name}.weight", norm.weight.rows())
        if norm.bias is None:
            if added is None:
                made = graph.op("SimplifiedLayerNormalization", [residual, weight], norm.name, axis=-1, epsilon=epsilon)
                return made, residual
            kind, given = "SkipSimplifiedLayerNormalization", [residual, added, weight]
        else:
            bias = graph.vector(f"{norm.name}.bias", norm.bias.rows())
            if added is None:
                made = graph.op("LayerNormalization", [residual, weight, bias], norm.name, axis=-1, epsilon=epsilon)
                return made, residual
            kind, given = "SkipLayerNormalization", [residual, added, weight, bias]
        found = graph.node(kind, given, norm.name, domain=MICROSOFT, outputs=4, epsilon=epsilon)
        return found[0], found[3]

    def _attention(self, x: ir.Value, layer: LayerWeights, index: int) -> ir.Value:
        config, graph, name = self.config, self.graph, f"{layer.name}.attention"
        past = [self._cache_input(index, kind) for kind in ("key", "value")]
        packed = graph.linear(x, layer.qkv, layer.qkv_bias, f"{name}.qkv")
        query: list[ir.Value | None] = [packed, None, None]
        if layer.head_norms is not None:
            query = list(self._normed_heads(packed, layer, name))
        attended, *present = graph.node(
            "GroupQueryAttention",
            [*query, *past, self.seqlens, self.total, *self.rope],
            name,
            domain=MICROSOFT,
            outputs=3,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=int(bool(self.rope)),
            rotary_interleaved=0,
            scale=config.head_dim**-0.5,
            local_window_size=config.sliding_window or -1,
        )
        for kind, value in zip(("key", "value"), present, strict=True):
            self._cache_output(value, index, kind)
        return graph.linear(attended, layer.output, layer.output_bias, f"{name}.output")

    def _cache_input(self, index: int, kind: str) -> ir.Value | None:
        shape = ("batch", self.config.num_key_value_heads, self.past_length, self.heads.size)
        return self.graph.input(f"past_key_values.{index}.{kind}", self.graph.dtype, shape)

    def _cache_output(self, value: ir.Value, index: int, kind: str) -> None:
        shape = ("batch", self.config.num_key_value_heads, self.present_length, self.heads.size)
        self.graph.output(value, f"present.{index}.{kind}", self.graph.dtype, shape)

    def _normed_heads(self, packed: ir.Value, layer: LayerWeights, name: str) -> Iterator[ir.Value]:
        """Query and key, normed head by head, and value: (B, T, H D), (B, T, K D) twice."""
        config, graph, size = self.config, self.graph, self.heads.size
        wide, narrow = config.num_attention_heads * size, config.num_key_value_heads * size
        epsilon = config.norm_eps * self.heads.own / size
        parts = graph.node("Split", [packed, graph.numbers(wide, narrow, narrow)], f"{name}.parts", outputs=3, axis=-1)
        assert layer.head_norms is not None
        for part, norm, letter, width in zip(parts, layer.head_norms, "qk", (wide, narrow), strict=False):
            weight = graph.vector(f"{layer.name}.self_attn.{letter}_norm.weight", norm)
            heads = graph.op("Reshape", [part, graph.numbers(0, 0, -1, size)], f"{name}.{letter}.heads")
            normed = graph.op(
                "SimplifiedLayerNormalization", [heads, weight], f"{name}.{letter}", axis=-1, epsilon=epsilon
            )
            yield graph.op("Reshape", [normed, graph.numbers(0, 0, width)], f"{name}.{letter}.flat")
        yield parts[2]

    def _mlp(self, x: ir.Value, layer: LayerWeights) -> ir.Value:
        graph, name = self.graph, f"{layer.name}.feed_forward"
        if len(layer.gate_up.parts) == 2 and layer.gate_up_bias is None and graph.takes_rows(layer.gate_up):
            return self._gated_rows(x, layer, name)
        inner = self._activated(graph.linear(x, layer.gate_up, layer.gate_up_bias, f"{name}.gate_up"), name)
        return graph.linear(inner, layer.down, layer.down_bias, f"{name}.down")

    def _gated_rows(self, x: ir.Value, layer: LayerWeights, name: str) -> ir.Value:
        """Two products of one quantization: nothing is to be split, and the rows' scales of `up` wait for `down`'s."""
        graph = self.graph
        gate, up = layer.gate_up.apart(f"{layer.name}.mlp.gate_proj", f"{layer.name}.mlp.up_proj")
        rows = graph.rows(x, gate.shape[1], f"{name}.gate_up")
        scaled = graph.row_product(rows, gate, None, f"{name}.gate")
        inner = self._gated(scaled, graph.unscaled(rows, up, f"{name}.up"), name)
        if graph.takes_rows(layer.down):
            inners = graph.rows(inner, layer.down.shape[1], f"{name}.down", rows.scales)
            return graph.row_product(inners, layer.down, layer.down_bias, f"{name}.down")
        inner = graph.op("Mul", [inner, rows.scales], f"{name}.scaled")
        return graph.linear(inner, layer.down, layer.down_bias, f"{name}.down")

    def _activated(self, inner: ir.Value, name: str) -> ir.Value:
        """silu(gate) * up of the two halves; GPT-2's GELU in its tanh form."""
        graph = self.graph
        if self.config.model_type == "gpt2":
            return graph.op("FastGelu", [inner], f"{name}.gelu", domain=MICROSOFT)
        gate, up = graph.node("Split", [inner], f"{name}.halves", outputs=2, axis=-1, num_outputs=2)
        return self._gated(gate, up, name)

    def _gated(self, gate: ir.Value, up: ir.Value, name: str) -> ir.Value:
        graph = self.graph
        swished = graph.op("QuickGelu", [gate], f"{name}.silu", domain=MICROSOFT, alpha=1.0)
        return graph.op("Mul", [swished, up], f"{name}.gated")

    def _logits(self, x: ir.Value) -> None:
        """Logits of the last positions, as many as asked for."""
        graph = self.graph
        kept = graph.optional_input("num_logits_to_keep", np.array([KEEP_ALL], np.int64))
        begin = graph.op("Neg", [kept], "first_kept")
        x = graph.op("Slice", [x, begin, graph.numbers(2**62), graph.numbers(1)], "last_hidden")
        role = "embedding" if self.config.tie_word_embeddings else "head"
        logits = graph.linear(x, self.weights.head, None, "head", role=role)
        if graph.dtype != ir.DataType.FLOAT:
            logits = graph.op("Cast", [logits], "head.float", to=ir.DataType.FLOAT)
        graph.output(logits, "logits", ir.DataType.FLOAT, ("batch", "kept", self.config.vocab_size))
        graph.outputs.insert(0, graph.outputs.pop())  # where everybody expects them

    def finished(self) -> ir.Model:
        """The model, once it is built."""
        return self.graph.model(self.config.model_type, self._facts(), __version__)

    def _facts(self) -> dict[str, str]:
        """What the graph says of itself."""
        return {
            "llmcli.target": self.target,
            "llmcli.precision": self.graph.plan.precision,
            "llmcli.rows": "independent" if self.graph.plan.rows_are_independent else "coupled",
            "llmcli.context": str(self.config.max_position_embeddings),
            **({"llmcli.least": str(self.least)} if self.least else {}),
        }
