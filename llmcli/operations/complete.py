"""Autocompletion: the most probable continuations of a prefix, up to the end of a word or a line.

Healing: the tokens of the prefix's last piece are taken back and the model chooses anew among all tokens that spell the
same bytes, as a text that goes on there may be cut into tokens elsewhere ("wor" is w + or, "world" one token).
Probabilities are therefore those of the texts that begin with the prefix: given that the bytes which were taken back
come again. Pieces are the pre-tokenizer's, across which no token reaches.
"""

from __future__ import annotations

import bisect
import codecs
import dataclasses
import functools
import unicodedata
from collections.abc import Sequence

import numpy as np

from llmcli import config as configs
from llmcli.config import CompleteConfig
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import DataError, UsageError
from llmcli.files.artefacts import Model, find_model
from llmcli.runtime import search as searching
from llmcli.runtime.search import Mask, Step, search
from llmcli.runtime.session import Session

_TAKEN_BACK = 8  # tokens at most
_UNKNOWN, _SEPARATOR, _WORD, _OTHER = range(4)  # classes of characters; _UNKNOWN: no whole character


@dataclasses.dataclass(frozen=True)
class Completion:
    """What may come after the prefix."""

    text: str
    probability: float
    finish_reason: str  # stop: the word or line ends; length: cut at the limit of tokens
    tokens: int  # of the text, as the tokenizer cuts it by itself


@dataclasses.dataclass(frozen=True)
class Completions:
    """The completions of a prefix, the most probable first."""

    prefix: str
    completions: tuple[Completion, ...]
    prompt_tokens: int  # that the model was given
    healed: str  # the end of the prefix for which the model may choose other tokens
    truncated_tokens: int  # left out at the prefix's begin


class Completer:
    """A model that is loaded once and completes prefix after prefix."""

    def __init__(self, session: Session, tokenizer: TextTokenizer) -> None:
        if tokenizer.vocab_size > session.vocab_size:
            raise DataError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {session.vocab_size}")
        self.session, self.tokenizer = session, tokenizer
        self.spelling = Spelling(tokenizer)
        self._endings = functools.cache(lambda until: Endings(self.spelling, until))

    def complete(self, prefix: str, config: CompleteConfig = CompleteConfig()) -> Completions:  # noqa: B008  (frozen)
        """The most probable completions of a prefix, which is taken for the begin of a text: it stands after the token
        that every text of a corpus begins after. `generate` gives a model its prompt as its tokenizer makes it, as
        transformers does, since a prompt may be a piece of any text.

        Raises UsageError where the prefix is longer than the context and `truncate` is not set.
        """
        configs.check(config)
        ids, taken = self._healed(prefix)
        table = self.spelling.table
        begin = self.tokenizer.begin_id
        prompt = [*([] if begin is None else [begin]), *ids]
        context, wanted = self.session.context, config.max_new_tokens + len(taken)
        if not prompt:
            raise DataError("the tokenizer has no token that begins a text, so an empty prefix cannot be completed")
        left_out = 0
        if len(prompt) + len(taken) > context:
            if not config.truncate:
                length = len(prompt) + len(taken)
                raise UsageError(
                    f"the prefix has {length} tokens, the model's context is {context}; --truncate keeps its end"
                )
            kept = max(1, context - min(wanted, max(context // 2, len(taken))))
            left_out, prompt = len(prompt) - kept, prompt[-kept:]
        rules = TextRules(self._endings(config.until), b"".join(table[identity] for identity in taken))
        room = context - len(prompt) + 1  # the last token is not fed
        found = search(self.session, prompt, rules, count=config.count, max_tokens=min(wanted, room))
        completions = tuple(
            Completion(
                str(item.key),
                item.probability,
                "length" if 2 * item.cut > item.probability else "stop",
                len(self.tokenizer.encode(str(item.key))),
            )
            for item in found
        )
        healed = rules.required.decode("utf-8", "replace")
        return Completions(prefix, completions, len(prompt), healed, left_out)

    def _healed(self, prefix: str) -> tuple[list[int], list[int]]:
        """The prefix's ids, and those at its end that are taken back."""
        words = self.tokenizer.encode_words(prefix) if prefix else []
        ids = [identity for word in words for identity in word]
        cut = max(len(ids) - (len(words[-1]) if words else 0), len(ids) - _TAKEN_BACK)
        while cut < len(ids):
            # A special token (an unknown character) is not text; one that nothing else can spell is not in doubt.
            special = [place for place in range(cut, len(ids)) if ids[place] in self.tokenizer.special_ids]
            if special:
                cut = special[-1] + 1
                continue
            allowed, _ = self.spelling.fitting(b"".join(self.spelling.table[identity] for identity in ids[cut:]))
            if not np.array_equal(np.flatnonzero(allowed), [ids[cut]]):
                break
            cut += 1
        return ids[:cut], ids[cut:]


def complete(model: Model, prefix: str, config: CompleteConfig = CompleteConfig()) -> Completions:  # noqa: B008
    """The most probable completions of a prefix by a model folder or a run."""
    from llmcli.runtime.open import open_session

    place = find_model(model)
    tokenizer = load_tokenizer(place.texts)
    session = open_session(place, device=config.device, threads=config.threads, quantize=config.quantize)
    try:
        return Completer(session, tokenizer).complete(prefix, config)
    finally:
        session.close()


# ----------------------------------------------------------------------------------------------------------------
# What tokens spell


class Spelling:
    """The bytes of all tokens, in an order in which those with the same begin stand together."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.table: Sequence[bytes] = tokenizer.bytes_table.table
        self.special = np.zeros(len(self.table), np.bool_)
        self.special[list(tokenizer.special_ids)] = True
        plain = [index for index, piece in enumerate(self.table) if piece and not self.special[index]]
        self._order = np.array(sorted(plain, key=self.table.__getitem__), np.int64)
        self._sorted = [self.table[index] for index in self._order]
        self.fitting = functools.lru_cache(1024)(self._fitting)

    def _fitting(self, required: bytes) -> tuple[Mask, Mask]:
        """Tokens that agree with the bytes required as far as both reach, and those of them that cover them all."""
        covers = np.zeros(len(self.table), np.bool_)
        covers[self._range(required)] = True
        allowed = covers.copy()
        for length in range(1, len(required)):
            piece = required[:length]
            first = bisect.bisect_left(self._sorted, piece)
            last = bisect.bisect_right(self._sorted, piece)
            allowed[self._order[first:last]] = True
        return allowed, covers

    def _range(self, begin: bytes) -> np.ndarray:
        first = bisect.bisect_left(self._sorted, begin)
        last = bisect.bisect_right(self._sorted, begin, key=lambda piece: piece[: len(begin)])
        return self._order[first:last]


class Endings:
    """Where a completion ends: after leading separators and then a run of characters of one class."""

    def __init__(self, spelling: Spelling, until: str) -> None:
        self.spelling, self.until = spelling, until
        self.class_of = functools.lru_cache(1 << 16)(_line_class if until == "line" else _word_class)
        first = np.array([self._first(piece) for piece in spelling.table], np.int8)
        first[spelling.special] = _SEPARATOR
        # For each class that the text ends in: the tokens before which it is over.
        self.before = {kind: ((first != _UNKNOWN) & (first != kind)) | spelling.special for kind in (_WORD, _OTHER)}

    def _first(self, piece: bytes) -> int:
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(piece[:4])
        return self.class_of(text[0]) if text and text[0] != "\ufffd" else _UNKNOWN

    def body(self, text: str) -> tuple[int, int, int]:
        """(begin of the run after the leading separators, its end, its class)."""
        begin = 0
        while begin < len(text) and self.class_of(text[begin]) == _SEPARATOR:
            begin += 1
        kind = self.class_of(text[begin]) if begin < len(text) else _UNKNOWN
        end = begin
        while end < len(text) and self.class_of(text[end]) == kind:
            end += 1
        return begin, end, kind


def _word_class(character: str) -> int:
    if character.isspace():
        return _SEPARATOR
    # Combining marks are of the word (Hindi, Thai), and so is the apostrophe in "don't".
    word = character.isalnum() or character in "_'’" or unicodedata.category(character)[0] == "M"
    return _WORD if word else _OTHER


def _line_class(character: str) -> int:
    return _SEPARATOR if character in "\r\n" else _WORD


class TextRules(searching.Rules):
    """Continuations that begin with the bytes required; their results are the texts after these."""

    def __init__(self, endings: Endings, required: bytes) -> None:
        self.endings, self.required = endings, required
        self.table = endings.spelling.table
        self.size = len(self.table)

    def step(self, path: searching.Path) -> Step:
        """What may follow: tokens that agree with what is required, then all."""
        spelled = b"".join(self.table[identity] for identity in path)
        rest = self.required[len(spelled) :]
        if rest:
            allowed, covers = self.endings.spelling.fitting(rest)
            return Step(allowed, covers)
        text, whole = _decoded(spelled[len(self.required) :])
        begin, _, kind = self.endings.body(text)
        over = whole and begin < len(text)
        ends = self.endings.before[kind] if over else self.endings.spelling.special
        meets = np.ones(self.size, np.bool_) if not self.required and not path else None
        return Step(None, meets, ends)

    def finished(self, path: searching.Path) -> str | None:
        """The text where the path went beyond its end."""
        text, _ = self._text(path)
        _, end, _ = self.endings.body(text)
        return text[:end] if end < len(text) else None

    def standing(self, path: searching.Path) -> str | None:
        """The text of the path, where there is more than separators."""
        text, _ = self._text(path)
        begin, end, _ = self.endings.body(text)
        return text if begin < end else None

    def _text(self, path: searching.Path) -> tuple[str, bool]:
        spelled = b"".join(self.table[identity] for identity in path)
        return _decoded(spelled[len(self.required) :])


def _decoded(data: bytes) -> tuple[str, bool]:
    """The whole characters, and whether that is all."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return text, not decoder.getstate()[0]
