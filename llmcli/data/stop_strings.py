"""Stop strings in a stream of text: what may be the begin of one is held back until it is known.

Invariant: what was given out never holds a stop string or part of one that was met, wherever the pieces were cut.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Takes text piece by piece. `met` is the stop string that ended the text, None so far."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.met: str | None = None
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain by now; after a stop string was met, nothing more."""
        if self.met is not None or not piece:
            return ""
        if not self.stops:
            return piece
        text = self._held + piece
        # The one that ends first, as if the text came character by character; of two that end together the longer.
        found = [(text.find(stop), stop) for stop in self.stops]
        ends = [(begin + len(stop), begin, stop) for begin, stop in found if begin >= 0]
        if ends:
            _, begin, self.met = min(ends)
            self._held = ""
            return text[:begin]
        kept = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back, as the text is over."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the text's end are the begin of the stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
