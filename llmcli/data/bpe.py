"""Byte-pair encoding: learning the merges of a byte-level vocabulary from counted words.

The algorithm is Sennrich, Haddow and Birch's ("Neural Machine Translation of Rare Words with Subword Units", 2016) on
bytes, as in GPT-2: merge the commonest pair of neighbouring tokens, again and again.

Invariant: the tie-break is exact. Among pairs of equal count the greatest wins, compared as a pair of byte strings.
So the merges are a function of the counts alone, and equal those of the plain loop in `tests/test_bpe.py`.

How it is fast (about 0.1 ms a merge): every place of every distinct word lies in one array, weighted by how often the
word occurs. A token keeps its place where it begins (`head`) and, for its right neighbour's sake, its id where it ends
(`tail`); as all occurrences of a pair have the same lengths, the neighbours of all of them stand at fixed distances and
one merge is a dozen numpy operations. A pair's places are listed once, when its younger half appears; a heap holds
upper bounds of the counts, and only a pair that comes up is counted again. Pairs below a floor (a sixteenth of the
commonest) are not listed at all: when the counts come down to it, the array is compacted, words that have become one
token leave, and the pairs are listed anew with a lower floor.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

_SEPARATOR, _INSIDE = -1, -2  # in `head`: between words, and within a token
_FLOOR_RATIO = 16
_COMPLEMENT = bytes(range(255, -1, -1))
_ONE = np.ones(1, dtype=bool)

T = TypeVar("T", bytes, str)
Ints = NDArray[np.int32]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Merge:
    """One merge: the two byte strings, and how often they stood side by side."""

    left: bytes
    right: bytes
    count: int


def learn_merges(
    words: Mapping[str, int], count: int, *, min_frequency: int = 2, forbidden: Collection[bytes] = ()
) -> Iterator[Merge]:
    """Yields up to `count` merges of bytes learned from words and their counts, in order.

    Stops early when no pair occurs `min_frequency` times. A pair that would make one of the `forbidden` byte strings
    (a special token, which plain text must never produce) is passed over.
    """
    encoded = [word.encode("utf-8") for word in words]
    symbols = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    counts = np.fromiter(words.values(), dtype=np.int64, count=len(words))
    del encoded
    alphabet = [bytes([value]) for value in range(256)]
    learner = Learner(symbols, lengths, counts, alphabet, _descending, min_frequency, forbidden)
    for _ in range(count):
        found = learner.step()
        if found is None:
            return
        yield Merge(*found)


class Learner(Generic[T]):
    """Merges symbols of any kind: bytes for BPE, characters for WordPiece.

    Ids are those of the alphabet, then the merges in order. `descending` gives a token's key, whose ascending order is
    the descending order of tokens; `join` makes the token that two neighbours become.
    """

    def __init__(
        self,
        symbols: NDArray[Any],  # ids of the alphabet, all words joined
        lengths: Counts,  # symbols of each word
        counts: Counts,  # how often each word occurs
        alphabet: list[T],
        descending: Callable[[T], str],
        min_frequency: int,
        forbidden: Collection[T] = (),
        join: Callable[[T, T], T] = operator.add,
    ) -> None:
        # A separator stands before, between and after the words.
        within = np.ones(len(symbols) + len(lengths) + 1, dtype=bool)
        within[0] = False
        within[np.cumsum(lengths + 1)] = False
        self.head: Ints = np.full(len(within), _SEPARATOR, dtype=np.int32)
        self.head[within] = symbols
        self.weight: Counts = np.zeros(len(within), dtype=np.int64)
        self.weight[within] = np.repeat(counts, lengths)
        self.tail = self.head
        self.tokens: list[T] = list(alphabet)
        self.order = [descending(token) for token in self.tokens]
        self.length = [1] * len(alphabet)  # places that a token takes since the last compaction
        self.min_frequency = max(1, min_frequency)
        self._descending: Callable[[T], str] = descending
        self._join: Callable[[T, T], T] = join
        self._forbidden: frozenset[T] = frozenset(forbidden)
        self.floor = 0
        # A pair: an upper bound of its count, negative, the key of the tie-break, and the ids. Its places in order.
        self.heap: list[tuple[int, str, str, int, int]] = []
        self.places: dict[tuple[int, int], Ints] = {}

    def step(self) -> tuple[T, T, int] | None:
        """The next merge, applied: its two tokens and their count. None when no pair is left that is common enough."""
        while True:
            found = self._commonest()
            if found is None:
                if self.floor == self.min_frequency:
                    return None
                self._list_pairs()
                continue
            left, right, count, places = found
            joined = self._join(self.tokens[left], self.tokens[right])
            if joined in self._forbidden:
                continue
            self._apply(left, right, joined, places)
            return self.tokens[left], self.tokens[right], count

    def _commonest(self) -> tuple[int, int, int, Ints] | None:
        """Takes the commonest pair from the heap, None when it occurs less often than the floor."""
        heap, head = self.heap, self.head
        while heap and -heap[0][0] >= self.floor:
            bound, left_key, right_key, left, right = heap[0]
            places = self.places[left, right]
            places = places[head[places] == left]
            places = places[head[places + self.length[left]] == right]
            count = int(self.weight[places].sum())
            if count == -bound:
                heapq.heappop(heap)
                del self.places[left, right]
                return left, right, count, places
            if count < self.floor:
                heapq.heappop(heap)
                del self.places[left, right]
            else:
                heapq.heapreplace(heap, (-count, left_key, right_key, left, right))
                self.places[left, right] = places
        return None

    def _apply(self, left: int, right: int, joined: T, places: Ints) -> None:
        """Merges a pair at its places and lists the pairs that come of it."""
        head, tail = self.head, self.tail
        left_length, right_length = self.length[left], self.length[right]
        if left == right:
            places = _without_overlaps(places, left_length)
        new = len(self.tokens)
        self.tokens.append(joined)
        self.order.append(self._descending(joined))
        self.length.append(left_length + right_length)
        ends = places + (left_length + right_length)
        head[places] = new
        head[places + left_length] = _INSIDE
        tail[ends - 1] = new
        weight = self.weight[places]
        # Where two new tokens stand side by side, each is the other's neighbour: the pair is listed from the left only.
        before, after = tail[places - 1], head[ends]
        for neighbour, group in _groups(before, before >= 0, places, weight, self.floor):
            self._push(neighbour, new, group[0] - self.length[neighbour], group[1])
        for neighbour, group in _groups(after, (after >= 0) & (after != new), places, weight, self.floor):
            self._push(new, neighbour, group[0], group[1])

    def _push(self, left: int, right: int, places: Ints, count: int) -> None:
        self.places[left, right] = places
        heapq.heappush(self.heap, (-count, self.order[left], self.order[right], left, right))

    def _list_pairs(self) -> None:
        """Compacts the array, lowers the floor and lists the pairs that reach it."""
        self._compact()
        head, weight, total = self.head, self.weight, len(self.tokens)
        starting = self.floor == 0
        self.floor = max(self.min_frequency, self.floor // _FLOOR_RATIO)
        self.heap, self.places = [], {}
        places: Ints = np.flatnonzero((head[:-1] >= 0) & (head[1:] >= 0)).astype(np.int32)
        if not starting:  # a pair is no commoner than its halves: most are out before the sorting
            inside = head >= 0
            common = np.bincount(head[inside], weight[inside], minlength=total) >= self.floor
            places = places[common[head[places]] & common[head[places + 1]]]
        codes: NDArray[Any] = head[places].astype(np.int64) * total + head[places + 1]
        if total <= 256:
            codes = codes.astype(np.uint16)  # 16 bits are sorted by radix
        if len(codes) == 0:
            return
        order = np.argsort(codes, kind="stable")
        codes, places = codes[order], places[order]
        first = np.flatnonzero(np.append(_ONE, codes[1:] != codes[:-1]))
        sums = np.add.reduceat(weight[places], first)
        if starting:
            self.floor = max(self.min_frequency, int(sums.max()) // _FLOOR_RATIO)
        last = np.append(first[1:], len(codes))
        kept = np.flatnonzero(sums >= self.floor)
        for pair, begin, end, count in zip(
            codes[first[kept]].tolist(), first[kept].tolist(), last[kept].tolist(), sums[kept].tolist(), strict=True
        ):
            self._push(pair // total, pair % total, places[begin:end].copy(), count)

    def _compact(self) -> None:
        """Gives each token one place again and drops the words that have become one token."""
        alive = self.head != _INSIDE
        head, weight = self.head[alive], self.weight[alive]
        separator = head == _SEPARATOR
        alone = np.zeros(len(head), dtype=bool)
        alone[1:-1] = separator[:-2] & separator[2:]
        kept = ~(alone & ~separator)
        kept[1:] &= ~(separator[1:] & ~kept[:-1])  # with a word goes the separator after it
        self.head, self.weight = head[kept], weight[kept]
        self.tail = self.head.copy()
        self.length = [1] * len(self.tokens)


def _descending(token: bytes) -> str:
    """A key whose ascending order is the descending order of byte strings; the end sorts after every byte."""
    return token.translate(_COMPLEMENT).decode("latin-1") + "\u0100"


def _without_overlaps(places: Ints, length: int) -> Ints:
    """Of pairs of a token with itself, which may overlap: every second of a run, from the left."""
    begins = np.append(_ONE, places[1:] != places[:-1] + length)[: len(places)]
    index = np.arange(len(places))
    run = np.maximum.accumulate(np.where(begins, index, 0))
    chosen: Ints = places[(index - run) % 2 == 0]
    return chosen


def _groups(
    neighbours: Ints, wanted: NDArray[np.bool_], places: Ints, weight: Counts, floor: int
) -> Iterator[tuple[int, tuple[Ints, int]]]:
    """(neighbour, (its places in order, their weight)) for each neighbour with at least the floor's weight."""
    chosen = np.flatnonzero(wanted)
    if len(chosen) == 0:
        return
    chosen = chosen[np.argsort(neighbours[chosen], kind="stable")]
    ids = neighbours[chosen]
    first = np.flatnonzero(np.append(_ONE, ids[1:] != ids[:-1]))
    sums = np.add.reduceat(weight[chosen], first)
    kept = np.flatnonzero(sums >= floor)
    if len(kept) == 0:
        return
    last = np.append(first[1:], len(ids))
    ordered = places[chosen]
    for neighbour, begin, end, count in zip(
        ids[first[kept]].tolist(), first[kept].tolist(), last[kept].tolist(), sums[kept].tolist(), strict=True
    ):
        yield neighbour, (ordered[begin:end], count)
