"""Vectors on onnxruntime: encoders that llmcli exported. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llmcli.errors import UsageError
from llmcli.files.artefacts import GRAPH
from llmcli.models.pooling import Pooling, read_pooling
from llmcli.runtime.encoder_session import EncoderSession, is_encoder_graph
from llmcli.runtime.vectors import Floats, Ids

_POOLS: dict[str, Callable[[Floats], Floats]] = {
    "cls": lambda states: states[0],
    "last": lambda states: states[-1],
    "mean": lambda states: states.mean(0),
    "max": lambda states: states.max(0),
}


class OnnxVectors:
    """A `VectorModel` over an encoder's graph, which gives its last states alone, and vectors as it pools itself."""

    layers, causal = 0, False

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self.session = EncoderSession(folder, threads=threads)
        facts = self.session.facts
        self.hidden_size, self.longest = self.session.hidden_size, facts.context
        pools = facts.kind == "base" and facts.pooling in _POOLS
        self.own = read_pooling(folder) or (Pooling(facts.pooling, facts.normalize) if pools else None)
        self._pools = facts.pooling if pools else None

    def states(self, texts: Sequence[Ids], layers: Sequence[int]) -> list[Floats]:
        """The last states of each text's tokens: (1, tokens, C) each."""
        return [states[None] for states in self.session.states([text.tolist() for text in texts])]

    def vectors(self, texts: Sequence[Ids], layers: Sequence[int], mode: str, *, normalized: bool) -> Floats:
        """A vector a text: (texts, 1, C); by the graph where it pools so, else from its states."""
        rows = [text.tolist() for text in texts]
        if mode == self._pools and normalized >= self.session.facts.normalize:
            return self.session.vectors(rows)[:, None]
        return np.stack([_POOLS[mode](states) for states in self.session.states(rows)])[:, None]

    def attentions(self, text: Ids) -> Floats:
        """Not to be had: fused operators never hold it."""
        raise UsageError("an ONNX folder does not give it; name the model that was exported", where="--attentions")

    def close(self) -> None:
        """Ends the threads."""
        self.session.close()


def open_onnx(folder: Path, *, device: str, threads: int | None, precision: str) -> OnnxVectors:
    """Opens an encoder's folder on the CPU. Raises UsageError for another device or precision, and for a decoder."""
    if device not in ("auto", "cpu"):
        raise UsageError(
            "encoders of ONNX run on the cpu; elsewhere give the model that was exported", where="--device"
        )
    if precision != "auto":
        raise UsageError("an ONNX folder has the precision of its export", where="--precision")
    if not is_encoder_graph(folder / GRAPH):
        raise UsageError(
            "is a decoder as ONNX, which gives no states; name the model that was exported", where=str(folder)
        )
    return OnnxVectors(folder, threads=threads)
