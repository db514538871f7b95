"""Exact search: the rows of a mapped array that are nearest to a vector, block by block.

Invariant: every row is looked at, so nothing is missed; of rows kept as bytes those that come first are scored once
more by the vector itself, so the bytes' own rounding is all that a score lacks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.data.cores import available_cores
from llmcli.onnx.byte_scores import ZERO, byte_scores

Floats = npt.NDArray[np.float32]
_ROWS = 8192  # of a block
_AGAIN = 8  # times as many rows of bytes as are wanted are scored again; at least _LEAST
_LEAST = 64


def to_bytes(vectors: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Rows as bytes, 128 for 0, and each one's step: (n, C) -> (n, C), (n,). Row r is about (bytes - 128) x step."""
    steps = np.maximum(np.abs(vectors).max(axis=1), 1e-30) / 127
    return (np.rint(vectors / steps[:, None]) + ZERO).astype(np.uint8), steps.astype(np.float32)


class Nearest:
    """Rows that are searched: float32, or bytes with their steps."""

    def __init__(self, rows: npt.NDArray[Any], steps: Floats | None = None, *, threads: int | None = None) -> None:
        self.rows, self.steps = rows, steps
        self._engine: Any = None
        if steps is not None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads or available_cores()
            graph = byte_scores(rows.shape[1])
            self._engine = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def search(self, vector: Floats, count: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """The `count` rows with the greatest products with the vector, and those, greatest first."""
        if self.steps is None:
            return self._best(lambda begin, end: self.rows[begin:end] @ vector, count)
        step = max(float(np.abs(vector).max()), 1e-30) / 127
        narrow = np.rint(vector / step).astype(np.int8)[:, None]
        steps = self.steps

        def rough(begin: int, end: int) -> Floats:
            (sums,) = self._engine.run(None, {"rows": self.rows[begin:end], "vector": narrow})
            found: Floats = sums[:, 0] * steps[begin:end]
            return found

        places, _ = self._best(rough, max(_AGAIN * count, _LEAST))
        wide = (self.rows[places].astype(np.float32) - np.float32(ZERO)) * steps[places, None]
        scores: Floats = wide @ vector
        order = np.argsort(-scores, kind="stable")[:count]
        return places[order], scores[order]

    def _best(self, score: Any, count: int) -> tuple[npt.NDArray[np.int64], Floats]:
        places, scores = np.empty(0, np.int64), np.empty(0, np.float32)
        for begin in range(0, len(self.rows), _ROWS):
            found = score(begin, min(begin + _ROWS, len(self.rows)))
            best = np.argpartition(-found, count - 1)[:count] if len(found) > count else np.arange(len(found))
            places, scores = np.concatenate([places, best + begin]), np.concatenate([scores, found[best]])
            if len(scores) > 4 * count:
                kept = np.argpartition(-scores, count - 1)[:count]
                places, scores = places[kept], scores[kept]
        order = np.lexsort((places, -scores))[:count]
        return places[order], scores[order]
