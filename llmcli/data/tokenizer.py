"""`TextTokenizer`: text to ids and back, whatever the tokenizer's kind; the same ids everywhere in llmcli.

Invariant: text is data. A special token that merely occurs in a text is encoded like any other characters, unless
`parse_special` says that the text was made by us (a chat template).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from llmcli.data import tokenizer_files
from llmcli.data.framed import FramedEncoding
from llmcli.data.panics import contained
from llmcli.data.token_bytes import DecodeStream, TokenBytes, WindowStream
from llmcli.data.tokenizer_files import CONFIG, TEMPLATE, TOKENIZER, TokenizerFiles
from llmcli.errors import DataError
from llmcli.files.atomic import write_file, write_json

if TYPE_CHECKING:
    from llmcli.data.fast_encoder import FastEncoder

_LONG = 1 << 20  # characters; on a longer text even a published pattern may exceed the engine's limits


@dataclass(frozen=True, slots=True)
class Encoding:
    """A text's ids, the characters of the text that each covers (begin, end), and each token's text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    tokens: list[str]


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Opens a tokenizer: a folder (a tokenizer's, model's, run's, corpus'), a tokenizer.json, or GPT-2's pair of files.

    Raises DataError for what is missing or malformed.
    """
    return TextTokenizer(tokenizer_files.read_files(path))


class TextTokenizer:
    """A tokenizer. Ids are below `vocab_size`; `bos_id`, `eos_id`, `pad_id`, `unk_id` and those of an encoder's frame,
    `cls_id`, `sep_id`, `mask_id`, are None where there is none.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        self._quiet = tokenizer_files.has_strange_patterns(files.content)
        self._plain = self._open(parse_special=False)
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = self._plain.get_added_tokens_decoder()
        self.special_ids = frozenset(identity for identity, token in added.items() if token.special)
        roles = tokenizer_files.role_tokens(files, vocabulary)
        ids = [None if token is None else vocabulary[token] for token in roles.values()]
        self.bos_id, self.eos_id, self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids

    def _open(self, *, parse_special: bool) -> Tokenizer:
        with self._contained("its pattern or model makes the tokenizers library give up", always_quiet=True):
            try:
                tokenizer = Tokenizer.from_str(self.files.text)
            except Exception as error:  # the library raises plain Exception
                reason = " ".join(str(error).split())
                raise DataError(f"is not a tokenizer that can be opened: {reason}", where=self.files.where) from error
        tokenizer.encode_special_tokens = not parse_special
        # A text is encoded whole. Cutting and filling up belong to those who make batches.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _contained(self, message: str, *, always_quiet: bool = False) -> Any:
        return contained(message, self.files.where, quiet=self._quiet or always_quiet)

    @functools.cached_property
    def _parsing(self) -> Tokenizer:
        return self._open(parse_special=True)

    # ------------------------------------------------------------------------------------------------------------
    # What it is

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of tokenizer.json's content, whatever its layout: equal for equal tokenizers."""
        canonical = json.dumps(self.files.content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @property
    def begin_id(self) -> int | None:
        """The token after which a text begins: the one meant for it, else the one that ended the text before."""
        return self.bos_id if self.bos_id is not None else self.eos_id

    @property
    def kind(self) -> str:
        """The model's type: BPE, Unigram, WordPiece, WordLevel."""
        return str(self.files.content["model"].get("type") or type(self._plain.model).__name__)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template for chats, where the files bring one."""
        return self.files.chat_template

    @property
    def config(self) -> dict[str, Any]:
        """The settings of tokenizer_config.json."""
        return dict(self.files.config)

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, None where it is not there."""
        identity: int | None = self._plain.token_to_id(token)
        return identity

    def token(self, identity: int) -> str:
        """A token as the vocabulary writes it."""
        token: str | None = self._plain.id_to_token(identity)
        return "" if token is None else token

    @functools.cached_property
    def bytes_table(self) -> TokenBytes:
        """The bytes of every token, and what goes with them (see `token_bytes`)."""
        tokens = [self._plain.id_to_token(identity) for identity in range(self.vocab_size)]
        return TokenBytes(self.files.content, tokens, self.special_ids)

    def token_bytes(self, identity: int) -> bytes:
        """The bytes a token stands for: part of a character, a word with the space before it, ..."""
        return self.bytes_table.table[identity]

    def token_text(self, identity: int) -> str:
        r"""A token for people to read: its bytes as text, what is no whole character as `\xe4`."""
        return self.token_bytes(identity).decode("utf-8", "backslashreplace")

    # ------------------------------------------------------------------------------------------------------------
    # Text to ids

    def encode(self, text: str, special: bool = False, *, parse_special: bool = False) -> list[int]:
        """The ids of a text. `special` adds what the tokenizer's template puts around a text ([CLS] ... [SEP], <s>).

        With `parse_special` special tokens written in the text become their ids. Raises DataError for text that cannot
        be encoded.
        """
        ids: list[int] = self._encode([text], special, parse_special)[0].ids
        return ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The ids of many texts, on all cores."""
        return [found.ids for found in self._encode(texts, special)]

    @functools.cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """What `special` puts before and behind a text. Raises DataError where that depends on the text."""
        texts = ["a", "b a"]
        found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        for bare, whole in zip(self.encode_batch(texts), self.encode_batch(texts, special=True), strict=True):
            begins = range(len(whole) - len(bare) + 1)
            begin = next((place for place in begins if whole[place : place + len(bare)] == bare), None)
            if begin is not None:
                found.add((tuple(whole[:begin]), tuple(whole[begin + len(bare) :])))
        if len(found) != 1:
            raise DataError("its post-processor does more than to put tokens around a text", where=self.files.where)
        before, behind = found.pop()
        return list(before), list(behind)

    def encode_words(self, text: str) -> list[list[int]]:
        """The ids of a text, those of a piece together: what the pre-tokenizer cuts, across which no token reaches."""
        found = self._encode([text], False, offsets=True)[0]
        words = [-1 if word is None else word for word in found.word_ids]
        return [[found.ids[place] for place in group] for _, group in groupby(range(len(words)), words.__getitem__)]

    def encode_in_detail(self, text: str, special: bool = False) -> Encoding:
        """The ids with their places in the text."""
        found = self._encode([text], special, offsets=True)[0]
        return Encoding(found.ids, found.offsets, [self.token_text(identity) for identity in found.ids])

    def encode_framed(self, text: str, second: str | None = None) -> FramedEncoding:
        """The ids of a text or of a pair, framed as the tokenizer's template does it ([CLS] ... [SEP] ... [SEP])."""
        given: Any = text if second is None else (text, second)
        found = self._encode([given], True, offsets=True)[0]
        return FramedEncoding(found.ids, found.type_ids, found.sequence_ids, found.offsets)

    def _encode(
        self, texts: Sequence[Any], special: bool, parse_special: bool = False, *, offsets: bool = False
    ) -> list[Any]:
        tokenizer = self._parsing if parse_special else self._plain
        encode = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
        message = "its pattern makes the tokenizers library give up on this text"
        single = [part for text in texts for part in ((text,) if isinstance(text, str) else text)]
        with self._contained(message, always_quiet=any(len(text) > _LONG for text in single)):
            for text in single:
                refuse_surrogates(text)
            try:
                found: list[Any] = encode(list(texts), add_special_tokens=special)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise DataError(f"the text cannot be encoded: {reason}", where=self.files.where) from error
        return found

    def fast_encoder(self) -> FastEncoder:
        """The fastest encoder that is proven to give the same ids; for many texts, and for worker processes."""
        from llmcli.data.fast_encoder import FastEncoder

        return FastEncoder(self)

    # ------------------------------------------------------------------------------------------------------------
    # Ids to text

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD. Raises DataError for an id outside the vocabulary."""
        ids = list(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(identity for identity in ids if not 0 <= identity < self.vocab_size)
            raise DataError(f"the id {wrong} is not below {self.vocab_size}, the vocabulary", where=self.files.where)
        with self._contained("its decoder makes the tokenizers library give up"):
            text: str = self._plain.decode(ids, skip_special_tokens=skip_special)
        return text

    def stream(self, skip_special: bool = False) -> DecodeStream | WindowStream:
        """Decodes token by token: `push(id)` gives the whole characters that are complete, `flush()` the rest."""
        if self.bytes_table.exact:
            return DecodeStream(self.bytes_table, skip_special)
        return WindowStream(lambda ids: self.decode(ids, skip_special))

    # ------------------------------------------------------------------------------------------------------------
    # Files

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files into a folder, tokenizer.json exactly as it was read."""
        place = Path(folder)
        write_file(place / TOKENIZER, self.files.text)
        write_json(place / CONFIG, self.config)
        if self.files.chat_template is not None and "chat_template" not in self.files.config:
            write_file(place / TEMPLATE, self.files.chat_template)

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[TokenizerFiles]]:
        return TextTokenizer, (self.files,)


def refuse_surrogates(text: str) -> None:
    """Raises DataError where a text holds half a surrogate pair, which is no character and has no UTF-8.

    The libraries would put U+FFFD in its place and say nothing.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise DataError(f"the text holds {half}, half of a surrogate pair, at character {error.start}") from error
