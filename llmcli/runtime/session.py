"""Sessions: a model that runs. Token ids go in, logits of the last positions come out; nothing of text in here.

Invariant: a session's rows are independent: what one row gives does not depend on what its neighbours hold. Engines
(torch, onnxruntime) differ behind this interface alone, and a fake one makes decoding tests instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
States = npt.NDArray[np.floating[Any]]  # keys or values of a layer and a row: (K, tokens, D)
# Rounding, as of `Session.run_error`, with room: found were 1e-6, 4e-4 and 7e-3 (docs/log.md, "Speculation").
FLOAT_ERROR, HALF_ERROR, QUANTIZED_ERROR = 3e-5, 2e-3, 1.5e-2


class Session(Protocol):
    """Rows of token ids behind a key/value cache."""

    vocab_size: int
    context: int  # tokens that a row can hold
    # How far logits may be from a single step's where their token shares a run with those before it, as a share of the
    # largest; None: they are others, as all tokens of a run share a scale.
    run_error: float | None

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        ...

    def start(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Begins anew, a row for each prompt (one token at least); logits after their last tokens: (rows, V)."""
        ...

    def feed(self, ids: Ids, keep: int = 1) -> Logits:
        """Appends (rows, n) ids to the rows; logits of the last `keep` positions: (rows, keep, V).

        Raises UsageError when a row would pass the context.
        """
        ...

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """Forgets what lies beyond these lengths, one for all rows or one for each."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the rows named, in that order; a row named twice is copied."""
        ...

    def replace(self, row: int, prompt: Sequence[int]) -> Logits:
        """Puts a prompt (one token at least) in the place of what a row holds; logits after its last token: (V,).

        Raises UsageError when it would pass the context. The other rows stay as they are.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Puts the first `length` tokens that a row holds in the place of what another one holds, or it itself."""
        ...

    def export_row(self, row: int) -> list[States]:
        """What a row holds: layer by layer its keys and then its values, each (K, length, D), copies."""
        ...

    def import_row(self, states: Sequence[States]) -> None:
        """Begins anew with one row that holds what `export_row` gave, or the begin of it (fewer tokens, of all layers).

        Raises DataError where the states are not of this model's shapes or do not fit the context.
        """
        ...

    def score(self, ids: Ids, wanted: Mask) -> Logits:
        """Log-probabilities of ids[:, 1:], each given the row before it, where `wanted`, 0 elsewhere: (rows, n - 1).

        ids: (rows, n), wanted: (rows, n - 1), n at most context + 1. What the session holds stays as it is.
        """
        ...

    def close(self) -> None:
        """Lets memory go."""
        ...
