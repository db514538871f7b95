"""A session's one row, and what it holds: a prompt that begins as the last one did costs only what is new.

Invariant: `held` are ids that the session's row holds, in order; while that is not sure, it is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmcli.runtime.session import Logits, Session

_PIECE = 512  # tokens between two looks at whether to go on


class StoppedPrefill(Exception):
    """The prompt was not read to its end, as `go_on` said no."""


class Prefix:
    """Puts prompts into a session's one row, from where they differ from what it holds."""

    def __init__(self, session: Session, go_on: Callable[[], bool] = lambda: True) -> None:
        self.session, self.go_on = session, go_on
        self.held: list[int] = []
        self.reused = 0  # tokens of the last prompt that were there already

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Logits after the prompt: (1, V). Raises StoppedPrefill between two pieces of it."""
        # The last token is always fed: its logits are asked for.
        common = place = min(common_length(self.held, ids), len(ids) - 1)
        self.held, self.reused = [], common
        if common:
            self.session.rewind(common)
        logits: Logits | None = None
        while place < len(ids):
            if place > common and not self.go_on():
                self.held = list(ids[:place])
                raise StoppedPrefill
            piece = list(ids[place : place + _PIECE])
            logits = self.session.feed(np.array([piece], np.int64))[:, -1] if place else self.session.start([piece])
            place += len(piece)
        assert logits is not None
        self.held = list(ids)
        return logits

    def settle(self, ids: Sequence[int]) -> None:
        """After decoding: the row grew along `ids`, all of which but the last ones were fed."""
        lengths = self.session.lengths
        self.held = list(ids[: lengths[0]]) if len(lengths) == 1 else []

    def forget(self) -> None:
        """What the session holds is not sure."""
        self.held = []


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common at their begin."""
    size = min(len(first), len(second))
    differ = np.flatnonzero(np.array(first[:size]) != np.array(second[:size]))
    return int(differ[0]) if len(differ) else size
