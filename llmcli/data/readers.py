r"""Reading: documents out of files of any kind, as a stream, in bounded memory.

Invariant: the text of a document is what stands in the file, decoded and not otherwise changed: no line end, zero
byte or space is touched. Only what separates documents is left out.

A document of a text file that is longer than `PIECE` comes in pieces: all but the last have `final=False`, joined they
are the document. Whoever counts or ends documents looks at `final`; for counting words pieces are as good as wholes.
Pieces end where a byte-level tokenizer of GPT's kind cuts anyway (see `cut_place`), so that the ids of the pieces are
the ids of the whole.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, cast

from llmcli.config import TextConfig
from llmcli.data import json_values, tables
from llmcli.data.encodings import BinaryError, Decoder
from llmcli.data.formats import Source, find_inputs, open_source
from llmcli.errors import DataError, from_os_error

PIECE = 1 << 20  # characters
_JSON_LINE = re.compile(rb'\s*\{\s*"')
_JSON_LIST = re.compile(rb'\s*\[\s*[\{"]')


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A text and where it begins."""

    text: str
    source: str
    line: int  # from 1; in Parquet the row
    final: bool = True  # False: the next one continues this text


@dataclasses.dataclass
class SourceLog:
    """What was found in one source."""

    name: str
    format: str
    compression: str
    encoding: str = ""
    size: int = 0  # bytes on the disk
    sha256: str = ""
    documents: int = 0
    replaced: int = 0  # invalid places that were replaced


@dataclasses.dataclass
class ReadLog:
    """What reading found beside the documents.

    With `on_problem` a bad record is told to it and passed over, and so is the rest of a file that cannot be read on;
    without, the first one is raised.
    """

    sources: list[SourceLog] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)  # files of folders that hold no text, and why
    on_problem: Callable[[DataError], None] | None = None
    hashed: bool = False  # fill in sha256


def read_documents(
    inputs: Sequence[str] | Sequence[Source],
    config: TextConfig,
    on_bytes: Callable[[int], None] | None = None,
    log: ReadLog | None = None,
) -> Iterator[Document]:
    """The documents of all inputs in their order. `on_bytes` is told the bytes read from the disk.

    Raises DataError for what is not as it should be, with file:line, and when there is no document at all.
    """
    sources = [item for item in inputs if isinstance(item, Source)]
    if len(sources) < len(inputs):
        sources = find_inputs(cast(Sequence[str], inputs))
    log = log or ReadLog()
    found = False
    for source in sources:
        try:
            for document in _read_source(source, config, on_bytes, log):
                found = True
                yield document
        except BinaryError as error:
            if source.named:
                _tell(log, error)
            log.skipped.append(str(error))
        except DataError as error:
            _tell(log, error)
    if not found and log.on_problem is None:
        if log.skipped:
            raise DataError(f"no text was found; {len(log.skipped)} files were skipped, the first: {log.skipped[0]}")
        raise DataError("no document was found", where=", ".join(source.name for source in sources[:3]))


def _tell(log: ReadLog, error: DataError) -> None:
    if log.on_problem is None:
        raise error
    log.on_problem(error)


def _read_source(
    source: Source, config: TextConfig, on_bytes: Callable[[int], None] | None, log: ReadLog
) -> Iterator[Document]:
    # Parquet jumps about in its file; read through once more at the end, for its hash.
    direct = source.format == "parquet" and source.size is not None and not source.compression
    stream, raw = open_source(source, None if direct else on_bytes, hashed=log.hashed)
    seen = SourceLog(source.name, source.format, source.compression)
    try:
        with stream:
            seen.format = source.format or sniff(stream.peek(4096))
            if not stream.peek(1):
                if source.named:
                    raise DataError("is empty", where=source.name)
                log.skipped.append(f"{source.name}: is empty")
                return
            log.sources.append(seen)
            if direct:
                documents = _parquet(open(str(source.path), "rb"), source.name, config, on_bytes, log)  # noqa: SIM115
            else:
                documents = _of_format(stream, source.name, seen, config, log)
            for document in documents:
                seen.documents += document.final
                yield document
            while stream.read(1 << 20):  # what a reader left, so that count and hash are the whole file's
                pass
    except OSError as error:
        raise from_os_error(error, source.name) from error
    finally:
        seen.size = raw.count
        seen.sha256 = raw.digest.hexdigest() if raw.digest is not None else ""


def sniff(head: bytes) -> str:
    """The format of a stream without a name."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if _JSON_LINE.match(head):
        return "jsonl"
    return "json" if _JSON_LIST.match(head) else "text"


def _of_format(stream: Any, name: str, seen: SourceLog, config: TextConfig, log: ReadLog) -> Iterator[Document]:
    field = config.text_field
    if seen.format == "parquet":
        yield from _parquet(seekable(stream), name, config, None, log)
        return
    decoder = Decoder(stream, name, config.encoding, config.errors, plain=seen.format == "text")
    seen.encoding = decoder.encoding
    match seen.format:
        case "text":
            documents: Iterable[Document] = _text(decoder.chunks(), name, config.split_on)
        case "jsonl":
            documents = _json_lines(decoder.chunks(), name, field, log)
        case "json":
            documents = _json_values(decoder.chunks(), name, field, log)
        case _:
            lines = split_lines(decoder.chunks(), name)
            rows = tables.read_table(lines, name, field, tabs=seen.format == "tsv", problem=log.on_problem)
            documents = (Document(text, name, line) for text, line in rows)
    for document in documents:
        yield document
        seen.replaced = decoder.replaced
    seen.replaced = decoder.replaced


def _parquet(
    file: BinaryIO, name: str, config: TextConfig, on_bytes: Callable[[int], None] | None, log: ReadLog
) -> Iterator[Document]:
    with file:
        size = file.seek(0, 2)
        file.seek(0)
        rows = tables.read_parquet(file, name, size, config.text_field, on_bytes=on_bytes, problem=log.on_problem)
        yield from (Document(text, name, row) for text, row in rows)


def seekable(stream: Any) -> BinaryIO:
    """The stream's bytes in a nameless temporary file: Parquet begins at its end."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(stream, file, 1 << 20)
    return cast(BinaryIO, file)


# ----------------------------------------------------------------------------------------------------------------
# Text


def split_lines(chunks: Iterator[str], name: str) -> Iterator[str]:
    """The lines of a stream with their ends. Only a newline ends a line. Raises DataError for an endless one."""
    parts: list[str] = []
    held = number = 0
    for chunk in chunks:
        lines = chunk.split("\n")
        if len(lines) > 1:
            number += len(lines) - 1
            yield "".join(parts) + lines[0] + "\n"
            parts, held = [], 0
            for line in lines[1:-1]:
                yield line + "\n"
        parts.append(lines[-1])
        held += len(lines[-1])
        if held > json_values.LONGEST:
            raise DataError(f"the line is longer than {json_values.LONGEST >> 20} MB", where=f"{name}:{number + 1}")
    if held:
        yield "".join(parts)


def _text(chunks: Iterator[str], name: str, split_on: str) -> Iterator[Document]:
    if split_on == "file":
        line = 1
        for piece, final in pieces(chunks):
            yield Document(piece, name, line, final)
            line += piece.count("\n")
    elif split_on == "line":
        for number, text in enumerate(split_lines(chunks, name), start=1):
            if bare := text.rstrip("\r\n"):
                yield Document(bare, name, number)
    elif split_on == "blank":
        yield from _paragraphs(split_lines(chunks, name), name)
    else:
        yield from _separated(chunks, name, split_on)


def _paragraphs(lines: Iterator[str], name: str) -> Iterator[Document]:
    """Documents between lines that are blank; the line end before a blank line belongs to the separator."""

    def document() -> Iterator[Document]:
        whole = "".join(held).rstrip("\r\n")
        place = first
        for piece, final in pieces(iter((whole,))):
            yield Document(piece, name, place, final)
            place += piece.count("\n")

    held: list[str] = []
    first = size = 0
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            if held:
                yield from document()
            held, size = [], 0
            continue
        if not held:
            first = number
        held.append(line)
        size += len(line)
        if size > json_values.LONGEST:
            raise DataError(f"no blank line within {json_values.LONGEST >> 20} MB from here", where=f"{name}:{first}")
    if held:
        yield from document()


def _separated(chunks: Iterator[str], name: str, separator: str) -> Iterator[Document]:
    """Documents between occurrences of a text; line ends around them belong to the separator."""
    line = 1

    def documents(text: str) -> Iterator[Document]:
        nonlocal line
        bare = text.strip("\r\n")
        place = line + text[: len(text) - len(text.lstrip("\r\n"))].count("\n")
        line += text.count("\n")
        if bare:
            for piece, final in pieces(iter((bare,))):
                yield Document(piece, name, place, final)
                place += piece.count("\n")

    held = ""
    searched = 0  # held up to here has no separator
    for chunk in chunks:
        held += chunk
        begin = 0
        while (end := held.find(separator, max(begin, searched))) >= 0:
            yield from documents(held[begin:end])
            line += separator.count("\n")
            begin = end + len(separator)
        held = held[begin:]
        searched = max(0, len(held) - len(separator) + 1)
        if len(held) > json_values.LONGEST:
            raise DataError(f"no {separator!r} within {json_values.LONGEST >> 20} MB from here", where=f"{name}:{line}")
    yield from documents(held)


def pieces(chunks: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """(text, final): a text in pieces of at most `PIECE` characters. The cuts depend on the text, not on the chunks."""
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) > PIECE:
            cut = cut_place(held, PIECE)
            yield held[:cut], False
            held = held[cut:]
    yield held, True


def cut_place(text: str, limit: int) -> int:
    """Where to cut a text before `limit`, `limit` < its length: the best place in the last half.

    Best is after a newline between two characters that are no white space, next before a space between two such, next
    between a letter and a Chinese mark: there the patterns of GPT-2 and its followers always cut, so the ids on both
    sides are those of the whole. A text with none of them (base64, some Thai) is cut at `limit`. There, and with
    tokenizers that mark the begin of a text (SentencePiece's), an id or two differ: of a million characters.
    """
    for before, after in (("\n", 1), (" ", 0), ("。", 0), ("，", 0)):
        place = limit - 1
        while (place := text.rfind(before, limit // 2, place)) > 0:
            left, right = text[place - 1], text[place + 1]
            if left.isalpha() if not before.isspace() else not left.isspace() and not right.isspace():
                return place + after
    return limit


# ----------------------------------------------------------------------------------------------------------------
# JSON


def _json_lines(chunks: Iterator[str], name: str, field: str, log: ReadLog) -> Iterator[Document]:
    for number, line in enumerate(split_lines(chunks, name), start=1):
        if line.isspace():
            continue
        try:
            record = json_values.parse_line(line, name, number)
            text = json_values.text_of(record, field, f"{name}:{number}")
        except DataError as error:
            _tell(log, error)
        else:
            yield Document(text, name, number)


def _json_values(chunks: Iterator[str], name: str, field: str, log: ReadLog) -> Iterator[Document]:
    for record, line in json_values.JsonStream(chunks, name).values():
        try:
            text = json_values.text_of(record, field, f"{name}:{line}")
        except DataError as error:
            _tell(log, error)
        else:
            yield Document(text, name, line)
