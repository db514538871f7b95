"""Fields: which field of a record is what, and its value, checked.

Invariant: every complaint names the place, the file's own field and the fields that were found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llmcli.data.json_values import checked_text, kind_of
from llmcli.errors import ConfigError, DataError
from llmcli.settings import nearest

Names = Mapping[str, tuple[str, ...]]  # what it is for: the file's own fields, joined by newlines where several

_PART = r'(?:"[^"]*"|[^",+\s][^",+]*)'
_ITEM = re.compile(rf"\s*([A-Za-z_]+)\s*=\s*({_PART}(?:\+{_PART})*)\s*(?:,|$)")
_PIECE = re.compile(_PART)


def read_columns(given: str, known: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The mapping of --columns: `text=title+body,label="stars, given"`. Raises ConfigError, naming what is known."""
    known = list(known)
    found: dict[str, tuple[str, ...]] = {}
    place = 0
    while place < len(given):
        match = _ITEM.match(given, place)
        if match is None:
            raise ConfigError(
                f'cannot be read from {given[place : place + 40]!r} on; write text=review,label="number of stars"',
                where="columns",
            )
        name = match[1]
        if name not in known:
            raise ConfigError(
                f"{name!r} is not known here{nearest(name, known)}; known: {', '.join(known)}", where="columns"
            )
        if name in found:
            raise ConfigError(f"{name!r} is given twice", where="columns")
        found[name] = tuple(part[1:-1] if part[0] == '"' else part.strip() for part in _PIECE.findall(match[2]))
        place = match.end()
    if not found:
        raise ConfigError("names no field; write text=review,label=stars", where="columns")
    return found


class Fields:
    """The values of one record by what they are for."""

    def __init__(self, record: Mapping[str, Any], names: Names, where: str) -> None:
        self.record, self.names, self.where = record, names, where

    def own(self, name: str) -> str:
        """The file's own name for it."""
        return "+".join(self.names.get(name, (name,)))

    def error(self, message: str) -> DataError:
        """What is wrong with this record."""
        return DataError(message, where=self.where)

    def has(self, name: str) -> bool:
        """Whether the record says something there: null and an absent field do not."""
        return any(self.record.get(own) is not None for own in self.names.get(name, ()))

    def value(self, name: str) -> Any:
        """What the field holds; several fields' texts joined by newlines. Raises DataError for a missing one."""
        own = self.names.get(name, ())
        for each in own:
            if each not in self.record:
                raise self.error(missing(each, self.record))
        if len(own) == 1:
            return self.record[own[0]]
        return "\n".join(filter(None, (checked_text(self.record[each], each, self.where) for each in own)))

    def text(self, name: str, *, blank: bool = False) -> str:
        """A text. Raises DataError for another kind of value, and for a blank one unless `blank`."""
        return self.as_text(self.value(name), self.own(name), blank=blank)

    def as_text(self, value: Any, own: str, *, blank: bool = False) -> str:
        """A value as a text."""
        text = checked_text(value, own, self.where)
        if not blank and (not text or text.isspace()):
            raise self.error(f"field {own!r} is empty")
        return text

    def texts(self, name: str) -> list[str]:
        """A text, or each of a list of texts; blank ones of a list are left out."""
        value = self.value(name)
        if not isinstance(value, list):
            return [self.text(name)]
        found = [self.as_text(item, self.own(name), blank=True) for item in value]
        found = [text for text in found if text and not text.isspace()]
        if not found:
            raise self.error(f"field {self.own(name)!r} is empty")
        return found

    def number(self, name: str) -> float:
        """A finite number, written as one or as a text."""
        value = self.value(name)
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            number = float(value)
        except (ValueError, OverflowError):
            shown = f"{value!r:.40}" if isinstance(value, str) else kind_of(value)
            raise self.error(f"field {self.own(name)!r} holds {shown}, not a number") from None
        if not math.isfinite(number):
            raise self.error(f"field {self.own(name)!r} holds {number}, which is no finite number")
        return number

    def labels(self, name: str) -> tuple[str, ...]:
        """One label, or those of a list."""
        value = self.value(name)
        if isinstance(value, list):
            return tuple(dict.fromkeys(self._label(item, name) for item in value))
        return (self._label(value, name),)

    def _label(self, value: Any, name: str) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int):
            return str(value)
        if isinstance(value, float) and math.isfinite(value):
            return f"{value:g}"
        return self.as_text(value, self.own(name)).strip()


def missing(field: str, record: Iterable[str]) -> str:
    """The complaint about a field that is not there: what was found, and what is near."""
    found = list(record)
    shown = ", ".join(repr(name[:40]) for name in found[:12]) or "none"
    return f"field {field!r} is missing; found: {shown}{nearest(field, found)}"


def choose(record: Mapping[str, Any], wanted: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Of each thing that is wanted the first of its names that the record has, whatever its case."""
    folded = {name.casefold().strip(): name for name in reversed(list(record))}
    chosen: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for name, aliases in wanted.items():
        own = next((folded[alias] for alias in aliases if alias in folded and folded[alias] not in taken), None)
        if own is not None:
            chosen[name] = (own,)
            taken.add(own)
    return chosen


Maker = Callable[[Fields], Any]  # an example, or an iterator of examples and of DataErrors for those that are not sound
