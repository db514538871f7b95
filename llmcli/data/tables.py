"""Tables: CSV, TSV and Parquet, row by row.

Invariant: an unmatched quote, a row of another width, or a forged row count is an error that names its line or row; it
never swallows the rest of the file, nor memory without bounds.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from llmcli.data.json_values import text_of
from llmcli.errors import DataError, MissingExtraError

LONGEST_CELL = 16 << 20  # characters; Python's own limit is 131,072
LONGEST_ROW = 64 << 20
_ROWS_A_BYTE = 1000  # more rows than this in a byte of Parquet: the footer lies
_BATCH = 256  # rows of Parquet at once

Problem = Callable[[DataError], None] | None  # where a bad row is reported and passed over; None: it is raised


def read_table(
    lines: Iterator[str], name: str, field: str, *, tabs: bool, problem: Problem
) -> Iterator[tuple[str, int]]:
    """(text, line) of each row. The field is the name of a column in the first line, or the number of a column of a
    table without such a line, from 1."""
    column: int | None = None
    width = 0
    for row, line in tab_rows(lines) if tabs else comma_rows(lines, name):
        where = f"{name}:{line}"
        if not row:
            continue
        if column is None:
            width, column = len(row), _column_of(row, field, where)
            if not field.isdecimal():  # the names
                continue
        if len(row) != width:
            error = DataError(f"the row has {len(row)} columns, the first one {width}", where=where)
            if problem is None:
                raise error
            problem(error)
            continue
        yield row[column], line


def _column_of(row: list[str], field: str, where: str) -> int:
    if field in row and not field.isdecimal():  # a row of data may well hold a "1"
        return row.index(field)
    if field.isdecimal():
        if not 1 <= int(field) <= len(row):
            raise DataError(f"there is no column {field}; the row has {len(row)}", where=where)
        return int(field) - 1
    shown = ", ".join(repr(cell[:30]) for cell in row[:12])
    raise DataError(
        f"column {field!r} is missing; found: {shown} (choose with --text-field; where these are no names but data, "
        "by the column's number: --text-field 1)",
        where=where,
    )


def comma_rows(lines: Iterator[str], name: str) -> Iterator[tuple[list[str], int]]:
    """(cells, the line that the row begins on). Raises DataError where the quotes do not match."""
    csv.field_size_limit(LONGEST_CELL)
    count = 0

    def fed() -> Iterator[str]:
        nonlocal count
        for line in lines:
            count += len(line)
            if count > LONGEST_ROW:
                raise DataError(f"the row is longer than {LONGEST_ROW >> 20} MB", where=f"{name}:{first}")
            yield line

    # Strict, because otherwise a quote that is never closed makes one cell of the rest of the file.
    reader = csv.reader(fed(), strict=True)
    while True:
        first, count = reader.line_num + 1, 0
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error)
            if "field larger" in reason or "unexpected end" in reason:
                reason = "a quote in this row is never closed"
            raise DataError(f"is not valid CSV: {reason}", where=f"{name}:{first}") from error
        yield row, first


def tab_rows(lines: Iterator[str]) -> Iterator[tuple[list[str], int]]:
    """(cells, line). Most TSV knows no quotes, yet some programs write them: a cell quoted whole is unquoted."""
    for number, line in enumerate(lines, start=1):
        bare = line.rstrip("\r\n")
        yield ([_unquoted(cell) for cell in bare.split("\t")] if bare else []), number


def _unquoted(cell: str) -> str:
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        inner = cell[1:-1].replace('""', "\0")
        if '"' not in inner:
            return inner.replace("\0", '"')
    return cell


def read_parquet(
    file: BinaryIO, name: str, size: int, field: str, *, on_bytes: Callable[[int], None] | None, problem: Problem
) -> Iterator[tuple[str, int]]:
    """(text, row from 1). Read by row groups and pages; `size` is the file's, in bytes.

    Raises DataError for a damaged file, a missing column and one that holds no text.
    """
    for record, row in parquet_rows(file, name, size, field, on_bytes=on_bytes):
        try:
            yield text_of(record, field, f"{name}:row {row}"), row
        except DataError as error:
            if problem is None:
                raise
            problem(error)


def parquet_rows(
    file: BinaryIO, name: str, size: int, field: str | None = None, *, on_bytes: Callable[[int], None] | None = None
) -> Iterator[tuple[dict[str, Any], int]]:
    """(values by column, row from 1), of one column where `field` names it, else of all.

    Raises DataError for a damaged file and a missing column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", "reading Parquet") from error
    row = told = 0
    try:
        table = pyarrow.parquet.ParquetFile(
            file,
            buffer_size=1 << 20,
            pre_buffer=False,
            thrift_string_size_limit=64 << 20,
            thrift_container_size_limit=16 << 20,
        )
        names = table.schema_arrow.names
        if table.metadata.num_rows > _ROWS_A_BYTE * size:
            raise DataError(f"claims {table.metadata.num_rows} rows in {size} bytes; it is damaged", where=name)
        if field is not None and field not in names:
            found = ", ".join(repr(each) for each in names[:12])
            raise DataError(f"column {field!r} is missing; found: {found} (choose with --text-field)", where=name)
        columns = None if field is None else [field]
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False):
                for record in batch.to_pylist():
                    row += 1
                    yield record, row
            if on_bytes is not None:
                share = size * (group + 1) // table.num_row_groups
                on_bytes(share - told)
                told = share
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"is not valid Parquet: {reason}", where=name) from error
