"""Sessions: a model that runs. Token ids go in, logits of the last positions come out; nothing of text in here.

Invariant: a session's rows are independent: what one row gives does not depend on what its neighbours hold. Engines
(torch, onnxruntime) differ behind this interface alone, and a fake one makes decoding tests instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class Session(Protocol):
    """Rows of token ids behind a key/value cache."""

    vocab_size: int
    context: int  # tokens that a row can hold

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        ...

    def start(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Begins anew with a row for each prompt (at least one token each); logits after their last tokens: (rows, V)."""
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

    def close(self) -> None:
        """Lets memory go."""
        ...
