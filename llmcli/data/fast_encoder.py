"""The fastest encoder whose ids are proven to be the tokenizer's: tiktoken, a table, or the tokenizers library.

Invariant: `encode` gives what `TextTokenizer.encode` gives, for every text.

Why tiktoken may take over. Both programs cut the text with the same pattern, and merge within a word. The tokenizers
library knows pairs: it merges the neighbours whose merge was learned first. tiktoken knows strings: it merges the
neighbours whose joined string has the lowest rank. They part ways only where tiktoken merges neighbours x, y whose
joined string z is in the vocabulary though (x, y) is no learned merge. That cannot happen when
  (1) each token, encoded alone by the library, comes back as that one token, and
  (2) each merge joins tokens that earlier merges made (or bytes), and makes a token of its own.
For let both have done the same steps so far and x, y stand side by side. By (2) steps come in the order of the merges.
No step has crossed an end of z's span, so what happened within was what happens to z alone up to the same merge (which
of overlapping equal pairs is taken is decided from the left, within the span too). By (1) z alone becomes one token:
from x, y by a merge of x and y. So it is a learned merge, both programs know it, with the same rank, and they go on in
step. A word that is itself in the vocabulary, which tiktoken looks up at once, is one token for the library by (1).
Ranks are the order of the merges, and are turned into ids by a table, so ids may be in any order.

Beyond that: no normalizer, only special tokens added (plain text never gives them), one of the published patterns
(they take every character; tiktoken drops what its pattern does not match), and the two engines agree on the classes
that the pattern uses, for they may be built for different versions of Unicode.
"""

from __future__ import annotations

import array
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmcli.data.panics import is_panic
from llmcli.data.pretokenizer import GPT2_PATTERN, PUBLISHED_PATTERNS, every_character, members, ranges_of
from llmcli.data.token_bytes import byte_alphabet, from_alphabet
from llmcli.data.tokenizer import TextTokenizer, refuse_surrogates

if TYPE_CHECKING:
    import tiktoken

Ids = NDArray[np.uint32]

_RUN = 50_000  # characters; tiktoken's engine overflows its stack on a million spaces, but not on twice this
_CLASS = re.compile(r"\[\\p[^]]*\]|\\p\{\w+\}|\\s")


class FastEncoder:
    """Encodes texts to arrays of ids; `engine` is what does it: "tiktoken", "table" or "tokenizers".

    It can be pickled, and in a process of its own is ready without proving anything again.
    """

    def __init__(self, tokenizer: TextTokenizer, engine: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.engine = engine or choose_engine(tokenizer)
        self._ids: Ids = np.empty(0, dtype=np.uint32)
        self._beyond_ascii: bool | None = None  # whether tiktoken's engine knows the same letters
        if self.engine == "tiktoken":
            self._words, self._ids = _tiktoken_of(tokenizer.files.content)
        elif self.engine == "table":
            self._ids = _table_of(tokenizer.files.content)

    def __reduce__(self) -> tuple[type[FastEncoder], tuple[TextTokenizer, str]]:
        return FastEncoder, (self.tokenizer, self.engine)

    def encode(self, text: str) -> Ids:
        """The ids of a text, uint32; no special tokens are added. Raises DataError for text that cannot be encoded."""
        refuse_surrogates(text)
        if self.engine == "table":
            return self._ids[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]
        try:
            if self.engine == "tiktoken" and self._is_safe(text):
                ranks = array.array("I", self._words.encode_ordinary(text))  # thrice as fast as numpy from a list
                return self._ids[np.frombuffer(ranks, dtype=np.uint32)]
        except BaseException as error:
            if not is_panic(error):
                raise
        return np.array(self.tokenizer.encode(text), dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of many texts. The tokenizers library uses all cores, the others the calling thread."""
        if self.engine == "tokenizers":
            return [np.array(ids, dtype=np.uint32) for ids in self.tokenizer.encode_batch(texts)]
        return [self.encode(text) for text in texts]

    def _is_safe(self, text: str) -> bool:
        """Whether tiktoken's pattern engine takes this text: no endless white space, no letters it may not know."""
        for place in range(_RUN, len(text), _RUN):
            if text[place].isspace() and text[place - _RUN : place].isspace():
                return False
        if text.isascii():
            return True
        if self._beyond_ascii is None:
            self._beyond_ascii = _same_classes(pattern_of(self.tokenizer.files.content) or "")
        return self._beyond_ascii


def choose_engine(tokenizer: TextTokenizer) -> str:
    """The fastest engine that is installed and proven to give this tokenizer's ids."""
    content = tokenizer.files.content
    if _is_table(content):
        return "table"
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        return "tokenizers"
    return "tiktoken" if is_proven(content) else "tokenizers"


# ----------------------------------------------------------------------------------------------------------------
# One token a character


def _is_table(content: Mapping[str, Any]) -> bool:
    """Whether each character is a token of its own and nothing else happens to the text (our kind `char`)."""
    model = content["model"]
    special = {token["content"] for token in content.get("added_tokens") or ()}
    return (
        _is_plain_bpe(content)
        and not model.get("merges")
        and model.get("unk_token") in model["vocab"]
        and content.get("pre_tokenizer") is None
        and all(len(token) == 1 for token in model["vocab"] if token not in special)
    )


def _table_of(content: Mapping[str, Any]) -> Ids:
    """The id of each code point."""
    model = content["model"]
    table = np.full(0x110000, model["vocab"][model["unk_token"]], dtype=np.uint32)
    for token, identity in model["vocab"].items():
        if len(token) == 1:
            table[ord(token)] = identity
    return table


# ----------------------------------------------------------------------------------------------------------------
# tiktoken


def is_proven(content: Mapping[str, Any]) -> bool:
    """Whether tiktoken gives the ids of this tokenizer.json: the argument at the head of this file holds for it."""
    if not _is_plain_bpe(content) or pattern_of(content) not in PUBLISHED_PATTERNS:
        return False
    model = content["model"]
    vocabulary: Mapping[str, int] = model["vocab"]
    special = {token["content"] for token in content.get("added_tokens") or ()}
    made: dict[str, int] = dict.fromkeys(byte_alphabet(), -1)  # token to the rank of the merge that makes it
    if any(token not in vocabulary or token in special for token in made):
        return False
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left not in made or right not in made or left + right in made:
            return False
        made[left + right] = rank
    if any(token not in special and token not in made for token in vocabulary) or not special.isdisjoint(made):
        return False
    return _come_back(vocabulary, model["merges"], made)


def _come_back(vocabulary: Mapping[str, int], merges: Sequence[Any], tokens: Mapping[str, int]) -> bool:
    """Whether each token, encoded alone, is that one token."""
    from tokenizers import models

    pairs: list[Any] = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    library = models.BPE(vocab=dict(vocabulary), merges=pairs, cache_capacity=0)
    return all(len(library.tokenize(token)) == 1 for token in tokens)


def _is_plain_bpe(content: Mapping[str, Any]) -> bool:
    """A BPE without any of the model's variants, on the text as it is, with only special tokens added."""
    model = content["model"]
    variants = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
    return (
        model.get("type", "BPE") == "BPE"
        and isinstance(model.get("vocab"), dict)
        and isinstance(model.get("merges"), list)
        and not any(model.get(variant) for variant in variants)
        and content.get("normalizer") is None
        and all(token.get("special") is True for token in content.get("added_tokens") or ())
    )


def pattern_of(content: Mapping[str, Any]) -> str | None:
    """The pattern of a byte-level tokenizer that does nothing but cut with it; None where there is more to it."""
    steps = content.get("pre_tokenizer") or {}
    match steps:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return GPT2_PATTERN.regex if steps.get("use_regex", True) else None
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def _tiktoken_of(content: Mapping[str, Any]) -> tuple[tiktoken.Encoding, Ids]:
    """tiktoken with the ranks of the merges, and the id of each rank."""
    import tiktoken

    vocabulary = content["model"]["vocab"]
    tokens = byte_alphabet()
    for merge in content["model"]["merges"]:
        tokens.append(merge.replace(" ", "") if isinstance(merge, str) else "".join(merge))
    words = tiktoken.Encoding(
        "llmcli",
        pat_str=pattern_of(content) or "",
        mergeable_ranks={from_alphabet(token): rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )
    return words, np.array([vocabulary[token] for token in tokens], dtype=np.uint32)


@functools.cache
def _same_classes(pattern: str) -> bool:
    """Whether both engines give each class of the pattern the same members."""
    return all(_members_in_tiktoken(name) == members(name) for name in set(_CLASS.findall(pattern)))


def _members_in_tiktoken(expression: str) -> tuple[tuple[int, int], ...]:
    import tiktoken

    alone = {bytes([value]): value for value in range(256)}
    words = tiktoken.Encoding("class", pat_str=expression, mergeable_ranks=alone, special_tokens={})
    found = words.encode_to_numpy(every_character(), disallowed_special=()).astype(np.uint8).tobytes()
    return ranges_of(np.frombuffer(found.decode("utf-8").encode("utf-32-le"), dtype=np.uint32))
