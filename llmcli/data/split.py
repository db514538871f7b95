"""Train and validation: which document, or which end of the text, is held out.

Invariant: by hash a document's part depends on its text, the fraction and the seed alone, so equal documents are on one
side and a corpus that grows keeps its split. By tail the last characters are held out, from a line's begin on; a copy
of a training document that stands there goes to training too.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from llmcli.config import CorpusConfig
from llmcli.data import pii, readers
from llmcli.data.dedup import digest_of
from llmcli.data.readers import Document, pieces
from llmcli.errors import DataError

ENOUGH_DOCUMENTS = 20  # fewer are split by the tail
_ENOUGH_HELD_OUT = 10  # so many seen on each side: the hash does, the rest need not be looked at
_LOPSIDED = 3  # times more or less text than the fraction asks for


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    text: str
    source: str
    line: int
    first: bool
    final: bool
    part: str = ""  # train or val where the tail decides, else "": the hash does
    sentence: bool = False  # of the document before it


def kept_pieces(documents: Iterable[Document], min_chars: int, dropped: Counter[str]) -> Iterator[Piece]:
    """The documents that are neither empty nor too short, in pieces. What is dropped is counted as `empty`, `short`."""
    first = True
    for document in documents:
        if first and document.final:
            if not document.text or document.text.isspace():
                dropped["empty"] += 1
                continue
            if len(document.text) < min_chars:
                dropped["short"] += 1
                continue
        if len(document.text) <= readers.PIECE:
            yield Piece(document.text, document.source, document.line, first, document.final)
            first = document.final
            continue
        line = document.line
        # A record of JSON or CSV comes whole; it is cut in the same places as a file with that text.
        for text, last in pieces(iter((document.text,))):
            final = last and document.final
            yield Piece(text, document.source, line, first, final)
            line += text.count("\n")
            first = final


@dataclasses.dataclass
class Split:
    """The rule of a corpus."""

    by: str  # none, hash, tail
    fraction: float
    seed: int
    begin: int = 0  # tail: characters before it
    characters: int = 0  # tail: in all
    place: str = ""  # tail: file:line where it begins, once it was passed

    def part_of(self, digest: bytes) -> str:
        """train or val, by the digest of a document's text."""
        if self.by != "hash":
            return "train"
        key = self.seed.to_bytes(8, "little")
        value = int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest(), "little")
        return "val" if value < self.fraction * 2.0**64 else "train"

    def divide(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces with their part; by tail the one that lies across its begin becomes two documents.

        Raises DataError where the text is not the one that the tail was measured in.
        """
        if self.by != "tail":
            yield from pieces
            return
        passed = 0
        for piece in pieces:
            cut = self.begin - passed
            passed += len(piece.text)
            if self.place or cut <= 0:
                self.place = self.place or f"{piece.source}:{piece.line}"
                yield dataclasses.replace(piece, part="val")
                continue
            if cut < len(piece.text):
                cut = _line_begin(piece, cut, alone=passed == len(piece.text))
            if cut >= len(piece.text):
                yield dataclasses.replace(piece, part="train")
                continue
            line = piece.line + piece.text.count("\n", 0, cut)
            self.place = f"{piece.source}:{line}"
            if cut:
                yield dataclasses.replace(piece, text=piece.text[:cut], final=True, part="train")
            first = piece.first or cut > 0
            yield dataclasses.replace(piece, text=piece.text[cut:], line=line, first=first, part="val")
        if passed != self.characters:
            raise DataError(f"the text changed while it was read: {passed:,} characters, before {self.characters:,}")

    def description(self) -> dict[str, Any]:
        """For corpus.json."""
        facts: dict[str, Any] = {"by": self.by, "fraction": self.fraction}
        if self.by == "hash":
            facts["seed"] = self.seed
        if self.by == "tail":
            facts["place"] = self.place
        return facts


def _line_begin(piece: Piece, cut: int, *, alone: bool) -> int:
    """The begin of the line that is next to `cut`, so that both sides hold text.

    A piece of one line is cut only where there is no other text: else it is held out whole.
    """
    text = piece.text
    after = text.find("\n", cut - 1) + 1
    if after and not text[after:].isspace() and after < len(text):
        return after
    before = text.rfind("\n", 0, cut) + 1
    if before and not text[:before].isspace():
        return before
    if alone:
        space = text.rfind(" ", 0, cut)
        return space if space > 0 else cut
    return 0 if piece.first else len(text)


class SplitScan:
    """Looks at the documents, as many as it takes, to decide how they are split."""

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self.by_hash = Split("hash", config.val_fraction, config.seed)
        self.characters = 0
        self.documents: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        self.part = "train"

    def take(self, piece: Piece) -> bool:
        """Whether more must be seen."""
        self.characters += len(piece.text)
        if self.config.val_by != "auto":
            return True
        if piece.first:
            # Hash what the corpus will hold. With few documents the hash plays no part, so long ones cost nothing.
            text = pii.scrub(piece.text)[0] if self.config.scrub_pii and piece.final else piece.text
            self.part = self.by_hash.part_of(digest_of(text.encode()))
            self.documents[self.part] += 1
        self.sizes[self.part] += len(piece.text)
        return self.documents.total() < ENOUGH_DOCUMENTS or min(self.documents["train"], self.documents["val"]) < (
            _ENOUGH_HELD_OUT
        )

    def decide(self) -> Split:
        """The split, from what was seen."""
        share = self.sizes["val"] / max(1, self.characters)
        fair = self.config.val_fraction / _LOPSIDED <= share <= self.config.val_fraction * _LOPSIDED
        enough = self.documents.total() >= ENOUGH_DOCUMENTS and self.documents["val"] and self.documents["train"]
        many = min(self.documents["train"], self.documents["val"]) >= _ENOUGH_HELD_OUT
        if self.config.val_by == "auto" and enough and (fair or many):
            return self.by_hash
        begin = self.characters - round(self.characters * self.config.val_fraction)
        return Split("tail", self.config.val_fraction, self.config.seed, begin, self.characters)
