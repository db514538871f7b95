"""WordPiece vocabularies (BERT's): learned by merging characters of counted words, commonest pair first.

A word's first character and its later ones are different symbols, the later written with `##`; two neighbours become
one token by dropping the second's mark. This is how the tokenizers library learns WordPiece too, with one difference:
its order of equals follows a randomly seeded hash table, ours the pairs themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from llmcli.data.bpe import Learner

MARK = "##"


def alphabet_of(words: Mapping[str, int], largest: int, min_frequency: int) -> list[str]:
    """The commonest characters, in the order of their code points; the others make a word unknown."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    common = sorted(counts, key=lambda character: (-counts[character], character))[:largest]
    return sorted(character for character in common if counts[character] >= min_frequency)


def learn_pieces(words: Mapping[str, int], alphabet: list[str], count: int, min_frequency: int) -> Iterator[str]:
    """Yields up to `count` pieces beyond the characters, commonest first."""
    symbols = [*alphabet, *(MARK + character for character in alphabet)]
    number = {character: index for index, character in enumerate(alphabet)}
    known = {word: weight for word, weight in words.items() if word and all(letter in number for letter in word)}
    flat = np.fromiter(
        (number[letter] + (place > 0) * len(alphabet) for word in known for place, letter in enumerate(word)),
        dtype=np.int32,
    )
    lengths = np.fromiter(map(len, known), dtype=np.int64, count=len(known))
    counts = np.fromiter(known.values(), dtype=np.int64, count=len(known))
    learner = Learner(flat, lengths, counts, symbols, _descending, min_frequency, join=_join)
    for _ in range(count):
        found = learner.step()
        if found is None:
            return
        yield _join(found[0], found[1])


def _join(left: str, right: str) -> str:
    return left + right.removeprefix(MARK)


def _descending(token: str) -> str:
    """A key whose ascending order is the descending order of tokens; the end sorts after every character."""
    return "".join(chr(max(0, 0x10FFFE - ord(character))) for character in token) + "\U0010ffff"
