r"""Long texts in sections: cut at headings, else between paragraphs, lines, sentences, words, as coarsely as fits.

Invariant: joined, the sections are the text, character for character; each has at most `room`, as `measure` says, or is
one character.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_CUTS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"^(?=#{1,6}\s)|^(?=[^\n]+\n(?:={3,}|-{3,})\s*$)",  # before a heading, as Markdown has them
        r"(?:(?<=\n\n)|(?<=\n\r\n)|(?<=\n[ \t]\n))(?=\S)",  # behind a blank line
        r"(?<=\n)",
        r"(?<=[.!?])(?=\s)|(?<=[。！？])",
        r"(?=\s)",
        r"",
    )
)


def sections_of(text: str, measure: Callable[[str], int], room: int) -> list[str]:
    """The sections of a text, none where it has no character.

    `measure`: how much room a piece takes; of pieces together no more than their sum.
    """
    found: list[str] = []
    _cut(text, measure, room, 0, found)
    return found


def _cut(text: str, measure: Callable[[str], int], room: int, depth: int, found: list[str]) -> None:
    if not text:
        return
    if measure(text) <= room or len(text) == 1:
        found.append(text)
        return
    pieces = [piece for piece in _CUTS[depth].split(text) if piece]
    held, size = "", 0
    for piece in pieces:
        own = measure(piece)
        if held and size + own > room:
            found.append(held)
            held, size = "", 0
        if own <= room:
            held, size = held + piece, size + own
        else:
            _cut(piece, measure, room, min(depth + 1, len(_CUTS) - 1), found)
    if held:
        found.append(held)
