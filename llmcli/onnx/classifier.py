"""The graph of a decoder with a classification head, mirroring `models/classifier.py`.

input_ids and attention_mask (B, T) to logits (B, labels), the names that others export classifiers with. A text is read
once, so there is no cache. Rows of unequal length are filled up on the right, as `transformers` does for these models;
the portable graph takes either side.

Invariant: the scores of a row are those of its last token, the last one that its mask has.
"""

from __future__ import annotations

import onnx_ir as ir

from llmcli.models.config import DecoderConfig
from llmcli.onnx.decoder import DecoderGraph
from llmcli.onnx.families import ModelWeights
from llmcli.onnx.graph import Graph
from llmcli.onnx.portable import PortableDecoder
from llmcli.onnx.quantize import FLOAT, Scheme

SCORE = "score"
# The head is a small matrix whose errors reach the scores unsoftened.
SCHEMES = {SCORE: Scheme(FLOAT)}


class ClassifierGraph(DecoderGraph):
    """The decoder's blocks without a cache, under a head of its own."""

    def __init__(self, config: DecoderConfig, weights: ModelWeights, graph: Graph, labels: int) -> None:
        super().__init__(config, weights, graph)
        self.labels = labels

    def _lengths(self, ids: ir.Value, mask: ir.Value) -> None:
        """And the place (B, 1) of each row's last token."""
        super()._lengths(ids, mask)
        graph, axis = self.graph, self.graph.scalar(1)
        counted = graph.op("CumSum", [mask, axis], "tokens_so_far")
        self.last = graph.op("ArgMax", [counted], "last_token", axis=1, keepdims=1)

    def _positions(self, ids: ir.Value) -> ir.Value:
        """Of every row: (T,)."""
        graph = self.graph
        count = graph.op("Squeeze", [graph.op("Shape", [ids], "input_ids.shape", start=1, end=2)], "tokens")
        return graph.op("Range", [graph.scalar(0), count, graph.scalar(1)], "positions")

    def _cache_input(self, index: int, kind: str) -> None:
        return None

    def _cache_output(self, value: ir.Value, index: int, kind: str) -> None:
        """It is not kept."""

    def _logits(self, x: ir.Value) -> None:
        """Scores of the labels: (B, T, C) -> (B, labels)."""
        graph = self.graph
        last = graph.op("GatherND", [x, self.last], "last_hidden", batch_dims=1)  # (B, C)
        scores = graph.linear(last, self.weights.score(self.labels), None, SCORE, role="head")
        if graph.dtype != ir.DataType.FLOAT:
            scores = graph.op("Cast", [scores], "score.float", to=ir.DataType.FLOAT)
        graph.output(scores, "logits", ir.DataType.FLOAT, ("batch", self.labels))

    def _facts(self) -> dict[str, str]:
        return {**super()._facts(), "llmcli.labels": str(self.labels)}


class PortableClassifier(ClassifierGraph, PortableDecoder):
    """The same in standard operators."""
