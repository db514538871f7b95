"""Log-likelihood of token sequences: windows that overlap, many at once. Token ids only.

Invariant: each token after a sequence's first is scored exactly once, with at least `context - stride` tokens before it
where there are so many, and the result does not depend on how windows are put into batches (but for rounding).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from llmcli.runtime.session import Session

BATCH_TOKENS = 8192
_POOLED = 64  # batches' worth of windows that are sorted by length


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """Ids of a sequence from `begin`; the last `scored` of them are scored."""

    sequence: int
    begin: int
    end: int
    scored: int


def windows(length: int, context: int, stride: int, sequence: int = 0, *, done: int = 1) -> Iterator[Window]:
    """The windows of a sequence: at most context + 1 ids, as the last one is a target only.

    The first `done` ids are given and not scored; one at least, as the first token has nothing before it.
    """
    while done < length:
        end = min(length, done + (context if done == 1 else stride))
        yield Window(sequence, max(0, end - context - 1), end, end - done)
        done = end


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
    """A window and the log-probabilities, in nats, of its scored tokens."""

    window: Window
    values: npt.NDArray[np.float32]


def score_windows(
    session: Session,
    sequences: Sequence[npt.NDArray[np.integer]],
    chosen: Iterable[Window],
    batch_size: int | None = None,
) -> Iterator[Scored]:
    """Scores windows of the sequences, those of like length together; they come back in no fixed order."""
    pool: list[Window] = []
    limit = _POOLED * (batch_size or 16)
    for window in chosen:
        pool.append(window)
        if len(pool) == limit:
            yield from _score_pool(session, sequences, pool, batch_size)
            pool = []
    yield from _score_pool(session, sequences, pool, batch_size)


def _score_pool(
    session: Session, sequences: Sequence[npt.NDArray[np.integer]], pool: list[Window], batch_size: int | None
) -> Iterator[Scored]:
    pool.sort(key=lambda window: window.begin - window.end)
    first = 0
    while first < len(pool):
        longest = pool[first].end - pool[first].begin
        rows = pool[first : first + (batch_size or max(1, BATCH_TOKENS // longest))]
        first += len(rows)
        # Filled up on the right, where causal attention never looks.
        ids = np.zeros((len(rows), longest), np.int64)
        wanted = np.zeros((len(rows), longest - 1), np.bool_)
        for row, window in enumerate(rows):
            size = window.end - window.begin
            ids[row, :size] = sequences[window.sequence][window.begin : window.end]
            wanted[row, size - 1 - window.scored : size - 1] = True
        values = session.score(ids, wanted)
        for row, window in enumerate(rows):
            yield Scored(window, values[row, wanted[row]])


def score_ends(
    session: Session,
    sequences: Sequence[npt.NDArray[np.integer]],
    given: Sequence[int],
    batch_size: int | None = None,
) -> list[npt.NDArray[np.float32]]:
    """Log-probabilities, in nats, of each sequence's ids from number given[i] (1 at least) on.

    A sequence that does not fit the context is scored in windows that overlap by half.
    """
    context = session.context
    chosen: list[Window] = []
    for number, (sequence, done) in enumerate(zip(sequences, given, strict=True)):
        length = len(sequence)
        if done < length <= context + 1:
            chosen.append(Window(number, 0, length, length - done))
        else:
            chosen += windows(length, context, max(1, context // 2), number, done=done)
    found = [np.zeros(max(len(ids) - done, 0), np.float32) for ids, done in zip(sequences, given, strict=True)]
    for scored in score_windows(session, sequences, chosen, batch_size):
        window = scored.window
        end = window.end - given[window.sequence]
        found[window.sequence][end - window.scored : end] = scored.values
    return found
