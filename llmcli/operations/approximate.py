"""Approximate search: lists of rows around centres, of which a search looks at the nearest few.

Invariant: a row's score is that of an exact search; what is approximate is which rows are scored, and how many of the
nearest are found that way was measured on the vectors themselves. The same vectors and threads give the same file.
Source: Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search" (2011), section IV (IVFADC); by faiss.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.config_embed import IndexConfig, SearchConfig
from llmcli.data.cores import available_cores
from llmcli.errors import UsageError
from llmcli.files.vector_index import INDEX, ZERO, StoredIndex, write_facts
from llmcli.files.vector_lists import (
    LISTS,
    ListFacts,
    StoredLists,
    facts_of_lists,
    has_faiss,
    import_faiss,
    write_lists,
)
from llmcli.operations.nearest import Floats, Nearest, Places

ENOUGH = 250_000  # pieces from which on `auto` makes lists: an exact search takes some 30 ms then
LEAST = 0.95  # recall@5 below which `auto` does without them
_RECALL = 0.99  # that is aimed at; queries lie further from the pieces than these from each other
_SAMPLE, _NEAREST = 200, 5
_POINTS, _ROUNDS = 64, 10  # of k-means: points a centre, and how often they are assigned
_ROWS = 1 << 15  # vectors held at once
_AGAIN, _FEWEST = 8, 64  # candidates for each row that is wanted: the codes' order is not quite the vectors'
_MISSING = "search is exact: approximate search needs the package faiss-cpu: pip install 'llmcli[search]'"


def candidates_for(count: int) -> int:
    """How many rows are scored by their own vectors where `count` are wanted."""
    return max(_AGAIN * count, _FEWEST)


def make_lists(folder: Path, index: StoredIndex, *, threads: int | None = None) -> ListFacts:
    """Makes the lists of an index in its staged folder, and measures them. Raises MissingExtraError without faiss."""
    faiss = import_faiss()
    begun = time.perf_counter()
    rows, dimensions = index.codes.shape
    lists = max(1, min(rows // 8, round(2 * math.sqrt(rows))))
    faiss.omp_set_num_threads(threads or available_cores())
    centres = faiss.IndexFlatIP(dimensions)
    kind, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    made = faiss.IndexIVFScalarQuantizer(centres, dimensions, lists, kind, metric)
    made.cp.spherical, made.cp.niter, made.cp.min_points_per_centroid = True, _ROUNDS, 1
    made.train(_vectors(index, np.unique(np.linspace(0, rows - 1, min(rows, _POINTS * lists), dtype=np.int64))))
    asked = np.unique(np.linspace(0, rows - 1, min(rows, _SAMPLE), dtype=np.int64))
    queries = _vectors(index, asked)
    best = _Best(asked, min(_NEAREST, rows - 1))
    for begin, part in _parts(index):
        made.add(part)
        best.see(begin, part @ queries.T)
    probes, recall = _probes(faiss, made, index, queries, best)
    said = write_lists(folder, made)
    return ListFacts(lists, probes, recall, len(asked), round(time.perf_counter() - begun, 3), **said)


def _vectors(index: StoredIndex, rows: Any) -> Floats:
    """The vectors of some rows, from their bytes where no others are kept."""
    if index.vectors is not None:
        return np.ascontiguousarray(index.vectors[rows])
    wide: Floats = (index.codes[rows].astype(np.float32) - np.float32(ZERO)) * index.steps[rows, None]
    return wide


def _parts(index: StoredIndex) -> Iterator[tuple[int, Floats]]:
    for begin in range(0, len(index.codes), _ROWS):
        yield begin, _vectors(index, slice(begin, begin + _ROWS))


class _Best:
    """The greatest scores of each query that were seen, its own row left out."""

    def __init__(self, asked: Places, count: int) -> None:
        self.asked, self.count = asked, count
        self.scores = np.full((len(asked), count), -np.inf, np.float32)

    def see(self, begin: int, scores: Floats) -> None:
        """`scores` (rows, queries) of the rows from `begin` on."""
        here = np.flatnonzero((self.asked >= begin) & (self.asked < begin + len(scores)))
        scores[self.asked[here] - begin, here] = -np.inf
        if self.count:
            both = np.concatenate([self.scores, scores.T], axis=1)
            self.scores = -np.partition(-both, self.count - 1, axis=1)[:, : self.count]


def _probes(faiss: Any, made: Any, index: StoredIndex, queries: Floats, best: _Best) -> tuple[int, float]:
    """How many lists a search looks at, the fewest that find enough, and the recall@5 with so many."""
    if not best.count:
        return 1, 1.0
    least = best.scores.min(axis=1)
    probes = 1
    while True:
        ways = faiss.SearchParametersIVF(nprobe=probes)
        _, found = made.search(queries, candidates_for(_NEAREST), params=ways)
        hits = 0
        for query, own, wanted, rows in zip(queries, best.asked, least, found, strict=True):
            others = rows[(rows >= 0) & (rows != own)]
            hits += min(best.count, int((_vectors(index, others) @ query >= wanted - 1e-6).sum()))
        recall = hits / (best.count * len(queries))
        if recall >= _RECALL or 4 * probes > made.nlist:
            return probes, round(recall, 4)
        probes *= 2


def makes_lists(config: IndexConfig, pieces: int) -> bool:
    """Whether an index of so many pieces gets lists."""
    return config.search == "approximate" or (config.search == "auto" and pieces >= ENOUGH and has_faiss())


def settle_search(folder: Path, config: IndexConfig) -> tuple[dict[str, Any], list[str]]:
    """Makes the lists of an index in a staged folder where they are wanted; what index.json now says, and notes.

    Raises MissingExtraError where they were asked for and faiss is not there.
    """
    index = StoredIndex(folder)
    pieces = len(index.codes)
    found: dict[str, Any] = {"kind": "exact"}
    notes: list[str] = []
    (folder / LISTS).unlink(missing_ok=True)
    if makes_lists(config, pieces):
        facts = make_lists(folder, index, threads=config.threads)
        if config.search == "approximate" or facts.recall_at_5 >= LEAST:
            found = {"kind": "approximate", **dataclasses.asdict(facts)}
        else:
            (folder / LISTS).unlink()
            notes = [
                f"search is exact: lists found {facts.recall_at_5:.1%} of the nearest five, fewer than {LEAST:.0%}"
            ]
    elif config.search == "auto" and pieces >= ENOUGH:
        notes = [_MISSING]
    write_facts(folder, {**index.facts, "search": found})
    return found, notes


def open_search(index: StoredIndex, config: SearchConfig) -> tuple[Nearest | Approximate, list[str]]:
    """What searches an index, as its settings want it, and notes where that is not as it was made.

    Raises UsageError where lists are asked for and the index has none, MissingExtraError where faiss is not there.
    """
    nearest = Nearest(index.codes, index.steps, index.vectors, threads=config.threads)
    if config.search == "exact":
        return nearest, []
    facts = facts_of_lists(index.facts.get("search"), str(index.folder / INDEX))
    if facts is None:
        if config.search == "approximate":
            where = str(index.folder)
            raise UsageError("was made for exact search; index it with --search approximate first", where=where)
        return nearest, []
    if config.search == "auto" and not has_faiss():
        return nearest, [_MISSING]
    return Approximate(nearest, StoredLists(index.folder, facts, *index.codes.shape)), []


class Approximate:
    """Exact search's rows and scores, with lists that say which rows are looked at."""

    def __init__(self, nearest: Nearest, lists: StoredLists) -> None:
        self.nearest, self.lists = nearest, lists

    def search(self, vector: npt.NDArray[np.float32], count: int) -> tuple[Places, Floats]:
        """As `Nearest.search`, from the rows of the lists that are nearest to the vector."""
        places = self.lists.candidates(vector, min(candidates_for(count), self.lists.rows))
        if len(places) < min(count, self.lists.rows):  # more are wanted than these lists hold
            return self.nearest.search(vector, count)
        return self.nearest.best_of(places, vector, count)
