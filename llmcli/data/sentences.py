"""Sentences of a text: cut at line ends, and behind a mark that ends a sentence where something new begins.

A rule of thumb, for training on sentences, where a wrong cut costs little: an abbreviation before a capital letter is
taken for an end.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

from llmcli.data.split import Piece

_ENDS = re.compile(r"""(?<=[.!?…])["'”’)\]]*\s+(?=["'“‘(\[]*[A-Z0-9À-ÞЀ-Я])|(?<=[。！？])|\n+""")
_LEAST_WORDS = 3  # what is shorter is a heading, a name, a number


def sentences_of(text: str, *, least_words: int = _LEAST_WORDS) -> list[str]:
    """The sentences of a text with at least so many words, or, in scripts without spaces, eight characters."""
    parts = (" ".join(part.split()) for part in _ENDS.split(text) if part)
    return [part for part in parts if part.count(" ") + 1 >= least_words or (len(part) >= 8 and not part.isascii())]


def with_sentences(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Each piece, then its sentences; none where the tail holds it out, or where it is one sentence and no more.

    A long document comes in pieces, which are cut at line ends where there are any: its sentences lie between them.
    """
    for piece in pieces:
        yield piece
        if piece.part == "val":
            continue
        found = sentences_of(piece.text)
        if len(found) > 1 or not (piece.first and piece.final):
            for text in found:
                yield dataclasses.replace(piece, text=text, first=True, final=True, sentence=True)
