"""Records: the rows of a file of any format, with their fields and their places; for labelled data.

Invariant: what a cell or a field holds is given out as it stands; a table's first line is a row like the others, since
whether it holds names is for those to tell who know what is looked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from llmcli.config_finetune import LabelledConfig
from llmcli.data import json_values, tables
from llmcli.data.encodings import Decoder
from llmcli.data.formats import Source, open_source
from llmcli.data.readers import seekable, sniff, split_lines
from llmcli.errors import DataError, from_os_error

Problem = Callable[[DataError], None] | None  # where a bad record is told and passed over; None: it is raised


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """An object's fields, or the cells of a row whose names are not known."""

    content: Any  # dict, or list of cells; JSON may hold anything else
    where: str  # file:line


def read_records(
    source: Source, config: LabelledConfig, problem: Problem = None, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Record]:
    """The records of a file. Raises DataError with file:line for what cannot be read, and for a file without any."""
    direct = source.format == "parquet" and source.size is not None and not source.compression
    stream, _ = open_source(source, None if direct else on_bytes)
    found = False
    try:
        with stream:
            if not stream.peek(1):
                raise DataError("is empty", where=source.name)
            kind = source.format if source.format not in ("", "text") else _sniffed(stream.peek(4096), source.name)
            if kind == "parquet":
                file = open(str(source.path), "rb") if direct else seekable(stream)  # noqa: SIM115
                with file:
                    size = file.seek(0, 2)
                    file.seek(0)
                    for values, row in tables.parquet_rows(file, source.name, size, on_bytes=on_bytes):
                        found = True
                        yield Record(values, f"{source.name}:row {row}")
            else:
                chunks = Decoder(stream, source.name, config.encoding, config.errors, plain=False).chunks()
                for record in _of_text(chunks, kind, source.name, problem):
                    found = True
                    yield record
    except OSError as error:
        raise from_os_error(error, source.name) from error
    if not found and problem is None:
        raise DataError("holds no record", where=source.name)


def _sniffed(head: bytes, name: str) -> str:
    """The format of a file whose name tells none."""
    kind = sniff(head)
    if kind == "text":
        line = head.splitlines()[0] if head else b""
        kind = "tsv" if b"\t" in line else "csv" if b"," in line else ""
    if not kind:
        raise DataError("is plain text; labelled data come as jsonl, json, csv, tsv or parquet", where=name)
    return kind


def _of_text(chunks: Iterator[str], kind: str, name: str, problem: Problem) -> Iterator[Record]:
    if kind == "jsonl":
        yield from _json_lines(chunks, name, problem)
    elif kind == "json":
        stream = json_values.JsonStream(chunks, name)
        last = 0
        for value, line in stream.records():
            # Where a file has all on one line, the line alone would tell nothing.
            yield Record(value, f"{name}:{line}:{stream.column}" if line == last else f"{name}:{line}")
            last = line
    else:
        lines = split_lines(chunks, name)
        for row, line in tables.tab_rows(lines) if kind == "tsv" else tables.comma_rows(lines, name):
            if row:
                yield Record(row, f"{name}:{line}")


def _json_lines(chunks: Iterator[str], name: str, problem: Problem) -> Iterator[Record]:
    for number, line in enumerate(split_lines(chunks, name), start=1):
        if line.isspace():
            continue
        try:
            value = json_values.parse_line(line, name, number)
        except DataError as error:
            if problem is None:
                raise
            problem(error)
        else:
            yield Record(value, f"{name}:{number}")
