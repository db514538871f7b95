"""Calibration: the second moments of every product's inputs, over a text, block by block; no torch.

A block runs by itself in float32 on all windows, so that one block's weights and moments are in memory at a time.

Invariant: moments are asked for in the order of the blocks; what was passed is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmcli.models.config import DecoderConfig
from llmcli.onnx.decoder import DecoderGraph
from llmcli.onnx.external import InMemory
from llmcli.onnx.families import ModelWeights
from llmcli.onnx.graph import Graph
from llmcli.onnx.quantize import Plan
from llmcli.onnx.weights import Array, Matrix

Ids = npt.NDArray[np.int64]


class Calibration:
    """Moments by the name of a matrix: (inputs, inputs), float32, the mean of x x^T over all tokens of the windows."""

    def __init__(self, config: DecoderConfig, weights: ModelWeights, windows: Sequence[Ids], threads: int) -> None:
        self._config, self._weights, self._threads = config, weights, threads
        self._states = embedded(
            config, weights, weights.embedding, windows
        )  # (T, C) each: what goes into the next block
        self._next = 0
        self._moments: dict[str, Array] = {}

    def get(self, name: str) -> Array | None:
        """The moments of a matrix's inputs; None for one whose inputs are not known yet: an embedding that is tied."""
        layers = self._config.num_hidden_layers
        while name not in self._moments and self._next < layers and name.startswith(_layers_of(self._config)):
            self._moments = {}
            self._run()
        if name == "lm_head" and name not in self._moments and self._next == layers:
            self._moments = {name: self._head_moment()}
        return self._moments.get(name)

    def _run(self) -> None:
        """Runs the next block on all windows and takes the moments of its products' inputs."""
        block = _Block(self._config, self._weights, self._next, self._threads)
        tokens = 0
        for place, states in enumerate(self._states):
            self._states[place], inputs = block(states)
            for name, x in inputs.items():
                product = x.T @ x
                self._moments[name] = self._moments[name] + product if name in self._moments else product
            tokens += len(states)
        for moment in self._moments.values():
            moment /= tokens
        self._next += 1

    def _head_moment(self) -> Array:
        """Of the last norm's outputs."""
        norm, epsilon = self._weights.last_norm, self._config.norm_eps
        total, tokens = None, 0
        for states in self._states:
            if norm.bias is None:
                x = states / np.sqrt((states**2).mean(-1, keepdims=True) + epsilon) * norm.weight.rows()
            else:
                centred = states - states.mean(-1, keepdims=True)
                x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * norm.weight.rows()
                x += norm.bias.rows()
            total = x.T @ x if total is None else total + x.T @ x
            tokens += len(states)
        assert total is not None
        found: Array = total / tokens
        return found


def _layers_of(config: DecoderConfig) -> str:
    return "transformer.h." if config.model_type == "gpt2" else "model.layers."


def embedded(config: DecoderConfig, weights: ModelWeights, matrix: Matrix, windows: Sequence[Ids]) -> list[Array]:
    """The states that the first block gets: (T, C) each; of the embedding, no more than a piece is read at a time."""
    found = [np.zeros((len(window), config.hidden_size), np.float32) for window in windows]
    first = 0
    for piece in matrix.pieces():
        for window, states in zip(windows, found, strict=True):
            here = (window >= first) & (window < first + len(piece))
            states[here] = piece[window[here] - first]
        first += len(piece)
    if config.model_type == "gpt2":
        positions = weights.positions.rows()
        for states in found:
            states += positions[: len(states)]
    return found


class TappedGraph(Graph):
    """A graph that remembers what each product is given, by the name of its matrix."""

    def __init__(self) -> None:
        super().__init__(Plan(), InMemory())
        self.taps: dict[str, ir.Value] = {}

    def linear(self, x: ir.Value, matrix: Matrix, bias: Array | None, name: str, *, role: str = "") -> ir.Value:
        """The product, its input noted."""
        self.taps[matrix.name] = x
        return super().linear(x, matrix, bias, name, role=role)


class _Block(DecoderGraph):
    """One block in onnxruntime: states (T, C) in, states and the inputs of its products out."""

    graph: TappedGraph

    def __init__(self, config: DecoderConfig, weights: ModelWeights, index: int, threads: int) -> None:
        super().__init__(config, weights, TappedGraph())
        graph, layer = self.graph, weights.layer(index)
        states = graph.input("states", ir.DataType.FLOAT, ("batch", "tokens", config.hidden_size))
        self._lengths(states, graph.input("attention_mask", ir.DataType.INT64, ("batch", "total")))
        self._tables()
        x, residual = self._normed(states, None, layer.norms[0])
        attended = self._attention(x, layer, index)
        x, residual = self._normed(residual, attended, layer.norms[1])
        result = graph.op("Add", [residual, self._mlp(x, layer)], "result")
        self._names = list(graph.taps)
        self._outputs = [result, *graph.taps.values()]
        for place, value in enumerate(self._outputs):
            if value not in graph.outputs:
                graph.output(value, f"tap.{place}", ir.DataType.FLOAT, ("batch", "tokens", "width"))
        self._engine = self._opened(threads)

    def _opened(self, threads: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        content = ir.serde.serialize_model(self.finished()).SerializeToString()
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

    def __call__(self, states: Array) -> tuple[Array, dict[str, Array]]:
        """Runs it on a window from its begin."""
        count = len(states)
        empty = np.zeros((1, self.config.num_key_value_heads, count, self.heads.size), np.float32)
        given = {"states": states[None], "attention_mask": np.ones((1, count), np.int64)}
        given |= {item.name: empty for item in self._engine.get_inputs() if item.name.startswith("past")}
        found = self._engine.run([value.name for value in self._outputs], given)
        result, *inputs = (value[0] for value in found)
        return result, dict(zip(self._names, inputs, strict=True))
