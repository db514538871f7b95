"""What `verify` finds in an index of `similar`: its files, arrays, texts and lists held against each other.

Invariant: as in `verify`; an index of any size is read in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmcli.errors import DataError, from_os_error
from llmcli.files.vector_index import INDEX, ZERO, Piece, StoredIndex
from llmcli.files.vector_lists import LISTS, check_lists, facts_of_lists

_ROWS = 1 << 14  # vectors looked at at once
_TOLD = 5  # faults of a kind that are told one by one
_LENGTH = 1e-3  # a vector's length may be so far from 1


def index_problems(folder: Path, *, values: bool) -> Iterator[str]:
    """Problems of an index, beside its manifest's. `values`: of its vectors too. Raises what opening it raises."""
    index = StoredIndex(folder)
    owners = yield from _files(index)
    yield from _limited(_texts(index, owners), "pieces.jsonl")
    facts = facts_of_lists(index.facts.get("search"), INDEX)
    if facts is not None:
        try:
            check_lists(folder, facts)
        except DataError as error:
            yield f"{LISTS}: {error.message}"
    if values:
        yield from _limited(_vectors(index), "bytes.npy" if index.vectors is None else "vectors.npy")


def _files(index: StoredIndex) -> Generator[str, None, list[str | None]]:
    """The files of index.json must stand for each row once; what `yield from` gives is each row's file."""
    owners: list[str | None] = [None] * len(index.places)
    entries = index.facts.get("files")
    for entry in entries if isinstance(entries, list) else []:
        first, count = entry["first"], entry["pieces"]
        if min(first, count) < 0 or first + count > len(owners):
            yield f"{INDEX}: {entry['file']}: pieces {first} to {first + count}, there are {len(owners)}"
        elif any(owner is not None for owner in owners[first : first + count]):
            yield f"{INDEX}: {entry['file']}: its pieces are another file's too"
        else:
            owners[first : first + count] = [entry["file"]] * count
    lacking = sum(owner is None for owner in owners)
    if lacking:
        yield f"{INDEX}: {lacking} pieces are of none of its files"
    return owners


def _texts(index: StoredIndex, owners: list[str | None]) -> Iterator[str]:
    """Each line of pieces.jsonl must begin where pieces.npy says, and be a piece of the file whose row it is."""
    path, number, end = index.folder / "pieces.jsonl", 0, 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                row = number - 1
                if row >= len(owners):
                    yield f"pieces.jsonl:{number}: there are {len(owners)} pieces"
                    return
                if index.places[row] != end:
                    yield f"pieces.jsonl:{number}: begins at byte {end}, pieces.npy says {index.places[row]}"
                end += len(line)
                problem = _problem_of(line, owners[row])
                if problem:
                    yield f"pieces.jsonl:{number}: {problem}"
    except OSError as error:
        raise from_os_error(error, path) from error
    if number < len(owners):
        yield f"pieces.jsonl: has {number} lines, there are {len(owners)} pieces"


def _problem_of(line: bytes, owner: str | None) -> str:
    """What is wrong with a piece's line; nothing: an empty text."""
    try:
        piece = Piece(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return "is no piece"
    if not isinstance(piece.text, str) or not piece.text.strip():
        return "has no text"
    if not isinstance(piece.line, int) or not isinstance(piece.end_line, int) or not 0 < piece.line <= piece.end_line:
        return f"stands on the lines {piece.line!r} to {piece.end_line!r}"
    if piece.end_line - piece.line != piece.text.count("\n"):
        return f"has {piece.text.count(chr(10)) + 1} lines, and stands on {piece.line} to {piece.end_line}"
    if owner is not None and piece.file != owner:
        return f"is of {piece.file}, {INDEX} says {owner}"
    return ""


def _vectors(index: StoredIndex) -> Iterator[str]:
    """Vectors must be finite, of length 1, and within half a step of their bytes."""
    for begin in range(0, len(index.steps), _ROWS):
        part = slice(begin, begin + _ROWS)
        steps = index.steps[part, None]
        wide = (index.codes[part].astype(np.float32) - np.float32(ZERO)) * steps
        rows = wide if index.vectors is None else index.vectors[part]
        length = np.linalg.norm(rows, axis=1)
        rounding = 0.0 if rows is not wide else np.abs(steps[:, 0]) * (0.5 * rows.shape[1] ** 0.5)
        yield from _told(~np.isfinite(length), begin, "is not finite")
        yield from _told(np.abs(length - 1) > _LENGTH + rounding, begin, "is not of length 1")
        if index.vectors is not None:
            yield from _told((np.abs(rows - wide) > steps * 0.51).any(axis=1), begin, "is not what its bytes say")


def _told(wrong: Any, begin: int, what: str) -> Iterator[str]:
    yield from (f"vector {begin + int(row)} {what}" for row in np.flatnonzero(wrong))


def _limited(problems: Iterator[str], name: str) -> Iterator[str]:
    """The first few problems, and how many more there are."""
    more = 0
    for number, problem in enumerate(problems):
        told = problem if problem.startswith(name) else f"{name}: {problem}"
        if number < _TOLD:
            yield told
        else:
            more += 1
    if more:
        yield f"{name}: {more} more"
