"""Texts one by one: the lines of a text file, or the rows of JSON Lines, each with its place and its id.

Invariant: nothing is passed over: an empty line is an empty text, and a row that is wrong is an error with its line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from llmcli.config import TextConfig
from llmcli.data import json_values
from llmcli.data.encodings import Decoder
from llmcli.data.formats import Source, find_inputs, open_source
from llmcli.data.readers import read_documents, sniff, split_lines
from llmcli.errors import DataError, from_os_error


@dataclasses.dataclass(frozen=True, slots=True)
class TextRow:
    """A text, where it stands, and the id of its row."""

    text: str
    where: str | None = None  # file:line
    id: str | int | float | None = None


def read_text_rows(path: str, field: str = "text") -> Iterator[TextRow]:
    """The texts of files (`-`: stdin; compressed or not): of JSON, CSV, TSV and parquet the field, else the lines.

    Raises DataError at once for a file that is missing; while reading for one that is empty or no text, and for a row
    without a text.
    """
    return _rows(find_inputs([path]), field)


def _rows(sources: Sequence[Source], field: str) -> Iterator[TextRow]:
    for source in sources:
        if source.format in ("json", "csv", "tsv", "parquet"):
            for document in read_documents([source], TextConfig(text_field=field)):
                yield TextRow(document.text, f"{document.source}:{document.line}")
        else:
            yield from _lines(source, field)


def read_lines(path: str) -> Iterator[TextRow]:
    """The lines of a file, whatever its name tells (`-`: stdin). Raises DataError at once where there is none."""
    sources = find_inputs([path])
    return (row for source in sources for row in _lines(dataclasses.replace(source, format="text"), ""))


def piped_texts() -> Iterator[str]:
    """The lines of stdin that are not blank, read as files are."""
    return (row.text for row in read_lines("-") if row.text.strip())


def _lines(source: Source, field: str) -> Iterator[TextRow]:
    stream, _ = open_source(source)
    number = found = 0
    try:
        with stream:
            rows = (source.format or sniff(stream.peek(4096))) == "jsonl"
            decoder = Decoder(stream, source.name, "auto", "strict", plain=not rows)
            for number, line in enumerate(split_lines(decoder.chunks(), source.name), start=1):
                where = f"{source.name}:{number}"
                if not rows:
                    yield TextRow(line.rstrip("\r\n"), where)
                elif not line.isspace():
                    found += 1
                    yield _row(json_values.parse_line(line, source.name, number), field, where)
    except OSError as error:
        raise from_os_error(error, source.name) from error
    if not number or (rows and not found):
        raise DataError("holds no rows" if number else "is empty", where=source.name)


def _row(content: Any, field: str, where: str) -> TextRow:
    text = json_values.text_of(content, field, where)
    found = content.get("id") if isinstance(content, dict) else None
    sound = isinstance(found, str | int | None) or (isinstance(found, float) and math.isfinite(found))
    if not sound:
        raise DataError("the field 'id' is neither a text nor a number", where=where)
    return TextRow(text, where, found)
