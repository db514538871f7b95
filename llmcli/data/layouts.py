"""Layouts of labelled data: which one a file has, and its examples, as a stream.

Invariant: a file has one layout, told from its first record and named; a record that does not fit it is an error with
file:line and the fields found, never an example of another kind.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcli.config_finetune import TASKS as TASKS
from llmcli.config_finetune import LabelledConfig
from llmcli.data import fields, labels
from llmcli.data.examples import Example
from llmcli.data.fields import Fields
from llmcli.data.formats import STDIN, Source, find_inputs
from llmcli.data.json_values import kind_of
from llmcli.data.layout_kinds import UNNAMED, Kind, kinds_of
from llmcli.data.records import Problem, Record, read_records
from llmcli.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What a file was recognised as."""

    name: str  # "messages", "alpaca", "prompt/completion", "text/label", "squad 2.0", ...
    fields: tuple[str, ...]  # those that are used, by the file's own names; columns without a name by number, from 1
    header: bool  # the file's records have names; False: a table without a first line of names


@dataclasses.dataclass(frozen=True, slots=True)
class Splits:
    """The files of each part."""

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


# ----------------------------------------------------------------------------------------------------------------
# Files


def find_splits(inputs: Sequence[str]) -> Splits:
    """The parts that inputs have: where the name of one says train, the names of all tell the parts; else all train.

    A folder's files that hold no records (a readme) are left out, and beside a file named train those whose names tell
    no part. Raises DataError for an input that does not exist or holds no data.
    """
    found: dict[str, str] = {}
    for given in inputs:
        for source in _sources([given]):
            # The names of the folders above what was given say nothing about its files.
            inner = os.path.relpath(source.name, given) if os.path.isdir(given) else Path(source.name).name
            found.setdefault(source.name if source.path is not None else STDIN, _part_of(inner))
    if not found:
        raise DataError("no input was given")
    named = [(part, name) for name, part in found.items()]
    if all(part != "train" for part, _ in named):
        return Splits(tuple(name for _, name in named))
    return Splits(*(tuple(name for part, name in named if part == each) for each in ("train", "validation", "test")))


_PARTS = {
    "train": ("train", "training"),
    "validation": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


def _part_of(name: str) -> str:
    """train, validation, test or "", by the words of a file's name, else of the folder it stands in."""
    path = Path(name)
    for text in (path.name, path.parent.name):
        words = re.split(r"[^a-z]+", text.lower())
        for part, known in _PARTS.items():
            if any(word in known for word in words):
                return part
    return ""


def _sources(inputs: Sequence[str]) -> list[Source]:
    found = [source for source in find_inputs(inputs) if source.named or source.format != "text"]
    if not found:
        raise DataError("holds no jsonl, json, csv, tsv or parquet file", where=", ".join(inputs[:3]))
    return found


# ----------------------------------------------------------------------------------------------------------------
# Recognition


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """How the records of a file become examples."""

    kind: Kind
    names: dict[str, tuple[str, ...]]
    columns: tuple[str, ...] | None  # the names of a table's cells
    header: bool
    record: Mapping[str, Any]  # the first

    @property
    def layout(self) -> Layout:
        """What is shown of it."""
        used = [own for names in self.names.values() for own in names if own in self.record]
        return Layout(self.kind.name, tuple(dict.fromkeys(used)), self.header)


def recognise(path: str, task: str, config: LabelledConfig = LabelledConfig()) -> Layout:  # noqa: B008  (frozen)
    """The layout of a file for a task. Raises DataError with file:line, what is missing and the fields found."""
    source = _sources([path])[0]
    records = read_records(source, config)
    return _plan(list(itertools.islice(records, labels.SAMPLE)), task, config, source.name).layout


def read_examples(
    paths: Sequence[str],
    task: str,
    config: LabelledConfig = LabelledConfig(),  # noqa: B008  (frozen)
    on_problem: Callable[[DataError], None] | None = None,
    *,
    on_layout: Callable[[str, Layout], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Example]:
    """The examples of all files in their order. `on_layout` is told each file and what it was recognised as.

    Raises DataError at the first bad record (file:line, the missing field, the fields found), or hands it to
    `on_problem` and goes on.
    """
    kinds_of(task)
    for source in _sources(paths):
        try:
            yield from _examples_of(source, task, config, on_problem, on_layout, on_bytes)
        except DataError as error:
            if on_problem is None:
                raise
            on_problem(error)


def _examples_of(
    source: Source,
    task: str,
    config: LabelledConfig,
    problem: Problem,
    on_layout: Callable[[str, Layout], None] | None,
    on_bytes: Callable[[int], None] | None,
) -> Iterator[Example]:
    records = read_records(source, config, problem, on_bytes)
    head = list(itertools.islice(records, labels.SAMPLE))
    if not head:
        raise DataError("holds no record", where=source.name)
    plan = _plan(head, task, config, source.name)
    if on_layout is not None:
        on_layout(source.name, plan.layout)
    begin = 1 if plan.columns is not None and plan.header else 0
    for record in itertools.chain(head[begin:], records):
        try:
            found = plan.kind.make(Fields(_named(record, plan.columns), _names_for(plan, record), record.where))
        except DataError as error:
            if problem is None:
                raise
            problem(error)
            continue
        for example in found if isinstance(found, Iterator) else (found,):
            if not isinstance(example, DataError):
                yield example
            elif problem is None:
                raise example
            else:
                problem(example)


def _named(record: Record, columns: tuple[str, ...] | None) -> dict[str, Any]:
    """A record with names for its values. Raises DataError for what has none, and for a row of another width."""
    if columns is not None:
        if len(record.content) != len(columns):
            raise DataError(
                f"the row has {len(record.content)} columns, the first one {len(columns)}", where=record.where
            )
        return dict(zip(columns, record.content, strict=True))
    if not isinstance(record.content, dict):
        raise DataError(f"is {kind_of(record.content)}, not an object with fields", where=record.where)
    return record.content


def _names_for(plan: _Plan, record: Record) -> dict[str, tuple[str, ...]]:
    """The names that hold for the file, and of what may be missing those that this record has."""
    if plan.columns is not None or not plan.kind.extras:
        return plan.names
    return fields.choose(record.content, plan.kind.extras) | plan.names if isinstance(record.content, dict) else {}


def _plan(head: Sequence[Record], task: str, config: LabelledConfig, name: str) -> _Plan:
    kinds = kinds_of(task)
    known = dict.fromkeys(key for kind in kinds for key in (*kind.needs, *kind.extras))
    given = fields.read_columns(config.columns, known) if config.columns is not None else {}
    first = head[0]
    if not isinstance(first.content, list) or not all(isinstance(cell, str) for cell in first.content):
        return _chosen(kinds, _named(first, None), given, None, first.where, task, header=True)
    width = len(first.content)
    if given and all(own.isdecimal() for names in given.values() for own in names):
        columns = tuple(str(place) for place in range(1, width + 1))
        return _chosen(kinds, _named(first, columns), given, columns, first.where, task, header=False)
    columns = tuple(first.content)
    sample = next((row for row in head[1:] if len(row.content) == width), first)
    record = dict(zip(columns, sample.content, strict=True))
    if given or task not in UNNAMED or _fitting(kinds, record, {}) is not None:
        twice = [own for own in columns if own and columns.count(own) > 1]
        if twice:
            raise DataError(f"two columns have the name {twice[0]!r:.60}", where=first.where)
        return _chosen(kinds, record, given, columns, first.where, task, header=True)
    known_name, tell = UNNAMED[task]
    told = tell([row.content for row in head if len(row.content) == width], name)
    columns = tuple(str(place) for place in range(1, width + 1))
    kind = next(kind for kind in kinds if kind.name == known_name)
    return _Plan(kind, told, columns, False, _named(first, columns))


def _fitting(
    kinds: Sequence[Kind], record: Mapping[str, Any], given: dict[str, tuple[str, ...]]
) -> tuple[Kind, dict[str, tuple[str, ...]]] | None:
    """The first kind that the record has all fields for, with them."""
    for kind in kinds:
        wanted = {**kind.needs, **kind.extras}
        if set(given) - set(wanted):
            continue
        rest = {own: value for own, value in record.items() if not any(own in names for names in given.values())}
        names = given | fields.choose(rest, {key: aliases for key, aliases in wanted.items() if key not in given})
        if set(kind.needs) <= set(names) and kind.fits(record, names):
            return kind, names
    return None


def _chosen(
    kinds: Sequence[Kind],
    record: Mapping[str, Any],
    given: dict[str, tuple[str, ...]],
    columns: tuple[str, ...] | None,
    where: str,
    task: str,
    *,
    header: bool,
) -> _Plan:
    for names in given.values():
        for own in names:
            if own not in record:
                raise DataError(f"{fields.missing(own, record)} (--columns)", where=where)
    found = _fitting(kinds, record, given)
    if found is None:
        wanted = "; ".join(dict.fromkeys(" + ".join(kind.needs) for kind in kinds))
        shown = ", ".join(repr(own[:40]) for own in list(record)[:12]) or "none"
        aliases = [alias for kind in kinds for names in kind.needs.values() for alias in names]
        near = next(filter(None, (_near(own, aliases) for own in record if own not in aliases)), "")
        raise DataError(
            f"its fields are no layout of {task}: found {shown}{near}; looked for {wanted}; "
            "name them with --columns NAME=FIELD,...",
            where=where,
        )
    kind, chosen = found
    return _Plan(kind, chosen, columns, header, record)


def _near(own: str, aliases: Sequence[str]) -> str:
    close = difflib.get_close_matches(own.lower(), aliases, n=1, cutoff=0.7)
    return f" (is {own!r:.40} meant for {close[0]!r}?)" if close else ""
