"""Encodings: which one a file has, and its bytes as text, piece by piece.

Invariant: with `strict`, text comes out only as long as every byte is valid; the first that is not is named by line and
byte. Nothing is stripped but the byte order mark, and line ends stay as they are.

`auto` takes the byte order mark, then UTF-8, then what the bytes look like: a few high bytes among ASCII are Western
European (cp1252), anything else is asked of charset-normalizer. From too few high bytes nobody can tell; then it is an
error, as a text in the wrong letters would pass unseen.
"""

from __future__ import annotations

import codecs
import string
from collections.abc import Iterator
from typing import Any

from llmcli.errors import ConfigError, DataError, MissingExtraError

SAMPLE = 1 << 20  # bytes that are looked at; a whole file where it is shorter
CHUNK = 1 << 20  # bytes decoded at once
_MARKS = (  # the longer ones first: UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WESTERN_SHARE = 0.03  # German and French have 1 to 3 bytes of 100 that are not ASCII, Polish 6, Greek 80
_FEW = 24  # high bytes; of fewer charset-normalizer makes Urdu out of "caf\xe9", and UTF-16 out of "gr\xfc\xdfe"
_CONTROLS = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f\x1b\x08")
_HIGH = bytes(range(128, 256))
_MAGIC = {b"%PDF-": "a PDF", b"PK\x03\x04": "a ZIP archive (docx, xlsx, epub, ...)", b"{\\rtf": "an RTF file"}


class Decoder:
    """Reads a stream of bytes as text. `encoding` is what was chosen, `replaced` the invalid places so far."""

    def __init__(self, stream: Any, name: str, encoding: str, errors: str, *, plain: bool) -> None:
        """`plain`: the format is text, so bytes that no text has are an error, raised here as DataError."""
        self.stream, self.name, self.errors = stream, name, errors
        head = _fill(stream, SAMPLE)
        self.encoding, mark = choose_encoding(head, name, encoding, whole=len(head) < SAMPLE, plain=plain)
        self.marked = mark > 0
        self.replaced = 0
        self.empty = not head
        self._head = head[mark:]
        self._offset = mark  # in the decompressed bytes: where the next chunk begins
        self._line = 1

    def chunks(self) -> Iterator[str]:
        """The text, in pieces of at most `CHUNK` characters. Raises DataError with file:line:byte N."""
        decoder = codecs.getincrementaldecoder(self.encoding)("strict" if self.errors == "strict" else "replace")
        data = self._head
        self._head = b""
        while data:
            for start in range(0, len(data), CHUNK):
                yield from self._decode(decoder, data[start : start + CHUNK], final=False)
            data = self.stream.read(CHUNK)
        yield from self._decode(decoder, b"", final=True)

    def _decode(self, decoder: codecs.IncrementalDecoder, data: bytes, *, final: bool) -> Iterator[str]:
        held = len(decoder.getstate()[0])  # bytes of an unfinished character, before this chunk
        try:
            text = decoder.decode(data, final)
        except UnicodeDecodeError as error:
            line = self._line + error.object[: error.start].decode(self.encoding, "replace").count("\n")
            place = self._offset - held + error.start
            shown = " ".join(f"{byte:02x}" for byte in error.object[error.start : max(error.end, error.start + 1)][:4])
            raise DataError(
                f"is not valid {self.encoding} (bytes {shown}); name its --encoding, or take --errors replace",
                where=f"{self.name}:{line}:byte {place}",
            ) from error
        if self.errors == "replace" and "\ufffd" in text:
            self.replaced += text.count("\ufffd") - self._genuine(data)
        self._offset += len(data)
        self._line += text.count("\n")
        if text:
            yield text

    def _genuine(self, data: bytes) -> int:
        """Replacement characters that stand in the file itself (one cut by a chunk's end is missed: it is counted)."""
        return data.count("\ufffd".encode(self.encoding)) if self.encoding.startswith("utf") else 0


def _fill(stream: Any, count: int) -> bytes:
    """Reads `count` bytes, fewer only at the end of the stream."""
    parts, missing = [], count
    while missing and (data := stream.read(missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def choose_encoding(head: bytes, name: str, encoding: str, *, whole: bool, plain: bool) -> tuple[str, int]:
    """(Python's name of the encoding, bytes of the mark). Raises DataError when it is no text or cannot be told."""
    if encoding != "auto":
        return _named(head, encoding)
    for mark, found in _MARKS:
        if head.startswith(mark):
            return found, len(mark)
    if plain:
        _refuse_binary(head, name)
    if _is_utf8(head, whole=whole):
        return "utf-8", 0
    return _detect(head, name), 0


def _named(head: bytes, encoding: str) -> tuple[str, int]:
    try:
        known = codecs.lookup(encoding)
        if not known._is_text_encoding:
            raise LookupError
    except LookupError as error:
        raise ConfigError(f"there is no encoding {encoding!r}", where="encoding") from error
    wanted = known.name.removesuffix("-sig")
    for mark, found in _MARKS:
        if head.startswith(mark) and found.startswith(wanted):  # "utf-16" means what its mark says
            return found, len(mark)
    return {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(wanted, wanted), 0


def _refuse_binary(head: bytes, name: str) -> None:
    start = head[:8192]
    what = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if what is not None:
        raise BinaryError(f"is {what}, not text", where=name)
    zero = start.find(b"\0")
    if zero >= 0:
        raise BinaryError(f"looks binary (a zero byte at {zero}); if it is text, name its --encoding", where=name)
    if len(start) - len(start.translate(None, _CONTROLS)) > len(start) * 0.05:
        raise BinaryError("looks binary (many control characters); if it is text, name its --encoding", where=name)


class BinaryError(DataError):
    """The file is no text; in a folder that is reason to skip it."""


def _is_utf8(head: bytes, *, whole: bool) -> bool:
    """Whether it is UTF-8, or was before some bytes broke.

    A file with far more valid sequences than broken ones is UTF-8 that somebody damaged: taken for cp1252, all that is
    sound in it would turn into rubbish.
    """
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(head, whole)
    except UnicodeDecodeError:
        text = head.decode("utf-8", "replace")
        broken = text.count("\ufffd")
        ascii_bytes = len(head.translate(None, _HIGH))
        return len(text) - broken - ascii_bytes > 3 * broken
    return True


def _detect(head: bytes, name: str) -> str:
    high = len(head) - len(head.translate(None, _HIGH))
    letters = len(head) - len(head.translate(None, string.ascii_letters.encode())) if high < _FEW else 0
    if high < max(_WESTERN_SHARE * len(head), letters):
        try:
            head.decode("cp1252")
        except UnicodeDecodeError:
            pass
        else:
            return "cp1252"
    if high < _FEW:
        raise DataError(
            "has too little text to tell its encoding; save it as UTF-8, or name its --encoding", where=name
        )
    try:
        from charset_normalizer import from_bytes
    except ImportError as error:
        raise MissingExtraError("charset-normalizer", "data", "telling an encoding that is not UTF-8") from error
    best = from_bytes(head[: 1 << 16]).best()
    if best is None:
        raise DataError("its encoding could not be told; name it with --encoding", where=name)
    return codecs.lookup(best.encoding).name
