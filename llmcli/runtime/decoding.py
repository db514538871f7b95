"""Decoding: rows of token ids grow token by token through a session. Ids only; who reads them as text may end a row.

Invariant: each row ends with exactly one `Finished`, after its last `Token`; its tokens depend on no other row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from llmcli.runtime.sampling import Choice, Sampler
from llmcli.runtime.session import Logits, Session

STOP, LENGTH, CUT = "stop", "length", "cut"


@dataclasses.dataclass
class Row:
    """A prompt that is continued. Setting `finish_reason` while its token is at hand ends the row."""

    prompt: Sequence[int]
    sampler: Sampler
    max_new_tokens: int
    ends: frozenset[int] = frozenset()  # tokens that end the text
    vocab_size: int | None = None  # ids beyond are never chosen: rows that fill a model's embedding up
    logprobs: int | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None  # stop: an end was met; length: max_new_tokens; cut: the context is full
    drafted: int = 0  # tokens that were guessed, and those of them that held (see speculation.py)
    accepted: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """A token that a row gained."""

    row: int
    choice: Choice


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """A row that ended; why stands in the row."""

    row: int


def decode(
    session: Session,
    rows: Iterable[Row | None],
    prefill: Callable[[Sequence[int]], Logits] | None = None,
    *,
    width: int | None = None,
) -> Iterator[Token | Finished]:
    """Grows rows together, at most `width` at a time: one that ends gives its place to the next, until all have ended.

    Rows are taken as places come free; None among them: there is none before the next step (so never while no row
    grows). Rows that follow each other with one and the same prompt object share its prefill. The last token is never
    fed, so a row may hold one token more than the context. `prefill` puts the first prompt into the session in place of
    `start`; who knows what the session holds already need not feed all of it.
    """
    source = iter(rows)
    places = _Places(session, prefill)
    taken = 0
    waiting: list[tuple[int, Logits]] = []  # places whose next token is to be chosen, with its logits
    while True:
        for place, logits in waiting:
            index, row = places.held(place)
            yield from grow(row, index, logits, session.context)
            if row.finish_reason is not None:
                places.free(place)
                yield Finished(index)
        room = None if width is None else width - places.growing
        fresh = list(itertools.takewhile(lambda row: row is not None, itertools.islice(source, room)))
        waiting = places.admit([(taken + number, row) for number, row in enumerate(fresh) if row is not None])
        taken += len(fresh)
        if not waiting:
            if not places.growing:
                return
            waiting = places.step()


class _Places:
    """The rows of a session, and who grows in them."""

    def __init__(self, session: Session, prefill: Callable[[Sequence[int]], Logits] | None) -> None:
        self._session = session
        self._start = prefill or (lambda prompt: session.start([prompt]))
        self._held: list[tuple[int, Row] | None] = []  # by place: a row's number and the row; None: it has ended
        # The last prompt that was read, the place that still holds it, its logits.
        self._read: tuple[Sequence[int], int, Logits] | None = None

    @property
    def growing(self) -> int:
        """How many rows have not ended."""
        return sum(item is not None for item in self._held)

    def held(self, place: int) -> tuple[int, Row]:
        """The row of a place, and its number."""
        item = self._held[place]
        assert item is not None
        return item

    def free(self, place: int) -> None:
        """The row of the place has ended."""
        self._held[place] = None

    def admit(self, fresh: Sequence[tuple[int, Row]]) -> list[tuple[int, Logits]]:
        """Gives each of these rows a place: those places, with the logits after the prompts.

        Afterwards there is no place without a row.
        """
        found = []
        if fresh and not self._held:
            prompt = fresh[0][1].prompt
            self._held, self._read = [fresh[0]], (prompt, 0, self._start(prompt)[0])
            found, fresh = [(0, self._read[2])], fresh[1:]
        for place, item in zip(self._emptied(len(fresh)), fresh, strict=True):
            self._held[place] = item
            found.append((place, self._put(place, item[1].prompt)))
        return found

    def _emptied(self, count: int) -> list[int]:
        """Leaves so many places without a row, and tells them: too many are dropped, too few made behind the others."""
        read = None if self._read is None else self._read[1]
        spare = [place for place, item in enumerate(self._held) if item is None]
        spare.sort(key=lambda place: place != read)  # the one that holds the last prompt may be of use
        gone, new = set(spare[count:]), max(count - len(spare), 0)
        kept = [place for place in range(len(self._held)) if place not in gone]
        if kept and (gone or new):
            self._session.select([*kept, *[kept[0]] * new])
        self._held = [*(self._held[place] for place in kept), *[None] * new]
        if self._read is not None:
            self._read = None if read in gone else (self._read[0], kept.index(self._read[1]), self._read[2])
        return [place for place, item in enumerate(self._held) if item is None]

    def _put(self, place: int, prompt: Sequence[int]) -> Logits:
        """Reads a prompt into a place; if it is the one that was read last, from where it stands."""
        if self._read is not None and self._read[0] is prompt:
            self._session.copy(self._read[1], place, len(prompt))
            logits = self._read[2]
        else:
            logits = self._session.replace(place, prompt)
        self._read = (prompt, place, logits)
        return logits

    def step(self) -> list[tuple[int, Logits]]:
        """Feeds each row its last token: all places, with the logits after it."""
        last = np.array([[self.held(place)[1].ids[-1]] for place in range(len(self._held))], np.int64)
        return list(enumerate(self._session.feed(last)[:, -1]))


def grow(row: Row, index: int, logits: Logits, context: int) -> Iterator[Token]:
    """Chooses a row's next token by logits (V,), and ends the row where there is none or it was the last."""
    choice = row.sampler.choose(logits[: row.vocab_size], top=row.logprobs)
    if choice.id in row.ends:
        row.finish_reason = STOP
        return
    row.ids.append(choice.id)
    yield Token(index, choice)
    if row.finish_reason is None and row.sampler.matcher is not None and row.sampler.matcher.ended:
        row.finish_reason = STOP
    if row.finish_reason is None and len(row.ids) >= row.max_new_tokens:
        row.finish_reason = LENGTH
    if row.finish_reason is None and len(row.prompt) + len(row.ids) > context:
        row.finish_reason = CUT
