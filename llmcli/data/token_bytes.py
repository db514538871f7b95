"""The bytes that each token stands for, and decoding token by token in whole characters.

Invariant: the joined bytes of a text's tokens are what the whole sequence decodes to. What a decoder does only at the
begin of a text (dropping the space that the normalizer put there) is kept apart, in `TokenBytes.strip`.

The decoders are those of the tokenizers library (its `decoders` module), read from `tokenizer.json`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What the library's WordPiece decoder tidies (`cleanup` in decoders/wordpiece.rs), in its order.
_TIDY = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def byte_alphabet() -> list[str]:
    """GPT-2's stand-ins: a visible character for each byte (`bytes_to_unicode` in src/encoder.py of openai/gpt-2)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in visible]
    stand_ins = {value: chr(value) for value in visible}
    stand_ins |= {value: chr(256 + index) for index, value in enumerate(hidden)}
    return [stand_ins[value] for value in range(256)]


BYTE_OF = {character: value for value, character in enumerate(byte_alphabet())}


def from_alphabet(token: str) -> bytes:
    """The bytes of a token that is written in GPT-2's alphabet; one with other characters stands for its own text."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


class TokenBytes:
    """The bytes of each id of a vocabulary.

    `strip` is which character the begin of a text loses, and how many of it. `exact` is false where the decoder has
    steps that are not known here, or that look at more than one token; joined bytes are then an approximation.
    """

    def __init__(self, content: Mapping[str, Any], tokens: Sequence[str | None], special: Collection[int]) -> None:
        self._steps = _flat(content.get("decoder"))
        self._separator = "" if self._steps else " "  # without a decoder the library joins tokens with spaces
        self.special = frozenset(special)
        self.strip, self.exact = _begin(self._steps)
        self.table = [b"" if token is None else self._piece(token) for token in tokens]

    def _piece(self, token: str) -> bytes:
        text: str = token
        for step in self._steps:
            match step["type"]:
                case "ByteLevel":
                    return from_alphabet(text)
                case "ByteFallback" if found := _BYTE_TOKEN.fullmatch(text):
                    return bytes([int(found[1], 16)])
                case "Metaspace":
                    text = text.replace(step.get("replacement", "▁"), " ")
                case "Replace" if isinstance(step.get("pattern"), dict) and "String" in step["pattern"]:
                    text = text.replace(step["pattern"]["String"], step.get("content", ""))
                case "WordPiece":
                    text = _word_piece(text, step.get("prefix", "##"), bool(step.get("cleanup", True)))
                case "BPEDecoder":
                    text = text.replace(step.get("suffix", "</w>"), " ")
        return (self._separator + text).encode("utf-8", "replace")


def _flat(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder, sequences taken apart."""
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder.get("decoders", ()) for step in _flat(inner)]
    return [{**decoder, "type": str(decoder.get("type"))}]


def _begin(steps: list[dict[str, Any]]) -> tuple[tuple[str, int], bool]:
    """((character, how many of it the begin of a text loses), whether every step is understood)."""
    strip, exact = (" ", 0), True
    if not steps:
        return (" ", 1), True
    for step in steps:
        match step["type"]:
            case "Strip" if not step.get("stop"):
                strip = (str(step.get("content", " ")), int(step.get("start", 0)))
            case "Metaspace":
                # Every space of the first token goes, but a token that begins with two is not worth a rule.
                strip = (" ", 0 if step.get("prepend_scheme", "always") == "never" else 1)
            case "WordPiece":
                strip = (" ", 1)
            case "Replace":
                exact = exact and "String" in (step.get("pattern") or {})
            case "ByteLevel" | "ByteFallback" | "Fuse":
                pass
            case _:
                exact = False
    return strip, exact


def _word_piece(token: str, prefix: str, tidy: bool) -> str:
    text = token[len(prefix) :] if token.startswith(prefix) else " " + token
    if tidy:
        for found, instead in _TIDY:
            text = text.replace(found, instead)
    return text


class DecodeStream:
    """Decodes ids one by one and gives back whole characters only: a Chinese sign over three tokens comes at the third.

    Bytes that are no UTF-8 become U+FFFD, as soon as it is known that nothing can complete them.
    """

    def __init__(self, tokens: TokenBytes, skip_special: bool = False) -> None:
        self._tokens = tokens
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokens.strip[1]

    def push(self, identity: int) -> str:
        """The characters that this token completes, perhaps none."""
        if self._skip_special and identity in self._tokens.special:
            return ""
        table = self._tokens.table
        text = self._decoder.decode(table[identity] if 0 <= identity < len(table) else b"")
        while text and self._strip:
            if not text.startswith(self._tokens.strip[0]):
                self._strip = 0
            else:
                text = text[1:]
                self._strip -= 1
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was cut off."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """The same for decoders that need more than one token: decodes the last tokens again and gives what is new."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # of the window, the ids whose text was given

    def push(self, identity: int) -> str:
        """The characters that this token completes, perhaps none."""
        self._ids.append(identity)
        return self._new(whole=False)

    def flush(self) -> str:
        """What is left at the end."""
        return self._new(whole=True)

    def _new(self, *, whole: bool) -> str:
        before, text = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not whole):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text[len(before) :]
