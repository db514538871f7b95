"""JSON as a stream: the values of a list, or of one file of values, one after the other, and the text in each.

Invariant: whatever a stranger's JSON does (a million brackets, 5,000-digit numbers, halves of surrogate pairs, the same
key twice), it ends in a DataError with file:line:column, not in another exception and not in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llmcli.errors import DataError

LONGEST = 64 << 20  # characters of one value or line
# Under these names an object holds a list of records; {"version": ..., "data": [...]} is SQuAD's.
CONTAINERS = ("data", "train", "validation", "test", "rows", "examples", "records", "items", "instances")
_SPACE = re.compile(r"[ \t\n\r]*")
_KINDS = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list", str: "a text"}


class _TwiceError(ValueError):
    """A key stands twice in one object."""


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json would let the last of two equal keys win without a word."""
    made = dict(items)
    if len(made) != len(items):
        seen: set[str] = set()
        raise _TwiceError(next(key for key, _ in items if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def parse_line(line: str, name: str, number: int) -> Any:
    """The value on a line of JSON Lines. Raises DataError with file:line:column."""
    try:
        return _DECODER.decode(line.rstrip("\r\n"))  # an error at its end would be put on a line that is none
    except json.JSONDecodeError as error:
        raise DataError(f"is not valid JSON: {error.msg}", where=f"{name}:{number}:{error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(_reason(error), where=f"{name}:{number}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, _TwiceError):
        return f"the key {error.args[0]!r} appears twice in one object"
    if isinstance(error, RecursionError):
        return "its JSON is nested too deep"
    return "holds a number of too many digits"


def text_of(record: Any, field: str, where: str) -> str:
    """The text of a record: the record itself where it is a text, else its field; a list of texts joined by newlines.

    null is an empty text. Raises DataError for a missing field, naming those there are, and for what is no text.
    """
    value = record
    if isinstance(record, dict):
        if field not in record:
            found = ", ".join(repr(key) for key in list(record)[:12]) or "none"
            raise DataError(f"field {field!r} is missing; found: {found} (choose with --text-field)", where=where)
        value = record[field]
    elif not isinstance(record, str):
        raise DataError(f"is {kind_of(record)}, neither an object nor a text", where=where)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = "\n".join(value)
    return checked_text(value, field, where)


def checked_text(value: Any, field: str, where: str) -> str:
    """A field's value as a text; null is an empty one. Raises DataError for what is no text, or no characters."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"field {field!r} holds {kind_of(value)}, not text", where=where)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise DataError(
                f"the text holds {half}, half of a surrogate pair, which is no character", where=where
            ) from error
    return value


def kind_of(value: Any) -> str:
    """What a value is, in words: a number, a list, ..."""
    return "null" if value is None else _KINDS.get(type(value), "no text")


class JsonStream:
    """The values of a JSON file: the items of its list, or the values that stand in it one after the other."""

    def __init__(self, chunks: Iterator[str], name: str) -> None:
        self.chunks, self.name = chunks, name
        self.text, self.position, self.ended = "", 0, False
        self.mark, self.line, self.column = 0, 1, 1  # a position whose place is known: lines are counted from there

    def values(self) -> Iterator[tuple[Any, int]]:
        """(value, the line it begins on)."""
        if self._peek() != "[":
            while self._peek():
                yield self._value()
            return
        yield from self._items()
        if self._peek():
            raise self._error("something follows the list")

    def records(self) -> Iterator[tuple[Any, int]]:
        """As `values`; of an object that holds a list of objects under a name of CONTAINERS, the items of that list."""
        if self._peek() != "{":
            yield from self.values()
            return
        while self._peek():
            if self._peek() == "{":
                yield from self._object()
            else:
                yield self._value()

    def _items(self) -> Iterator[tuple[Any, int]]:
        """The items of the list that begins here, up to behind its end."""
        self.position += 1
        if self._peek() == "]":
            self.position += 1
            return
        while True:
            yield self._value()
            separator = self._peek()
            if separator not in (",", "]"):
                raise self._error("expecting ',' or ']'" if separator else "it ends inside its list")
            self.position += 1
            if separator == "]":
                return

    def _object(self) -> Iterator[tuple[Any, int]]:
        """The object that begins here, or the items of the list in it."""
        line, column = self._place(self.position)
        made: dict[str, Any] = {}
        expanded = ""
        self.position += 1
        separator = self._peek()
        while separator != "}" or made:
            if self._peek() != '"':
                raise self._error("expecting a name in quotes" if self._peek() else "it ends inside its object")
            key = str(self._value()[0])
            if key in made:
                raise DataError(_reason(_TwiceError(key)), where=f"{self.name}:{self.line}:{self.column}")
            if self._peek() != ":":
                raise self._error("expecting ':'")
            self.position += 1
            made[key] = None
            if key in CONTAINERS and self._peek() == "[":
                kept: list[Any] = []
                for item, place in self._items():
                    if not isinstance(item, dict):
                        kept.append(item)
                        continue
                    if expanded not in ("", key):
                        raise self._error(f"it holds two lists of records, {expanded!r} and {key!r}; a file holds one")
                    expanded = key
                    yield item, place
                made[key] = kept
            else:
                made[key] = self._value()[0]
            separator = self._peek()
            if separator not in (",", "}"):
                raise self._error("expecting ',' or '}'" if separator else "it ends inside its object")
            self.position += 1
            if separator == "}":
                break
        else:
            self.position += 1
        if not expanded:
            self.line, self.column = line, column
            yield made, line

    def _peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self._more()

    def _value(self) -> tuple[Any, int]:
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                # A number at the end of what was read may go on.
                if end < len(self.text) or self.ended or isinstance(value, str | dict | list):
                    self.line, self.column = self._place(self.position)
                    self.mark, self.position = self.position, end
                    return value, self.line
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                if self.ended or not unfinished:
                    raise self._error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                line, column = self._place(self.position)
                raise DataError(_reason(error), where=f"{self.name}:{line}:{column}") from error
            if len(self.text) - self.position > LONGEST:
                raise self._error(f"a value longer than {LONGEST >> 20} MB begins here")
            self._more()

    def _more(self) -> None:
        """Reads on: as much again as is there, so that a long value is parsed a few times and not a thousand."""
        rest = self.text[self.position :]
        self.line, self.column = self._place(self.position)
        parts, count = [rest], 0
        while count <= len(rest) and not self.ended:
            chunk = next(self.chunks, None)
            self.ended = chunk is None
            parts.append(chunk or "")
            count += len(chunk or "")
        self.text, self.position, self.mark = "".join(parts), 0, 0

    def _place(self, position: int) -> tuple[int, int]:
        """(line, column) of a position behind the mark."""
        newlines = self.text.count("\n", self.mark, position)
        if not newlines:
            return self.line, self.column + position - self.mark
        return self.line + newlines, position - self.text.rfind("\n", 0, position)

    def _error(self, message: str, position: int | None = None) -> DataError:
        line, column = self._place(self.position if position is None else position)
        return DataError(f"is not valid JSON: {message}", where=f"{self.name}:{line}:{column}")
