"""Duplicates: equal documents by a 128-bit hash of their text, similar ones by MinHash.

Invariant: what is held of a document is of fixed size: about 30 bytes for equality, 300 for similarity, whatever its
length. The first of several alike is kept, so the result depends on the order of the documents alone.

Similar means that the sets of five-word runs (letters of scripts without spaces count as words) overlap: of pairs with
Jaccard similarity 0.9 nine in ten are found, of 0.8 one in three, of 0.5 one in a thousand. The signatures are made by
the library rensa; cutting them into bands whose equality is the match is Broder's and Indyk's scheme (1997, 1998).
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Sequence

from llmcli.errors import MissingExtraError

DIGEST = 16  # bytes
BANDS, ROWS = 9, 14  # threshold about (1/9)^(1/14) = 0.85
_SHINGLE = 5
_SEED = 42  # of the permutations; no option, so that two corpora agree on what is similar
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u0e00-\uffff]+"
)


def digest_of(text: bytes) -> bytes:
    """128 bits that stand for a text (UTF-8)."""
    return hashlib.blake2b(text, digest_size=DIGEST).digest()


class DigestSet:
    """A set of 128-bit digests in 21 to 43 bytes each: open addressing in one array; Python's set takes 120."""

    def __init__(self) -> None:
        self.count = 0
        self._slots = array("Q", bytes(16 * 1024))  # pairs of words; the first is 0 where a slot is free
        self._mask = 1023

    def add(self, digest: bytes) -> bool:
        """Whether the digest is new; it is in the set after."""
        first = int.from_bytes(digest[:8], "little") or 1
        second = int.from_bytes(digest[8:16], "little")
        place = self._find(first, second)
        if self._slots[place]:
            return False
        self._slots[place], self._slots[place + 1] = first, second
        self.count += 1
        if self.count * 4 > self._mask * 3:
            self._grow()
        return True

    def __contains__(self, digest: bytes) -> bool:
        first = int.from_bytes(digest[:8], "little") or 1
        return self._slots[self._find(first, int.from_bytes(digest[8:16], "little"))] != 0

    def _find(self, first: int, second: int) -> int:
        slots, mask = self._slots, self._mask
        place = (first & mask) * 2
        while slots[place] and (slots[place] != first or slots[place + 1] != second):
            place = (place + 2) & (mask * 2 + 1)
        return place

    def _grow(self) -> None:
        old = self._slots
        self._mask = self._mask * 2 + 1
        self._slots = array("Q", bytes(16 * (self._mask + 1)))
        for place in range(0, len(old), 2):
            if old[place]:
                free = self._find(old[place], old[place + 1])
                self._slots[free], self._slots[free + 1] = old[place], old[place + 1]


class SimilarSet:
    """The band keys of the documents that were kept."""

    def __init__(self) -> None:
        self._keys = DigestSet()

    def add(self, keys: Sequence[bytes]) -> bool:
        """Whether no kept document is similar; then this one is kept."""
        if any(key in self._keys for key in keys):
            return False
        for key in keys:
            self._keys.add(key)
        return True


def band_keys(texts: Sequence[str]) -> list[list[bytes]]:
    """The keys of each text: two texts that share one are taken for similar. Raises MissingExtraError without rensa."""
    if not texts:
        return []
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise MissingExtraError("rensa", "data", "--dedup near") from error
    rows = RMinHash.digests_from_token_sets([_shingles(text) for text in texts], BANDS * ROWS, _SEED)
    keys = []
    for row in rows:
        signature = array("I", row).tobytes()
        width = len(signature) // BANDS
        bands = (signature[band * width : (band + 1) * width] for band in range(BANDS))
        keys.append([digest_of(bytes([number]) + band) for number, band in enumerate(bands)])
    return keys


def _shingles(text: str) -> list[str]:
    words = _WORD.findall(text.casefold())
    if len(words) <= _SHINGLE:
        return [" ".join(words)] if words else [text]
    runs = zip(*(words[start:] for start in range(_SHINGLE)), strict=False)
    return [" ".join(run) for run in runs]
