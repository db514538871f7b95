"""Checking data: what text files hold, and what `data prepare` would stop at or leave out, with file and line.

Invariant: every record is looked at; a bad one is reported and passed over, where the format allows it, so that one
run shows all that must be mended.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

from llmcli import config as configs
from llmcli.config import TextConfig
from llmcli.data.dedup import DigestSet, digest_of
from llmcli.data.formats import find_inputs
from llmcli.data.readers import Document, ReadLog, read_documents
from llmcli.errors import DataError
from llmcli.operations.records import Progress

VERY_LONG = 1 << 20  # characters
_SHOWN = 20  # places of each kind that are named
_STEP = 8 << 20  # bytes between two records of progress


@dataclasses.dataclass(frozen=True)
class FileReport:
    """One file."""

    name: str
    format: str
    compression: str
    encoding: str
    bytes: int
    documents: int
    replaced: int


@dataclasses.dataclass(frozen=True)
class Place:
    """A document that is worth a look."""

    where: str  # file:line
    what: str


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What the files hold. `problems` stop `data prepare`; `dropped` is what it would leave out."""

    files: tuple[FileReport, ...]
    documents: int
    characters: int
    bytes: int  # of the text as UTF-8
    shortest: int  # characters
    median: int
    longest: int
    empty: int
    short: int  # fewer characters than asked for
    duplicates: int  # equal to an earlier document; dropped with --dedup exact
    very_long: int
    dropped: dict[str, int]
    places: tuple[Place, ...]  # the first of each kind: empty, short, duplicate, very long
    skipped: tuple[str, ...]
    problem_count: int
    problems: tuple[str, ...]  # the first of them

    @property
    def ok(self) -> bool:
        """Whether `data prepare` would read all of it."""
        return not self.problem_count


def check_data(
    inputs: Sequence[str],
    text: TextConfig = TextConfig(),  # noqa: B008  (frozen)
    *,
    min_chars: int = 1,
) -> Iterator[Progress | CheckReport]:
    """Reads everything. Yields Progress, last a CheckReport. Raises DataError for an input that is not there."""
    configs.check(text)
    sources = find_inputs(inputs)
    total = sum(source.size for source in sources if source.size) if all(source.size for source in sources) else None
    tally = _Tally(min_chars)
    log = ReadLog(on_problem=tally.problem)
    done = told = 0

    def count(read: int) -> None:
        nonlocal done
        done += read

    for document in read_documents(sources, text, count, log):
        tally.take(document)
        if done - told >= _STEP:
            told = done
            yield Progress("check", done, total, "bytes")
    yield tally.report(log)


class _Tally:
    def __init__(self, min_chars: int) -> None:
        self.min_chars = min_chars
        self.seen = DigestSet()
        self.counts: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()  # length in steps of 1/16 of its power of two: how many
        self.places: dict[str, list[Place]] = {}
        self.problems: list[str] = []
        self.characters = self.bytes = self.problem_count = self.longest = 0
        self.shortest: int | None = None
        self.begin: Document | None = None  # of a document in several pieces
        self.length = 0
        self.digests: list[bytes] = []

    def problem(self, error: DataError) -> None:
        """Notes what would stop the reading."""
        self.problem_count += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(str(error))

    def take(self, document: Document) -> None:
        """Looks at a document or at a piece of one."""
        data = document.text.encode()
        self.bytes += len(data)
        self.begin = self.begin or document
        self.length += len(document.text)
        self.digests.append(digest_of(data))
        if document.final:
            joined = self.digests[0] if len(self.digests) == 1 else digest_of(b"".join(self.digests))
            blank = len(self.digests) == 1 and (not document.text or document.text.isspace())
            self._judge(f"{self.begin.source}:{self.begin.line}", self.length, joined, blank=blank)
            self.begin, self.length, self.digests = None, 0, []

    def _judge(self, where: str, length: int, digest: bytes, *, blank: bool) -> None:
        self.counts["documents"] += 1
        self.characters += length
        self.lengths[rounded(length)] += 1
        self.shortest = length if self.shortest is None else min(length, self.shortest)
        self.longest = max(self.longest, length)
        if blank:
            self._note("empty", where, "is empty")
        elif length < self.min_chars:
            self._note("short", where, f"has {length} characters")
        elif not self.seen.add(digest):
            self._note("duplicates", where, "is equal to an earlier document")
        if length > VERY_LONG:
            self._note("very_long", where, f"has {length:,} characters")

    def _note(self, kind: str, where: str, what: str) -> None:
        self.counts[kind] += 1
        places = self.places.setdefault(kind, [])
        if len(places) < _SHOWN:
            places.append(Place(where, what))

    def report(self, log: ReadLog) -> CheckReport:
        """The last record."""
        files = tuple(
            FileReport(
                source.name,
                source.format,
                source.compression,
                source.encoding,
                source.size,
                source.documents,
                source.replaced,
            )
            for source in log.sources
        )
        dropped = {kind: self.counts[kind] for kind in ("empty", "short") if self.counts[kind]}
        return CheckReport(
            files=files,
            documents=self.counts["documents"],
            characters=self.characters,
            bytes=self.bytes,
            shortest=self.shortest or 0,
            median=median_of(self.lengths),
            longest=self.longest,
            empty=self.counts["empty"],
            short=self.counts["short"],
            duplicates=self.counts["duplicates"],
            very_long=self.counts["very_long"],
            dropped=dropped,
            places=tuple(place for places in self.places.values() for place in places),
            skipped=tuple(log.skipped),
            problem_count=self.problem_count,
            problems=tuple(self.problems),
        )


def rounded(length: int) -> int:
    """The length to 4 or 5 binary digits: a count of all lengths would grow with the data."""
    step = 1 << max(0, length.bit_length() - 5)
    return length // step * step


def median_of(lengths: Counter[int]) -> int:
    """The median of rounded lengths."""
    half = (lengths.total() + 1) // 2
    for length in sorted(lengths):
        half -= lengths[length]
        if half <= 0:
            return length
    return 0
