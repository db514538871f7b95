"""Exact search: the rows of a mapped array that are nearest to a vector.

Invariant: nothing is missed. Rows are scored as bytes first, which reads a quarter of the memory; how far such a score
can be from the true one is known for each row, and every row that may be among the nearest is scored by its floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.data.cores import available_cores
from llmcli.files.vector_index import ZERO
from llmcli.onnx.byte_scores import byte_scores

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
_BLOCK = 1 << 27  # bytes of rows that are scored at once
_ROUNDING = 1e-5  # of the sums of floats
_LONGEST = 1.1  # no row is longer, its rounding to bytes included
_SHARE = 16  # where more than this part of the rows may be among the nearest, all of them are scored by their floats
_AGAIN, _LEAST = 8, 64  # of bytes alone: so many times as many rows as are wanted are scored by the vector itself


class Nearest:
    """Rows of length 1: their bytes, what one of a row's bytes is worth, and, where they are kept, the floats."""

    def __init__(
        self, codes: npt.NDArray[np.uint8], steps: Floats, rows: Floats | None = None, *, threads: int | None = None
    ) -> None:
        import onnxruntime

        self.codes, self.steps, self.rows = codes, steps, rows
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        graph = byte_scores(codes.shape[1])
        self._engine: Any = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def search(self, vector: Floats, count: int) -> tuple[Places, Floats]:
        """The `count` rows with the greatest products with a vector of length 1, and those, greatest first."""
        step = max(float(np.abs(vector).max()), 1e-30) / 127
        narrow = np.rint(vector / step).astype(np.int8)
        rough = self._rough(narrow[:, None]) * step
        count = min(count, len(rough))
        if self.rows is None:
            places: Places = _greatest(rough, min(len(rough), max(_AGAIN * count, _LEAST)))
        else:
            # A row is half a step of each number from its bytes at most, the vector as far as its own rounding went.
            lost = float(np.linalg.norm(vector - step * narrow))
            slack = self.steps * (0.5 * len(vector) ** 0.5) + (_LONGEST * lost + _ROUNDING)
            least = np.partition(rough - slack, len(rough) - count)[len(rough) - count]
            places = np.flatnonzero(rough + slack >= least)
            if len(places) * _SHARE > len(rough):
                return _ordered(np.arange(len(rough)), self.rows @ vector, count)
        return self.best_of(places, vector, count)

    def best_of(self, places: Places, vector: Floats, count: int) -> tuple[Places, Floats]:
        """The same among some rows alone, scored by their floats; where those are not kept, by their bytes."""
        if self.rows is None:
            wide = (self.codes[places].astype(np.float32) - np.float32(ZERO)) * self.steps[places, None]
        else:
            wide = self.rows[places]
        return _ordered(places, wide @ vector, count)

    def _rough(self, narrow: npt.NDArray[np.int8]) -> Floats:
        """The scores of the bytes, in steps of the vector."""
        found = np.empty(len(self.codes), np.float32)
        size = max(1, _BLOCK // self.codes.shape[1])
        for begin in range(0, len(found), size):
            (sums,) = self._engine.run(None, {"rows": self.codes[begin : begin + size], "vector": narrow})
            found[begin : begin + size] = sums[:, 0]
        return found * self.steps


def _ordered(places: Places, scores: npt.NDArray[Any], count: int) -> tuple[Places, Floats]:
    order = np.lexsort((places, -scores))[:count]
    return places[order], np.asarray(scores[order], np.float32)


def _greatest(scores: Floats, count: int) -> Places:
    return np.argpartition(-scores, count - 1)[:count]
