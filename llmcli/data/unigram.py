"""The unigram language model of subwords: learned from counted words, on bytes.

The method is Kudo's ("Subword Regularization", 2018): take far too many pieces, fit their probabilities by expectation
maximization over all ways to cut the words, drop the pieces that are missed least, and repeat. The details are
sentencepiece's: a digamma in the maximization, a piece below half an expected occurrence leaves, a quarter is dropped
at a time.

Why of our own: the tokenizers library's trainer adds up floating-point numbers in the order of a randomly seeded hash
table, so that each run gives another file; and its memory has no bound.

Invariant: the result is a function of the words and their counts, whatever the order of the words, to the last bit:
they are sorted first, and every sum is taken in one fixed order.

How: the words lie in one array. All their substrings that occur twice and end between characters are found level by
level, like the nodes of a trie; each occurrence of a piece is an edge from the place where it begins to the place where
it ends. The edges that end at the same distance from the begin of their words are summed up in one numpy operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LONGEST_PIECE = 16  # bytes
LONGEST_WORD = 48  # bytes; the rest of a longer word is left out. The product of so many probabilities is above 1e-300
_SEEDS = 10  # times the size of the vocabulary
_SHRINK = 0.75
_ROUNDS = 2  # of expectation maximization between two prunings
_LOWEST = 1e-6  # probability, so that every byte stays possible

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Edges:
    """Occurrences of pieces in the words: from place `begin` to place `end`, which is piece `piece`.

    Sorted by how far from the begin of the word they end, then by `end`; `back` is their order by how far from it they
    begin, then by `begin`.
    """

    begin: Ints
    end: Ints
    piece: Ints
    back: Ints

    def keep(self, chosen: NDArray[np.bool_]) -> _Edges:
        back = self.back[chosen[self.back]]
        number = np.cumsum(chosen, dtype=np.int32) - 1
        return _Edges(self.begin[chosen], self.end[chosen], self.piece[chosen], number[back])


@dataclass(frozen=True)
class UnigramStep:
    """A pruning: how many pieces are left, and of how many."""

    pieces: int
    wanted: int


class UnigramLearner:
    """Learns `count` pieces, the 256 bytes among them. Then `pieces` holds (bytes, log probability), best first."""

    def __init__(self, words: Mapping[str, int], count: int) -> None:
        encoded = sorted((word.encode("utf-8")[:LONGEST_WORD], weight) for word, weight in words.items())
        self.count = max(256, count)
        self.lattice = _Lattice([word for word, _ in encoded], np.array([weight for _, weight in encoded], np.float64))
        self.pieces: list[tuple[bytes, float]] = []

    def run(self) -> Iterator[UnigramStep]:
        """Learns, and tells of each pruning."""
        pieces, edges, scores = self.lattice.seeds(_SEEDS * self.count)
        probabilities = scores / scores.sum()
        while True:
            for _ in range(_ROUNDS):
                expected = self.lattice.expect(edges, probabilities)
                pieces, edges, expected = _drop(pieces, edges, expected, (expected >= 0.5) | _single(pieces))
                probabilities = _maximize(expected)
            yield UnigramStep(len(pieces), self.count)
            if len(pieces) <= self.count:
                break
            left = max(self.count, int(len(pieces) * _SHRINK))
            loss = expected * (np.log(probabilities) - _second_best(pieces, probabilities))
            pieces, edges, expected = _drop(pieces, edges, expected, _greatest(loss, pieces, left))
            probabilities = _maximize(expected)
        order = sorted(range(len(pieces)), key=lambda index: (-probabilities[index], pieces[index]))
        self.pieces = [(pieces[index], float(np.log(probabilities[index]))) for index in order]


def _single(pieces: list[bytes]) -> NDArray[np.bool_]:
    """Which pieces are single bytes: they stay, whatever happens."""
    return np.array([len(piece) == 1 for piece in pieces])


def _greatest(loss: Floats, pieces: list[bytes], count: int) -> NDArray[np.bool_]:
    """The `count` pieces with the greatest loss, bytes first; equal ones in the order of the pieces."""
    order = np.lexsort((np.arange(len(pieces)), -loss, ~_single(pieces)))
    chosen = np.zeros(len(pieces), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def _drop(
    pieces: list[bytes], edges: _Edges, expected: Floats, chosen: NDArray[np.bool_]
) -> tuple[list[bytes], _Edges, Floats]:
    """Only the chosen pieces, numbered anew."""
    number = np.cumsum(chosen, dtype=np.int32) - 1
    kept = edges.keep(chosen[edges.piece])
    kept = _Edges(kept.begin, kept.end, number[kept.piece], kept.back)
    return [piece for piece, stays in zip(pieces, chosen.tolist(), strict=True) if stays], kept, expected[chosen]


def _maximize(expected: Floats) -> Floats:
    """Probabilities from expected counts; the digamma function favours the frequent (a sparse Dirichlet prior)."""
    counts = np.maximum(expected, 0.5)
    logarithms = _digamma(counts) - _digamma(counts.sum(keepdims=True))
    return np.maximum(np.exp(logarithms), _LOWEST)


def _digamma(values: Floats) -> Floats:
    """The derivative of log gamma: up by the recurrence until 7, then the asymptotic series (Abramowitz, 6.3.18)."""
    values, result = values.copy(), np.zeros_like(values)
    while (small := values < 7).any():
        result[small] -= 1 / values[small]
        values[small] += 1
    inverse = 1 / (values * values)
    series = inverse * (1 / 12 - inverse * (1 / 120 - inverse * (1 / 252 - inverse * (1 / 240 - inverse / 132))))
    result += np.log(values) - 0.5 / values - series
    return result


def _second_best(pieces: list[bytes], probabilities: Floats) -> Floats:
    """The log probability of the best way to write each piece with other pieces; there is none for a byte: 0."""
    scores = dict(zip(pieces, np.log(probabilities).tolist(), strict=True))
    return np.array([_best_without(piece, scores) if len(piece) > 1 else 0.0 for piece in pieces])


def _best_without(piece: bytes, scores: Mapping[bytes, float]) -> float:
    best = [0.0] + [-np.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for begin in range(end == len(piece), end):
            score = scores.get(piece[begin:end])
            if score is not None and best[begin] + score > best[end]:
                best[end] = best[begin] + score
    return best[-1]


class _Lattice:
    """The words in one array, each followed by a place of its own, its end."""

    def __init__(self, words: list[bytes], weights: Floats) -> None:
        lengths = np.array([len(word) for word in words], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(word + b"\0" for word in words), dtype=np.uint8)
        self.ends = (np.cumsum(lengths + 1) - 1).astype(np.int32)
        self.begins = (self.ends - lengths).astype(np.int32)
        self.weights = weights
        self.weight_at = np.repeat(weights, lengths + 1)
        self.distance = np.arange(len(self.bytes)) - np.repeat(self.begins, lengths + 1)  # from the word's begin
        self.inside = np.ones(len(self.bytes), dtype=bool)
        self.inside[self.ends] = False
        continuation = (self.bytes & 0xC0) == 0x80
        self.between_characters = ~continuation | ~self.inside

    def seeds(self, count: int) -> tuple[list[bytes], _Edges, Floats]:
        """The bytes and the best substrings, by count times length; with their occurrences and these scores."""
        place = np.flatnonzero(self.inside).astype(np.int32)
        found = [(place, place + 1, self.bytes[place].astype(np.int32))]  # begin, end, piece
        pieces = [bytes([value]) for value in range(256)]
        scores, sizes, firsts = [np.zeros(0)], [], [np.zeros(0, dtype=np.int32)]
        begin = place[self.between_characters[place]]
        node = self.bytes[begin].astype(np.int64)
        total = 0
        for length in range(2, LONGEST_PIECE + 1):
            alive = self.inside[begin + (length - 1)]
            begin, node = begin[alive], node[alive] * 256 + self.bytes[begin[alive] + (length - 1)]
            if len(begin) == 0:
                break
            _, first, node = np.unique(node, return_index=True, return_inverse=True)
            counts = np.bincount(node, self.weight_at[begin])
            common = counts >= 2
            alive = common[node]
            node = (np.cumsum(common) - 1)[node[alive]]
            begin, first, counts = begin[alive], begin[first[common]], counts[common]
            whole = self.between_characters[first + length]  # a string ends a character everywhere or nowhere
            number = np.where(whole, np.cumsum(whole) - 1 + total, -1).astype(np.int32)
            edge = number[node] >= 0
            found.append((begin[edge], begin[edge] + np.int32(length), number[node][edge]))
            scores.append(counts[whole] * length)
            firsts.append(first[whole])
            sizes += [length] * len(firsts[-1])
            total += len(firsts[-1])
            node = node.astype(np.int64)
        best = np.concatenate(scores)
        chosen = np.zeros(total, dtype=bool)
        chosen[np.lexsort((np.arange(total), -best))[: max(0, count - 256)]] = True
        number = np.cumsum(chosen, dtype=np.int32) + 255
        whole_text = self.bytes.tobytes()
        places = np.concatenate(firsts)
        pieces += [whole_text[places[index] : places[index] + sizes[index]] for index in np.flatnonzero(chosen)]
        kept = [found[0]]
        for begin, end, piece in found[1:]:
            stays = chosen[piece]
            kept.append((begin[stays], end[stays], number[piece[stays]]))
        single = np.bincount(kept[0][2], self.weight_at[place], minlength=256)
        edges = self._sorted(*(np.concatenate(part) for part in zip(*kept, strict=True)))
        return pieces, edges, np.maximum(np.concatenate([single, best[chosen]]), 0.5)

    def _sorted(self, begin: Ints, end: Ints, piece: Ints) -> _Edges:
        order = np.lexsort((begin, end, self.distance[end]))
        begin, end, piece = begin[order], end[order], piece[order]
        return _Edges(begin, end, piece, np.lexsort((end, begin, self.distance[begin])).astype(np.int32))

    def expect(self, edges: _Edges, probabilities: Floats) -> Floats:
        """How often each piece is expected, over all ways to cut the words (the forward-backward algorithm)."""
        chance = probabilities[edges.piece]
        forward = np.zeros(len(self.bytes))
        forward[self.begins] = 1
        steps = np.searchsorted(self.distance[edges.end], np.arange(LONGEST_WORD + 2))
        for first, last in zip(steps[1:-1].tolist(), steps[2:].tolist(), strict=True):
            part = slice(first, last)
            if first < last:
                _add_groups(forward, edges.end[part], forward[edges.begin[part]] * chance[part])
        backward = np.zeros(len(self.bytes))
        backward[self.ends] = 1
        begin, end, likely = edges.begin[edges.back], edges.end[edges.back], chance[edges.back]
        steps = np.searchsorted(self.distance[begin], np.arange(LONGEST_WORD + 1))
        for first, last in reversed(list(zip(steps[:-1].tolist(), steps[1:].tolist(), strict=True))):
            part = slice(first, last)
            if first < last:
                _add_groups(backward, begin[part], backward[end[part]] * likely[part])
        of_word = np.zeros(len(self.bytes))
        of_word[self.begins] = self.weights / np.maximum(forward[self.ends], 1e-320)
        per_word = of_word[edges.begin - self.distance[edges.begin]]
        share = forward[edges.begin] * chance * backward[edges.end] * per_word
        return np.bincount(edges.piece, share, minlength=len(probabilities)).astype(np.float64)


def _add_groups(sums: Floats, places: Ints, values: Floats) -> None:
    """Sets the sum of the values of each place; equal places stand together."""
    first = np.flatnonzero(np.append(True, places[1:] != places[:-1]))
    sums[places[first]] = np.add.reduceat(values, first)
