"""Quantization product by product along the model: each is fitted to the float model's states from the quantized ones.

Two streams of states run over a calibration text, through the float model and through what is quantized of it so far.
Let a product be W x + r in the one (r: the residual that it is added to) and V y + s in the other. The best V for the
metric M = E[y y^T] is W + (W E[(x - y) y^T] + E[(r - s) y^T]) M^-1: it makes up for the errors of all products before
it, as far as its own inputs tell of them; those weights are then rounded with the least error (`least_error`).
The same idea without r: GPTAQ (arXiv:2504.02692).

Blocks run one at a time in onnxruntime, window by window: no torch, and no more than two blocks in memory.

Invariant: matrices are asked for in the order of the graph; each is fitted to what was asked for before it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmcli.models.config import DecoderConfig
from llmcli.onnx.calibrate import TappedGraph, embedded
from llmcli.onnx.decoder import DecoderGraph
from llmcli.onnx.families import LayerWeights, ModelWeights
from llmcli.onnx.least_error import LeastError, damped
from llmcli.onnx.quantize import BlockQuantized, Scheme
from llmcli.onnx.weights import Array, Held, Matrix

Ids = npt.NDArray[np.int64]
_PRODUCTS = ("qkv", "output", "gate_up", "down")  # fields of LayerWeights, in the order of the graph
_RESIDUALS = {"output": "states", "down": "middle"}  # what the results of these are added to
_LAST = "last"
# A matrix that embeds too is multiplied with single tokens besides: all of its weights count there.
_TIED_DAMPING = 0.4


class Sequential:
    """A Quantizer for the matrices of one model. `windows`: ids of the calibration text, each of one row of text."""

    needs_moments = False  # it takes them itself

    def __init__(
        self,
        config: DecoderConfig,
        weights: ModelWeights,
        windows: Sequence[Ids],
        threads: int,
        method: LeastError | None = None,
    ) -> None:
        self._config, self._weights, self._windows, self._threads = config, weights, windows, threads
        self._method = method or LeastError()
        self._index = 0  # of the block that is being quantized
        self._layer: LayerWeights | None = None  # its weights, those quantized that were asked for
        self._states: tuple[list[Array], list[Array]] | None = None  # into that block: float's, quantized's; (T, C)
        self._exact: list[dict[str, Array]] | None = None  # by window, what the float model computes in that block
        self._embedding = weights.embedding
        self._fit: _Fit | None = None  # of the matrix that is asked for, piece by piece

    def blocks(self, name: str, weight: Array, scheme: Scheme, moment: Array | None = None) -> BlockQuantized:
        """Quantizes (outputs, inputs), or the next rows of a matrix that is handed over in pieces."""
        if self._fit is None or self._fit.name != name:
            self._fit = self._fit_of(name)
        fit, method = self._fit, self._method
        damping = _TIED_DAMPING if name == self._embedding.name else method.damping
        zero_points = method.zero_points and scheme.bits == 4  # with more codes they buy nothing
        method = LeastError(damping=damping, passes=method.passes, zero_points=zero_points)
        found = method.blocks(name, fit.target(weight), scheme, fit.moment)
        fit.pieces.append(found.dequantized())
        if sum(map(len, fit.pieces)) == fit.outputs:
            self._hold(name, Matrix(name, (Held(np.concatenate(fit.pieces)),)))
            fit.pieces.clear()
        return found

    def _fit_of(self, name: str) -> _Fit:
        """What a matrix shall be fitted to. Runs the streams up to it."""
        if name == self._embedding.name:
            tied = self._config.tie_word_embeddings
            return _Fit(name, self._embedding.shape[0], self._head_moment() if tied else None)
        if name == self._weights.head.name:
            while self._index < self._config.num_hidden_layers:
                self._advance()
            return self._moments(name, self._weights.head, "")
        while name not in (products := self._products()):
            self._advance()
        return self._moments(name, *products[name])

    def _products(self) -> dict[str, tuple[Matrix, str]]:
        """The matrices of the block, with the field that each is."""
        layer = self._current()
        return {getattr(layer, field).name: (getattr(layer, field), field) for field in _PRODUCTS}

    def _current(self) -> LayerWeights:
        if self._layer is None:
            assert self._index < self._config.num_hidden_layers, "a matrix was asked for out of order"
            self._layer = self._weights.layer(self._index)
        return self._layer

    def _hold(self, name: str, matrix: Matrix) -> None:
        """From here on the quantized stream computes with these weights."""
        if name == self._embedding.name:
            self._embedding = matrix
        elif name != "lm_head":
            _, field = self._products()[name]
            changed: dict[str, Any] = {field: matrix}
            self._layer = dataclasses.replace(self._current(), **changed)

    # ------------------------------------------------------------------------------------------------------------
    # The streams

    def _streams(self) -> tuple[list[Array], list[Array]]:
        if self._states is None:
            exact = embedded(self._config, self._weights, self._weights.embedding, self._windows)
            self._states = exact, embedded(self._config, self._weights, self._embedding, self._windows)
        return self._states

    def _block(self, layer: LayerWeights) -> _Block:
        return _Block(self._config, _OneLayer(self._weights, layer), self._threads)

    def _advance(self) -> None:
        """Both streams through the block."""
        exact, quantized = self._streams()
        exact[:] = [found["result"] for found in self._float_block()]
        block = self._block(self._current())
        quantized[:] = [block(given, ["result"])[0] for given in quantized]
        self._index, self._layer, self._exact = self._index + 1, None, None

    def _float_block(self) -> list[dict[str, Array]]:
        """Everything of the block in the float model, for each window: its products all ask for some of it."""
        if self._exact is None:
            layer = self._weights.layer(self._index)
            block = self._block(layer)
            names = ["states", "middle", "result", *(getattr(layer, field).name for field in _PRODUCTS)]
            self._exact = [dict(zip(names, block(given, names), strict=True)) for given in self._streams()[0]]
        return self._exact

    def _of_float(self, window: int, names: Sequence[str]) -> list[Array]:
        """Some of what the float model's block computes."""
        found = self._float_block()[window]
        return [found[name] for name in names]

    def _moments(self, name: str, matrix: Matrix, field: str) -> _Fit:
        """Accumulates what the fit of a matrix needs, over all windows."""
        taps, residual = [name], _RESIDUALS.get(field)
        if residual is not None:
            taps.append(residual)
        run = self._block(self._current()) if field else _last_norm(self._config, self._weights)
        size, tokens = matrix.shape[1], 0
        moment, shift = np.zeros((size, size), np.float32), np.zeros((size, size), np.float32)
        lag = np.zeros((matrix.shape[0], size), np.float32) if residual else None
        for place, given in enumerate(self._streams()[1]):
            found = run(given, taps)
            exact = self._of_float(place, taps) if field else run(self._streams()[0][place], taps)
            moment += found[0].T @ found[0]
            shift += (exact[0] - found[0]).T @ found[0]
            if lag is not None:
                lag += (exact[1] - found[1]).T @ found[0]
            tokens += len(found[0])
        moment /= tokens
        metric = damped(moment, self._method.damping)
        fit = _Fit(name, matrix.shape[0], moment, np.linalg.solve(metric, shift.T / tokens).T.astype(np.float32))
        if lag is not None:
            fit.lag = np.linalg.solve(metric, lag.T / tokens).T.astype(np.float32)
        return fit

    def _head_moment(self) -> Array:
        """Of what the head gets in the float model: a tied matrix is asked for before any block has run."""
        states = embedded(self._config, self._weights, self._embedding, self._windows)
        for index in range(self._config.num_hidden_layers):
            block = self._block(self._weights.layer(index))
            states = [block(given, ["result"])[0] for given in states]
        norm = _last_norm(self._config, self._weights)
        total, tokens = np.zeros((self._config.hidden_size,) * 2, np.float32), 0
        for given in states:
            x = norm(given, [_LAST])[0]
            total += x.T @ x
            tokens += len(x)
        return total / np.float32(tokens)


@dataclasses.dataclass
class _Fit:
    """What a matrix (outputs, inputs) is fitted to; `shift` and `lag` are multiplied with M^-1 already."""

    name: str
    outputs: int
    moment: Array | None  # M: (inputs, inputs)
    shift: Array | None = None  # E[(x - y) y^T]: (inputs, inputs)
    lag: Array | None = None  # E[(r - s) y^T]: (outputs, inputs)
    pieces: list[Array] = dataclasses.field(default_factory=list)  # weights that are done, dequantized

    def target(self, weight: Array) -> Array:
        """The weights to round instead of these, which are the matrix's next rows."""
        found = weight
        if self.shift is not None:
            found = found + weight @ self.shift
        if self.lag is not None:
            first = sum(map(len, self.pieces))
            found = found + self.lag[first : first + len(weight)]
        return found


# ----------------------------------------------------------------------------------------------------------------
# A block in onnxruntime


class _OneLayer(ModelWeights):
    """The weights of a model, of whose blocks one is given."""

    def __init__(self, weights: ModelWeights, layer: LayerWeights) -> None:
        self.__dict__.update(copy.copy(weights).__dict__)
        self._given = layer

    def layer(self, index: int) -> LayerWeights:
        """That block."""
        return self._given


class _Block(DecoderGraph):
    """One block: states (T, C) in; out what is asked for by name.

    Names: `states` (what came in), `middle` (after attention), `result`, and a matrix for what it is multiplied with.
    """

    graph: TappedGraph

    def __init__(self, config: DecoderConfig, weights: ModelWeights, threads: int) -> None:
        super().__init__(config, weights, TappedGraph())
        graph, layer = self.graph, weights.layer(0)
        states = graph.input("states", ir.DataType.FLOAT, ("batch", "tokens", config.hidden_size))
        self._lengths(states, graph.input("attention_mask", ir.DataType.INT64, ("batch", "total")))
        self._tables()
        x, residual = self._normed(states, None, layer.norms[0])
        attended = self._attention(x, layer, 0)
        x, middle = self._normed(residual, attended, layer.norms[1])
        result = graph.op("Add", [middle, self._mlp(x, layer)], "result")
        self._taps = {"middle": middle, "result": result, **graph.taps}
        for value in self._taps.values():
            graph.output(value, str(value.name), ir.DataType.FLOAT, ("batch", "tokens", "width"))
        self._engine = self._opened(threads)

    def _opened(self, threads: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        content = ir.serde.serialize_model(self.finished()).SerializeToString()
        self._partly = onnxruntime.RunOptions()
        self._partly.only_execute_path_to_fetches = True
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

    def __call__(self, states: Array, wanted: Sequence[str]) -> list[Array]:
        """Runs it on a window from its begin, as far as it takes."""
        count = len(states)
        empty = np.zeros((1, self.config.num_key_value_heads, count, self.heads.size), np.float32)
        given = {"states": states[None], "attention_mask": np.ones((1, count), np.int64)}
        given |= {item.name: empty for item in self._engine.get_inputs() if item.name.startswith("past")}
        names = [self._taps[name].name for name in wanted if name != "states"]
        found = iter(self._engine.run(names, given, self._partly))
        return [states if name == "states" else next(found)[0] for name in wanted]


def _last_norm(config: DecoderConfig, weights: ModelWeights) -> Any:
    """The norm before the head, called as a block is; whatever is asked for is its result."""
    norm, epsilon = weights.last_norm, config.norm_eps
    scale, bias = norm.weight.rows(), None if norm.bias is None else norm.bias.rows()

    def normed(states: Array, wanted: Sequence[str]) -> list[Array]:
        centred = states if bias is None else states - states.mean(-1, keepdims=True)
        found = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale
        return [found if bias is None else found + bias]

    return normed
