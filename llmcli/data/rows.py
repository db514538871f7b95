"""Rows: JSON Lines as they stand, each with its place; for commands that answer row by row.

Invariant: a row that is wrong is one row lost, not the file: it comes as its error and the next one follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from llmcli.data import json_values
from llmcli.data.encodings import Decoder
from llmcli.data.formats import find_inputs, open_source
from llmcli.data.readers import split_lines
from llmcli.errors import DataError, from_os_error


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A row's object, or what is wrong with it."""

    where: str  # file:line
    content: dict[str, Any]
    error: DataError | None = None


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a JSON Lines file (`-`: stdin; also gzip, xz, zstd); blank lines are none.

    Raises DataError for a file that is missing, empty or no text.
    """
    for source in find_inputs([path]):
        stream, _ = open_source(source)
        number = found = 0
        try:
            with stream:
                decoder = Decoder(stream, source.name, "auto", "strict", plain=False)
                for number, line in enumerate(split_lines(decoder.chunks(), source.name), start=1):
                    if not line.isspace():
                        found += 1
                        yield _row(line, source.name, number)
        except OSError as error:
            raise from_os_error(error, source.name) from error
        if not found:
            raise DataError("holds no rows" if number else "is empty", where=source.name)


def _row(line: str, name: str, number: int) -> Row:
    where = f"{name}:{number}"
    try:
        content = json_values.parse_line(line, name, number)
    except DataError as error:
        return Row(error.where or where, {}, error)
    if not isinstance(content, dict):
        return Row(where, {}, DataError("is not a JSON object", where=where))
    return Row(where, content)
