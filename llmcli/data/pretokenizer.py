r"""Pre-tokenization: the patterns that cut text into words; merges are learned, and applied, inside a word only.

Invariant: a pattern is written once and cuts alike in three engines: the tokenizers library (Oniguruma), tiktoken
(Rust's regex) and Python's `re`, with which we count. The first two know Unicode's properties; for the third the
members of each class are asked of the tokenizers library itself, so that training and encoding cannot disagree about
a letter that one Unicode version has and the other has not.

The default pattern is GPT-4's and Llama 3's (a letter run with at most one other character before it, numbers in
groups of at most three digits, punctuation with the line ends after it, line ends, white space) with three changes:

* Combining marks belong to letters (as in GPT-4o's pattern): without that, Devanagari, Arabic with vowel signs and
  decomposed accents break at every mark.
* No alternative for English contractions: `'t` and `'ll` come out as one word by the rule for letters, and quotations
  ('the cat') keep their first letter, which the contractions `'t`, `'s`, `'m`, `'d` would tear off. Measured at
  vocabulary 8,192: 3.712 bytes per token on WikiText-2 with and without, 3.163 and 3.167 on Shakespeare.
* Scripts written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are cut into pieces of at most 16
  characters. Uncut, a clause is one word, each clause is new, and counts and merges grow with the text. Shorter pieces
  cost compression, since words straddle the cuts: newspaper Chinese at vocabulary 8,192 gives 1.03 characters a token
  in pieces of 1, 1.24 of 2, 1.30 of 4, 1.36 of 8, 1.39 of 16, 1.40 uncut; and the share of token ends that are ends of
  words in a hand-made segmentation rises with it: 0.61, 0.68, 0.72, 0.75, 0.76, 0.77.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, normalizers

SPACELESS_PIECE = 16  # characters
_SPACELESS_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー〆"

# The classes a pattern is made of. Those that begin with ^ are complements of unions of the others.
_CLASSES = {
    "L": r"\p{L}",
    "N": r"\p{N}",
    "S": r"\s",
    "spaceless": rf"[[{_SPACELESS_SCRIPTS}\p{{M}}]&&[\p{{L}}\p{{M}}〇]]",
    "letter": rf"[[\p{{L}}\p{{M}}]&&[^{_SPACELESS_SCRIPTS}]]",
}
_COMPLEMENTS = {
    "lead": (r"[^\r\n\p{L}\p{N}]", r"\r\n", ("L", "N")),
    "sign": (r"[^\s\p{L}\p{N}]", "", ("S", "L", "N")),
    "solid": (r"\S", "", ("S",)),
}
_SPACES = r"{S}+(?!{solid})|{S}+"


@dataclass(frozen=True)
class Pattern:
    """A pre-tokenization pattern: `template` holds the names of classes in braces.

    Every alternative that takes a space takes it first or within white space. Hence a word begins before each space
    that something other than white space follows, whatever stood before: counting relies on it.
    """

    name: str
    template: str

    @property
    def regex(self) -> str:
        """The pattern as the tokenizers library and tiktoken read it."""
        classes = _CLASSES | {name: expression for name, (expression, _, _) in _COMPLEMENTS.items()}
        return self.template.format(**classes)

    def for_python(self) -> tuple[str, str, str]:
        """The pattern for Python's `re`: for ASCII text, for text below U+10000, for all.

        `re` looks a class up in a table below U+10000 and walks through the ranges above one by one: three forms
        keep the common ones fast.
        """
        return self._for_python(0x7F), self._for_python(0xFFFF), self._for_python(0x10FFFF)

    def _for_python(self, highest: int) -> str:
        classes = {name: f"[{_ranges(name, highest)}]" for name in _CLASSES}
        for name, (_, literal, parts) in _COMPLEMENTS.items():
            classes[name] = f"[^{literal}{''.join(_ranges(part, highest) for part in parts)}]"
        return self.template.format(**classes)


DEFAULT_PATTERN = Pattern(
    "llmcli",
    f"{{spaceless}}{{{{1,{SPACELESS_PIECE}}}}}|{{lead}}?{{letter}}+|{{N}}{{{{1,3}}}}"
    rf"| ?{{sign}}+[\r\n]*|{{S}}*[\r\n]+|{_SPACES}",
)
# GPT-2's (src/encoder.py of openai/gpt-2); the tokenizers library has it built in, as ByteLevel with use_regex.
GPT2_PATTERN = Pattern("gpt2", rf"'s|'t|'re|'ve|'m|'ll|'d| ?{{L}}+| ?{{N}}+| ?{{sign}}+|{_SPACES}")
PATTERNS = {pattern.name: pattern for pattern in (DEFAULT_PATTERN, GPT2_PATTERN)}

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_BEGIN, _WORD_END = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Patterns of published tokenizers, as their tokenizer.json have them. Each takes every character, has no nested
# repetition, and was tried against tiktoken (tests/test_tokenizer.py): what `fast_encoder` may hand over.
PUBLISHED_PATTERNS = {
    DEFAULT_PATTERN.regex: "llmcli",
    GPT2_PATTERN.regex: "GPT-2",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}": "Llama 3",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}": "Qwen 2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD_BEGIN}*{_WORD_END}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_WORD_BEGIN}+{_WORD_END}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}": "GPT-4o",
}

# ASCII text needs no inquiry. An empty bracket is no class: U+0080 stands for "none of ASCII".
_ASCII = {"L": "A-Za-z", "N": "0-9", "S": r"\t-\r ", "letter": "A-Za-z", "spaceless": r"\x80"}

# Letters, numbers, marks and white space lie here; above are private use and what no Unicode version has assigned.
_PLANES = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE0200))


def every_character() -> str:
    """A text of every character that may belong to a class."""
    return (
        np.concatenate([np.arange(plane.start, plane.stop, dtype=np.uint32) for plane in _PLANES])
        .tobytes()
        .decode("utf-32-le")
    )


def ranges_of(characters: NDArray[np.uint32]) -> tuple[tuple[int, int], ...]:
    """Ascending code points as ranges, both ends included."""
    points = characters.astype(np.int64)
    first = np.flatnonzero(np.diff(points, prepend=-2) != 1)
    last = np.append(first[1:], len(points)) - 1
    return tuple(zip(points[first].tolist(), points[last].tolist(), strict=True))


@functools.cache
def members(expression: str) -> tuple[tuple[int, int], ...]:
    """The ranges of code points that a class has in the tokenizers library."""
    every = every_character()
    rest = normalizers.Replace(Regex(expression), "").normalize_str(every)
    inside = np.setdiff1d(_code_points(every), _code_points(rest), assume_unique=True)
    return ranges_of(inside)


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def _ranges(name: str, highest: int) -> str:
    """The inside of a bracket expression of `re` with a class's members up to `highest`."""
    if highest == 0x7F:
        return _ASCII[name]
    found = [(first, min(last, highest)) for first, last in members(_CLASSES[name]) if first <= highest]
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in found)
