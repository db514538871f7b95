"""Rows of a portable graph, whose cache comes back longer from each run. Each row runs by itself.

Invariant: a row's arrays are never written to, so rows that were copied may share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmcli.runtime.session import Ids, Logits, States


class PortableRows:
    """Rows side by side, as `onnx_session.Rows`."""

    def __init__(self, engine: Any, shape: Any, count: int, chunk: int) -> None:
        self._engine, self._shape, self._chunk = engine, shape, chunk
        self.capacity = shape.context
        self.lengths = [0] * count
        names = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
        self._past, self._outputs = [f"past_key_values.{name}" for name in names], ["logits"]
        self._outputs += [f"present.{name}" for name in names]
        empty = np.zeros((1, shape.heads, 0, shape.head_dim), shape.dtype)
        self._caches = [[empty] * len(names) for _ in range(count)]

    def step(self, ids: Ids) -> Logits:
        """Appends a token to each row: (rows, 1) -> (rows, 1, V)."""
        return np.stack([self.extend(row, ids[row], 1) for row in range(len(ids))])

    def extend(self, row: int, ids: Ids, keep: int) -> Logits:
        """Appends tokens (n,) to one row; logits of the last `keep`: (keep, V)."""
        found = []
        for begin in range(0, len(ids), self._chunk):
            piece = ids[None, begin : begin + self._chunk]
            kept = keep - (len(ids) - begin - piece.shape[1])
            length = self.lengths[row] + piece.shape[1]
            given = {"input_ids": piece, "attention_mask": np.ones((1, length), np.int64)}
            given["num_logits_to_keep"] = np.array([max(kept, 1)], np.int64)
            given |= dict(zip(self._past, self._caches[row], strict=True))
            logits, *self._caches[row] = self._engine.run(self._outputs, given)
            self.lengths[row] = length
            if kept > 0:
                found.append(logits[0])
        return np.concatenate(found)

    def held(self, row: int) -> list[States]:
        """The keys and values of a row, layer by layer: each (K, length, D)."""
        return [cache[0] for cache in self._caches[row]]

    def hold(self, row: int, states: Sequence[States]) -> None:
        """Puts keys and values into a row, in place of what it holds."""
        self._caches[row] = [np.ascontiguousarray(array[None], self._shape.dtype) for array in states]
        self.lengths[row] = states[0].shape[1]

    def cut(self, row: int, length: int) -> None:
        """Forgets what a row holds beyond a length."""
        self._caches[row] = [cache[:, :, :length] for cache in self._caches[row]]
        self.lengths[row] = length

    def reserve(self, length: int) -> None:
        """Nothing: a run makes its own room."""

    def resize(self, chosen: Sequence[int], capacity: int) -> None:
        """Keeps the chosen rows, in that order."""
        self._caches = [list(self._caches[row]) for row in chosen]
        self.lengths = [self.lengths[row] for row in chosen]
