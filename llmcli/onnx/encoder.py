"""The graph of an encoder, mirroring `models/encoder.py` function by function.

Inputs: input_ids and attention_mask (B, T), ones for tokens and zeros for what fills a row up; token_type_ids (B, T)
where the model tells texts of a pair apart. Outputs: what the head gives, last_hidden_state (B, T, C) and, without a
head, sentence_embedding (B, C), pooled as the model's folder says. B and T are free.

Operators were chosen by measuring onnxruntime 1.32 on short texts (docs/log.md): its standard Attention, Gelu and
LayerNormalization are faster there than MultiHeadAttention, BiasGelu and SkipLayerNormalization, and one
DynamicQuantizeLinear serves all products of the same input.

Invariant: hidden states agree with the torch encoder's within 1e-4 in float32, whatever fills a row up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from llmcli import __version__
from llmcli.models.encoder_config import EncoderConfig
from llmcli.onnx.encoder_weights import Affine, EncoderLayer, EncoderWeights
from llmcli.onnx.families import Norm
from llmcli.onnx.graph import MICROSOFT, Graph

FLOAT = ir.DataType.FLOAT
_WHOLE = ("batch", "tokens")
_FAR = 1e9  # what is taken from the score of what fills a row up
_ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gelu": ("Gelu", "", {}),
    "gelu_tanh": ("Gelu", "", {"approximate": "tanh"}),
    "relu": ("Relu", "", {}),
    "tanh": ("Tanh", "", {}),
    "silu": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
    "quick_gelu": ("QuickGelu", MICROSOFT, {"alpha": 1.702}),
}
_LEAST = 1e-12  # length that a vector is divided by
_LOWEST = -3e38


class NewerGraph(Graph):
    """A graph with the standard's Attention."""

    opsets: ClassVar[dict[str, int]] = {"": 23, MICROSOFT: 1}
    ir_version = 11


class EncoderGraph:
    """Builds the graph of an encoder, block by block. `pooling`: mean, cls, last, max; `normalize`: to length 1."""

    def __init__(
        self,
        config: EncoderConfig,
        weights: EncoderWeights,
        graph: Graph,
        *,
        kind: str = "base",
        pooling: str = "mean",
        normalize: bool = False,
    ) -> None:
        self.config, self.weights, self.graph = config, weights, graph
        self.kind, self.pooling, self.normalize = kind, pooling, normalize

    def build(self) -> Iterator[int]:
        """Builds it; yields the number of blocks that are done."""
        graph = self.graph
        ids = graph.input("input_ids", ir.DataType.INT64, _WHOLE)
        self.mask = graph.input("attention_mask", ir.DataType.INT64, _WHOLE)
        types = None
        if self.config.type_vocab_size > 1:
            types = graph.input("token_type_ids", ir.DataType.INT64, _WHOLE)
        self._masks()
        x = self._embedded(ids, types)
        for index in range(self.config.num_hidden_layers):
            layer = self.weights.layer(index)
            x = self._normed(x, self._attention(x, layer), layer.norm)
            x = self._normed(x, self._feed_forward(x, layer), layer.last_norm)
            yield index + 1
        self._outputs(x)

    # ------------------------------------------------------------------------------------------------------------

    def _masks(self) -> None:
        """What is added to attention's scores: (B, 1, T, T)."""
        graph = self.graph
        self.tokens = tokens = graph.op("Shape", [self.mask], "tokens", start=1, end=2)
        self.held = held = graph.op("Cast", [self.mask], "attention_mask.held", to=FLOAT)  # (B, T)
        padding = graph.op("Sub", [held, self._scalar(1.0)], "padding")
        added = graph.op("Mul", [padding, self._scalar(_FAR)], "padding.far")
        spread = graph.op("Unsqueeze", [added, graph.numbers(1, 2)], "padding.row")  # (B, 1, 1, T)
        square = graph.op("Concat", [graph.numbers(1, 1), tokens, graph.numbers(1)], "padding.shape", axis=0)
        self.added = graph.op("Expand", [spread, square], "padding.square")

    def _embedded(self, ids: ir.Value, types: ir.Value | None) -> ir.Value:
        graph = self.graph
        x = graph.embedded(ids, self.weights.embedding, "embeddings.word_embeddings")
        table = self.weights.positions
        if self.config.type_vocab_size and types is None:
            table = table + self.weights.types[0]
        rows = graph.vector("embeddings.position_embeddings", table)
        first, last = graph.numbers(0), self.tokens
        near = graph.op("Slice", [rows, first, last, graph.numbers(0)], "embeddings.positions")
        x = graph.op("Add", [x, near], "embeddings.placed")
        if types is not None:
            kinds = graph.vector("embeddings.token_type_embeddings", self.weights.types)
            x = graph.op("Add", [x, graph.op("Gather", [kinds, types], "embeddings.types")], "embeddings.sum")
        return self._norm(x, self.weights.embedding_norm)

    def _norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        graph = self.graph
        assert norm.bias is not None
        weight = graph.vector(f"{norm.name}.weight", norm.weight.rows())
        bias = graph.vector(f"{norm.name}.bias", norm.bias.rows())
        return graph.op("LayerNormalization", [x, weight, bias], norm.name, axis=-1, epsilon=self.config.norm_eps)

    def _normed(self, x: ir.Value, added: ir.Value, norm: Norm) -> ir.Value:
        """The norm of x + added. Sum: onnxruntime would make of Add its SkipLayerNormalization, seven times slower."""
        return self._norm(self.graph.op("Sum", [x, added], f"{norm.name}.sum"), norm)

    def _attention(self, x: ir.Value, layer: EncoderLayer) -> ir.Value:
        graph, heads, name = self.graph, self.config.num_attention_heads, f"{layer.name}.attention"
        parts = (layer.query, layer.key, layer.value)
        wanted = [(part.matrix, part.bias, part.matrix.name) for part in parts]
        looked = graph.products(x, wanted, name)
        attended = graph.op("Attention", [*looked, self.added], name, q_num_heads=heads, kv_num_heads=heads)
        return self._affine(attended, layer.output)

    def _affine(self, x: ir.Value, affine: Affine, role: str = "") -> ir.Value:
        name = affine.matrix.name
        if role:
            return self.graph.linear(x, affine.matrix, affine.bias, name, role=role)
        return self.graph.products(x, [(affine.matrix, affine.bias, name)], f"{name}.input")[0]

    def _feed_forward(self, x: ir.Value, layer: EncoderLayer) -> ir.Value:
        return self._affine(self._activated(self._affine(x, layer.up), f"{layer.name}.activation"), layer.down)

    def _activated(self, x: ir.Value, name: str, activation: str | None = None) -> ir.Value:
        kind, domain, more = _ACTIVATIONS[activation or self.config.activation]
        return self.graph.op(kind, [x], name, domain=domain, **more)

    # ------------------------------------------------------------------------------------------------------------

    def _outputs(self, x: ir.Value) -> None:
        """What the head gives, the states, the vector."""
        graph, size = self.graph, self.config.hidden_size
        if self.kind == "masked":
            graph.output(self._masked(x), "logits", FLOAT, (*_WHOLE, self.config.vocab_size))
        elif self.kind == "classifier":
            graph.output(self._labels(x), "logits", FLOAT, ("batch", self.weights.labels.matrix.shape[0]))
        elif self.kind == "span":
            for value, name in zip(self._span(x), ("start_logits", "end_logits"), strict=True):
                graph.output(value, name, FLOAT, _WHOLE)
        graph.output(x, "last_hidden_state", FLOAT, (*_WHOLE, size))
        if self.kind == "base":
            vector = self._pooled(x)
            if self.normalize:
                length = graph.op("ReduceL2", [vector, graph.numbers(-1)], "embedding.length", keepdims=1)
                divided = graph.op("Max", [length, self._scalar(_LEAST)], "embedding.divided")
                vector = graph.op("Div", [vector, divided], "embedding.unit")
            graph.output(vector, "sentence_embedding", FLOAT, ("batch", size))

    def _pooled(self, x: ir.Value) -> ir.Value:
        """A vector a text: (B, T, C) -> (B, C)."""
        graph, second, last = self.graph, self.graph.numbers(1), self.graph.numbers(-1)
        if self.pooling == "cls":
            return self._first(x)
        if self.pooling == "max":
            held = graph.op("Cast", [self.mask], "pooling.held", to=ir.DataType.BOOL)
            column = graph.op("Unsqueeze", [held, last], "pooling.column")  # (B, T, 1)
            kept = graph.op("Where", [column, x, self._scalar(_LOWEST)], "pooling.kept")
            return graph.op("ReduceMax", [kept, second], "pooling", keepdims=0)
        count = graph.op("ReduceSum", [self.held, last], "pooling.count", keepdims=1)
        if self.pooling == "last":
            place = graph.op("CumSum", [self.held, graph.constant("scalar.1", np.array(1, np.int64))], "pooling.place")
            found = graph.op("Cast", [graph.op("Equal", [place, count], "pooling.ends")], "pooling.end", to=FLOAT)
            weights = graph.op("Mul", [found, self.held], "pooling.weights")
        else:
            some = graph.op("Max", [count, self._scalar(1.0)], "pooling.divided")
            weights = graph.op("Div", [self.held, some], "pooling.weights")
        row = graph.op("Unsqueeze", [weights, second], "pooling.row")  # (B, 1, T)
        return graph.op("Squeeze", [graph.op("MatMul", [row, x], "pooling.sum"), second], "pooling")

    def _first(self, x: ir.Value) -> ir.Value:
        """The first token's state: (B, T, C) -> (B, C)."""
        return self.graph.op("Gather", [x, self.graph.constant("scalar.0", np.array(0, np.int64))], "first", axis=1)

    def _masked(self, x: ir.Value) -> ir.Value:
        """Logits of every token of the vocabulary: (B, T, C) -> (B, T, V)."""
        dense, norm, bias = self.weights.masked
        # RoBERTa's head has the exact GELU whatever the blocks have.
        activation = "gelu" if self.config.model_type == "roberta" else None
        made = self._norm(self._activated(self._affine(x, dense), "head.activation", activation), norm)
        return self.graph.linear(made, self.weights.embedding, bias, "head", role="embedding")

    def _labels(self, x: ir.Value) -> ir.Value:
        """Scores of labels: (B, T, C) -> (B, labels)."""
        before = self._affine(self._first(x), self.weights.before_labels, "head")
        activation = "relu" if self.config.model_type == "distilbert" else "tanh"
        return self._affine(self._activated(before, "head.activation", activation), self.weights.labels, "head")

    def _span(self, x: ir.Value) -> list[ir.Value]:
        """Scores of an answer's first and last token: (B, T, C) -> (B, T) twice."""
        graph, last = self.graph, self.graph.numbers(-1)
        scores = self._affine(x, self.weights.span, "head")
        ends = graph.node("Split", [scores], "head.ends", outputs=2, axis=-1, num_outputs=2)
        return [graph.op("Squeeze", [end, last], f"head.{which}") for which, end in enumerate(ends)]

    def _scalar(self, value: float) -> ir.Value:
        return self.graph.constant(f"scalar.{value:g}.float", np.array(value, np.float32))

    def finished(self) -> ir.Model:
        """The model, once it is built."""
        metadata = {
            "llmcli.target": "encoder",
            "llmcli.kind": self.kind,
            "llmcli.precision": self.graph.plan.precision,
            "llmcli.rows": "independent" if self.graph.plan.rows_are_independent else "coupled",
            "llmcli.context": str(self.config.longest),
            "llmcli.pooling": self.pooling,
            "llmcli.normalize": str(self.normalize).lower(),
        }
        return self.graph.model(self.config.model_type, metadata, __version__)
