"""Constraints: which tokens may come next so that a text fits a grammar. The grammar's work is llguidance's.

Invariant: a text whose every token was allowed is the begin of one that fits, and fits when `complete` says so. The
tokens are taken as the bytes that they stand for; a special token is no text, so none is allowed but those that end.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from llmcli.errors import ConfigError, LlmcliError, MissingExtraError

# Between the parts of a JSON text; bounded, as a model may else fill what is left of its limit with line ends.
_SPACE = r"[ \n\r\t]{0,24}"
# Else, where a grammar leaves no choice about the bytes, the tokens would be those that encoding the bytes gives, which
# for tokenizers that put a space before a text are others. So it is the model that chooses, as everywhere.
_FREE = '%llguidance {"no_forcing": true}\n'
KINDS = ("json-schema", "regex", "choice", "grammar")


class Vocabulary:
    """The tokens of a tokenizer as a grammar sees them; made once for all grammars."""

    def __init__(self, tokens: Sequence[bytes], special: Collection[int], ends: Collection[int]) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise MissingExtraError("llguidance", "grammar", "constrained output") from error
        self.size = len(tokens)
        # A model without an end gets one that it cannot choose: a text then ends where nothing can follow.
        self.ends = sorted(end for end in ends if end < self.size) or [self.size]
        padded = [*tokens, b""][: max(self.size, self.ends[-1] + 1)]
        self.native = LLTokenizer(
            TokenizerWrapper(_Tokens(padded, sorted({*special, *self.ends}), self.ends[0])),
            n_vocab=len(padded),
            eos_token=self.ends,
        )
        self.words = (len(padded) + 31) // 32  # of the mask, of 32 bits each


class _Tokens:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], end: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end

    def __call__(self, _text: str | bytes) -> NoReturn:
        raise NotImplementedError("texts are encoded for forced tokens alone, and none is forced")


class Grammar:
    """A grammar over a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, kind: str, text: str | Sequence[str], *, where: str) -> None:
        """`kind`: one of KINDS; `text`: the schema's JSON, the expression, the choices, the Lark grammar.

        Raises ConfigError for a grammar that is wrong, or that says what llguidance does not know.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_lark(_lark(kind, text))
            self._matcher = LLMatcher(vocabulary.native, grammar, log_level=0)
        except ValueError as error:
            raise ConfigError(_line(str(error)), where=where) from error
        if self._matcher.is_error():
            raise ConfigError(_line(self._matcher.get_error()), where=where)
        self._vocabulary = vocabulary

    def matcher(self) -> Matcher:
        """A text at its begin."""
        return Matcher(self._matcher.deep_copy(), self._vocabulary)


class Matcher:
    """A text that grows by tokens which its grammar allows."""

    def __init__(self, native: Any, vocabulary: Vocabulary) -> None:
        self._native, self._size, self._vocabulary = native, vocabulary.size, vocabulary
        self._end = vocabulary.ends[0]
        self._mask = np.zeros(vocabulary.words, np.int32)
        self._bytes = self._mask.view(np.uint8)

    def copy(self) -> Matcher:
        """The text as it stands, to go on by itself."""
        return Matcher(self._native.deep_copy(), self._vocabulary)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next: (V,); those that end a text are among them when it may end."""
        try:
            self._native.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        except ValueError as error:
            raise self._failure(str(error)) from error
        found = np.unpackbits(self._bytes, bitorder="little").view(np.bool_)
        # Where nothing can follow, llguidance allows the end alone, whether the text may end or not.
        if found[self._end] and not self.complete:
            raise self._failure("no token of the vocabulary can go on with the text")
        return found[: self._size]

    def accept(self, identity: int) -> None:
        """Takes a token, one of those that are allowed."""
        if not self._native.consume_token(identity):
            raise self._failure(self._native.get_error())

    @property
    def complete(self) -> bool:
        """Whether the text fits as it stands."""
        return bool(self._native.is_accepting()) and not self._native.is_error()

    @property
    def ended(self) -> bool:
        """Whether the text fits and nothing can follow."""
        return bool(self._native.is_stopped()) and self.complete

    @staticmethod
    def _failure(reason: str) -> LlmcliError:
        return LlmcliError(f"the grammar cannot be followed any further: {_line(reason)}")


def _lark(kind: str, text: str | Sequence[str]) -> str:
    """Any constraint as a grammar of Lark."""
    from llguidance import regex_to_lark

    if not isinstance(text, str):
        text = "|".join(map(_literally, text))
    elif kind == "grammar":
        return f"{text}\n{_FREE}"  # behind it, so that errors tell the lines of the file
    elif kind == "json-schema":
        schema = json.loads(text)
        if isinstance(schema, dict):
            guidance = {"whitespace_pattern": _SPACE, **(schema.get("x-guidance") or {})}
            schema = {**schema, "x-guidance": guidance}
        return f"{_FREE}start: %json {json.dumps(schema)}\n"
    return f"{_FREE}start: /{regex_to_lark(text)}/\n"


def _literally(text: str) -> str:
    """A text as a regular expression that matches it alone."""
    return "".join(f"\\x{{{ord(letter):x}}}" if not letter.isalnum() else letter for letter in text)


def _line(text: str) -> str:
    return " ".join(text.split())[:400] or "it is not understood"
