"""Whole characters: which tokens may come next so that the bytes of a text stay UTF-8.

A byte-level vocabulary has tokens that are parts of characters. A model that is unsure may begin a character and go on
with something else; what comes out is then no text. Here such tokens have no probability, and all others what they had.

Invariant: a text whose every token was allowed is UTF-8 but for a character that it may have begun at its end.
Source: the well-formed byte sequences of the Unicode Standard, table 3-7 (RFC 3629, section 4).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

# State 0: between characters. 1 to 3: so many bytes of 80..BF are missing. 4 to 7: the next byte has a narrower range.
_STATES = 8
_BAD = -1
_LEADS = (
    (range(0x80), 0),
    (range(0xC2, 0xE0), 1),
    (range(0xE0, 0xE1), 4),
    (range(0xE1, 0xED), 2),
    (range(0xED, 0xEE), 5),
    (range(0xEE, 0xF0), 2),
    (range(0xF0, 0xF1), 6),
    (range(0xF1, 0xF4), 3),
    (range(0xF4, 0xF5), 7),
)
_NEXT = {
    1: (range(0x80, 0xC0), 0),
    2: (range(0x80, 0xC0), 1),
    3: (range(0x80, 0xC0), 2),
    4: (range(0xA0, 0xC0), 1),
    5: (range(0x80, 0xA0), 1),
    6: (range(0x90, 0xC0), 2),
    7: (range(0x80, 0x90), 2),
}


def _after(state: int, byte: int) -> int:
    """The state after a byte, _BAD where it cannot stand there."""
    if state:
        allowed, after = _NEXT[state]
        return after if byte in allowed else _BAD
    return next((after for lead, after in _LEADS if byte in lead), _BAD)


class Characters:
    """What each token of a vocabulary does to the bytes of a text; made once for all texts."""

    def __init__(self, tokens: Sequence[bytes], special: Collection[int]) -> None:
        # The state in which each token leaves a text, by the state that it finds: (states, V). Most tokens are whole
        # characters, which is quick to see.
        self.after = np.full((_STATES, len(tokens)), _BAD, np.int8)
        for identity, piece in enumerate(tokens):
            if identity in special or not piece or _is_whole(piece):
                self.after[0, identity] = 0
                continue
            for state in range(_STATES):
                found = state
                for byte in piece:
                    found = _after(found, byte)
                    if found == _BAD:
                        break
                self.after[state, identity] = found
        self.allowed = self.after != _BAD
        self.needed = bool((self.after[0] != 0).any())  # some token is not a text of its own

    def matcher(self) -> WholeCharacters | None:
        """A text at its begin; None where every token is whole, so that there is nothing to watch."""
        return WholeCharacters(self) if self.needed else None


def _is_whole(piece: bytes) -> bool:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


class WholeCharacters:
    """A text that grows by tokens which keep it UTF-8; a `sampling.TokenMask`."""

    ended = False  # it may always go on

    def __init__(self, characters: Characters) -> None:
        self._characters, self._state = characters, 0

    def copy(self) -> WholeCharacters:
        """Another text that stands where this one stands."""
        twin = WholeCharacters(self._characters)
        twin._state = self._state
        return twin

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next: (V,). All of them where none could: a vocabulary that lacks some bytes."""
        found: npt.NDArray[np.bool_] = self._characters.allowed[self._state]
        return found if found.any() else np.ones_like(found)

    def accept(self, identity: int) -> None:
        """Takes a token."""
        self._state = max(0, int(self._characters.after[self._state, identity]))
