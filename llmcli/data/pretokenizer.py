r"""Pre-tokenization: the patterns that cut text into words; merges are learned, and applied, inside a word only.

Invariant: a pattern cuts alike in three engines: the tokenizers library (Oniguruma), tiktoken (Rust's regex) and
Python's `re`, with which we count. The first two know Unicode's properties; for the third the members of each class are
asked of the tokenizers library itself, so that training and encoding cannot disagree about a letter that one Unicode
version has and the other has not.

The default pattern is GPT-4o's, to the letter: numbers in groups of at most three digits, combining marks with their
letters (Devanagari, Tamil, Arabic vowel signs), capitals begin a word. It is taken as it is because others know it:
llama.cpp has it built in, and onnxruntime-genai knows a few patterns piece by piece and silently drops what an unknown
piece should have matched (0.18; tried with a pattern of our own: 180 of 411 texts came out wrong, with this one 1).
In bytes per token it costs nothing (vocabulary 8,192, mixed text): 3.51 on WikiText-2 and 3.46 on Python code, with
Llama 3's pattern 3.52 and 3.46; Hindi 4.56 against 3.96, Tamil 5.52 against 4.52.

Scripts written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese): in them a whole clause is one word, each
clause is new, and counts and merges would grow with the text. So for training, and for training only, longer words in
these scripts are cut into pieces of 16 characters. Shorter pieces cost compression, since words straddle the cuts:
newspaper Chinese at vocabulary 8,192 gives 1.03 characters a token when learned from pieces of 1, 1.24 of 2, 1.30 of 4,
1.36 of 8, 1.39 of 16, 1.40 uncut.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, normalizers

# The classes that patterns are made of: as the engines have them, and for Python the complement of which others.
_CLASSES = {
    "L": r"\p{L}",
    "N": r"\p{N}",
    "S": r"\s",
    "letter": r"[\p{L}\p{M}]",
    "begin": r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    "end": r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
}
_COMPLEMENTS = {
    "lead": (r"[^\r\n\p{L}\p{N}]", r"\r\n", ("L", "N")),
    "sign": (r"[^\s\p{L}\p{N}]", "", ("S", "L", "N")),
    "solid": (r"\S", "", ("S",)),
}
_SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"


# A pattern for Python's `re`: for ASCII text, for text below U+10000, for all; and a class, the scripts without spaces.
# `re` looks a class up in a table below U+10000 and walks through the ranges above one by one: three forms keep the
# common ones fast.
Forms = tuple[str, str, str, str]


@dataclass(frozen=True)
class Pattern:
    """A pre-tokenization pattern: `template` holds the names of classes in braces.

    Every alternative that takes a space takes it first or within white space, and a space with a capital or small
    letter and small letters after it is one word. Hence a word begins before each space that something other than white
    space follows, whatever stood before: counting relies on it.
    """

    name: str
    template: str

    @property
    def regex(self) -> str:
        """The pattern as the tokenizers library and tiktoken read it."""
        classes = _CLASSES | {name: expression for name, (expression, _, _) in _COMPLEMENTS.items()}
        return self.template.format(**classes)

    def for_python(self) -> Forms:
        """The pattern for `re`, in its forms."""
        spaceless = f"[{_written(members(_SPACELESS), 0x10FFFF)}]"
        return self._for_python(0x7F), self._for_python(0xFFFF), self._for_python(0x10FFFF), spaceless

    def _for_python(self, highest: int) -> str:
        classes = {name: f"[{_ranges(name, highest)}]" for name in _CLASSES}
        for name, (_, literal, parts) in _COMPLEMENTS.items():
            classes[name] = f"[^{literal}{''.join(_ranges(part, highest) for part in parts)}]"
        return self.template.format(**classes)


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"{S}*[\r\n]+|{S}+(?!{solid})|{S}+"
DEFAULT_PATTERN = Pattern(
    "gpt4o",
    rf"{{lead}}?{{begin}}*{{end}}+{_CONTRACTIONS}?|{{lead}}?{{begin}}+{{end}}*{_CONTRACTIONS}?"
    rf"|{{N}}{{{{1,3}}}}| ?{{sign}}+[\r\n/]*|{_TAIL}",
)
# GPT-2's (src/encoder.py of openai/gpt-2); the tokenizers library has it built in, as ByteLevel with use_regex.
GPT2_PATTERN = Pattern("gpt2", r"'s|'t|'re|'ve|'m|'ll|'d| ?{L}+| ?{N}+| ?{sign}+|{S}+(?!{solid})|{S}+")
LLAMA3_PATTERN = Pattern("llama3", rf"{_CONTRACTIONS}|{{lead}}?{{L}}+|{{N}}{{{{1,3}}}}| ?{{sign}}+[\r\n]*|{_TAIL}")
QWEN2_PATTERN = Pattern("qwen2", rf"{_CONTRACTIONS}|{{lead}}?{{L}}+|{{N}}| ?{{sign}}+[\r\n]*|{_TAIL}")
# Letters whatever their case: what BERT's rules cut apart later.
UNCASED_PATTERN = Pattern("uncased", rf"{{lead}}?{{letter}}+|{{N}}{{{{1,3}}}}| ?{{sign}}+[\r\n]*|{_TAIL}")
PATTERNS = {
    pattern.name: pattern for pattern in (DEFAULT_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, UNCASED_PATTERN)
}
# As tokenizer.json have them. Each takes every character, has no nested repetition, and was tried against tiktoken
# (tests/test_tokenizer.py): what `fast_encoder` may hand over.
PUBLISHED_PATTERNS = {pattern.regex: pattern.name for pattern in PATTERNS.values()}

# ASCII text needs no inquiry.
_ASCII = {"L": "A-Za-z", "N": "0-9", "S": r"\t-\r ", "letter": "A-Za-z", "begin": "A-Z", "end": "a-z"}

# Letters, numbers, marks and white space lie here; above are private use and what no Unicode version has assigned.
_PLANES = (range(0xD800), range(0xE000, 0x34000), range(0xE0000, 0xE0200))
# Ideographs, Hangul, Tangut and private use, each block filled with one kind for years: its first character is asked.
_BLOCKS = (
    *(range(0x3400, 0x4DB6), range(0x4E00, 0x9FA6), range(0xAC00, 0xD7A4), range(0xE000, 0xF900)),
    *(range(0x17000, 0x187ED), range(0x20000, 0x2A6D7), range(0x2A700, 0x2B735), range(0x2B740, 0x2B81E)),
    *(range(0x2B820, 0x2CEA2), range(0x2CEB0, 0x2EBE1), range(0x30000, 0x3134B)),
)


@functools.cache
def every_character() -> str:
    """A text of every character that may belong to a class; of the uniform blocks the first one."""
    inside = {place for block in _BLOCKS for place in block[1:]}
    return "".join(chr(place) for plane in _PLANES for place in plane if place not in inside)


def ranges_of(characters: NDArray[np.uint32]) -> tuple[tuple[int, int], ...]:
    """Ascending code points, those of `every_character`, as ranges of all code points, both ends included."""
    found = set(characters.tolist())
    blocks = [np.arange(block.start + 1, block.stop) for block in _BLOCKS if block.start in found]
    points = np.sort(np.concatenate([characters.astype(np.int64), *blocks]))
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
    return _ASCII[name] if highest == 0x7F else _written(members(_CLASSES[name]), highest)


def _written(found: tuple[tuple[int, int], ...], highest: int) -> str:
    inside = [(first, min(last, highest)) for first, last in found if first <= highest]
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in inside)
