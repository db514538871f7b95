"""Speculation: tokens are guessed, and one run of the model tells how many of them it would have given. Ids only.

Invariant: every token is chosen by the row's own sampler from the model's own logits, in order, with one random number
each, whatever was guessed: guesses decide what a token costs and never which it is.

So the text is the one without guesses, drawn or not: a guess holds if it is what the sampler chooses in its place. For
a guess that was not drawn that is speculative sampling's rule (arXiv:2211.17192, arXiv:2302.01318): it is accepted with
the model's probability of it, and what comes in its place is distributed as the rest. A draft model draws its guess
from its own distribution under the row's settings with the very random number that the sampler will draw with (a
coupling: arXiv:2408.07978), so that both fall on the same token where the two distributions agree.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from llmcli.errors import LlmcliError
from llmcli.runtime.decoding import Finished, Row, Token, grow
from llmcli.runtime.pace import LONGEST, Pace
from llmcli.runtime.session import FLOAT_ERROR, Logits, Session

_SHORTEST = 3  # tokens that must have occurred before for what followed them to be a guess
_COMPARED, _OCCURRENCES = 12, 6  # tokens of an occurrence that are looked at, and occurrences
_LEVELS = (3, 5, 9)  # tokens in common up to which a guess belongs to a level


class Drafter(Protocol):
    """Guesses how a row goes on."""

    def begin(self, ids: Sequence[int]) -> None:
        """Another row, which holds these ids."""
        ...

    def push(self, identity: int) -> None:
        """The row gained a token."""
        ...

    def level(self) -> int | None:
        """Which sort of guess there is; None: there is none."""
        ...

    def prepare(self) -> bool:
        """Makes up for the tokens that came while nothing was guessed; whether that took a run of its own."""
        ...

    def guess(self, row: Row, count: int) -> list[int]:
        """At most so many tokens that may come next; none that ends the text."""
        ...


class Speculation:
    """Decodes rows one at a time, with guesses; what one row taught about their worth serves the next.

    `exact`: where rounding could lead to another greedy choice than without guesses, it is looked into.
    """

    def __init__(self, drafter: Drafter, pace: Pace | None = None, *, exact: bool = True) -> None:
        self.drafter, self.pace, self.exact = drafter, pace or Pace(), exact

    def decode(
        self, session: Session, row: Row, prefill: Callable[[Sequence[int]], Logits] | None = None
    ) -> Iterator[Token | Finished]:
        """Grows a row until it has ended, as `decoding.decode` does. Afterwards the session holds none of its guesses.

        Where a run of several tokens leaves the greedy choice within its rounding, what the row holds is computed
        again token by token, as it would have been without guesses, and the choice is made from that.
        """
        begin = plain = len(row.prompt)  # what the session holds up to `plain` is what it would hold without guesses
        logits = session.start([row.prompt]) if prefill is None else prefill(row.prompt)  # (guesses + 1, V)
        run = _Run()
        self.drafter.begin(row.prompt)
        self.pace.begin()
        try:
            while True:
                for place in range(len(run.guesses) + 1):
                    found = logits[place]
                    again = self._is_close(session, row, found, begin + len(row.ids) == plain)
                    if again:
                        found = self._again(session, row, plain)
                        plain = begin + len(row.ids)
                    yield from grow(row, 0, found, session.context)
                    if row.finish_reason is not None:
                        yield Finished(0)
                        return
                    self.drafter.push(row.ids[-1])
                    if place == len(run.guesses) or row.ids[-1] != run.guesses[place]:
                        break
                    run.right += 1
                    row.accepted += 1
                    if again:
                        break  # the session holds no guesses any more
                if run.guesses:
                    self.pace.run(run.level, len(run.guesses), run.right, run.seconds)
                held = begin + len(row.ids) - 1  # the last token was fed as a guess at most
                if run.guesses:
                    session.rewind(held)
                run, logits = self._run(session, row, held)
                if not run.guesses and held == plain:
                    plain += 1
        finally:
            session.rewind(begin + max(len(row.ids) - 1, 0))

    def _run(self, session: Session, row: Row, held: int) -> tuple[_Run, Logits]:
        """Feeds the last token, and guesses where they promise something."""
        level, guesses = self.drafter.level(), list[int]()
        most = min(LONGEST, row.max_new_tokens - len(row.ids) - 1, session.context - held - 1)
        count = 0 if level is None else self.pace.guesses(level, most)
        if count:
            begun = time.perf_counter()
            if self.drafter.prepare():
                self.pace.read(time.perf_counter() - begun)
        begun = time.perf_counter()
        if count:
            guesses = self.drafter.guess(row, count)
            row.drafted += len(guesses)
            if not guesses:
                self.pace.lost(time.perf_counter() - begun)
                begun = time.perf_counter()
        logits = session.feed(np.array([[row.ids[-1], *guesses]], np.int64), len(guesses) + 1)[0]
        seconds = time.perf_counter() - begun
        if not guesses:
            self.pace.step(seconds)
        return _Run(guesses, level or 0, seconds), logits

    def _is_close(self, session: Session, row: Row, logits: Logits, plain: bool) -> bool:
        """Whether single steps may lead to another greedy choice than logits (V,), which are theirs where `plain`."""
        error = session.run_error
        if row.sampler.config.temperature > 0 or not error or not self.exact:
            return False
        if plain and (error == FLOAT_ERROR or len(row.ids) % 4):
            return False  # a look now and then tells how often it would be so
        close = row.sampler.is_close(logits[: row.vocab_size], error)
        self.pace.choice(close)
        return close and not plain

    def _again(self, session: Session, row: Row, plain: int) -> Logits:
        """The logits after the row as single steps give them: (V,)."""
        begun = time.perf_counter()
        session.rewind(plain)
        for identity in row.ids[plain - len(row.prompt) :]:
            logits: Logits = session.feed(np.array([[identity]], np.int64))[0, -1]
        self.pace.lost(time.perf_counter() - begun)
        return logits


@dataclasses.dataclass
class _Run:
    """Guesses that were fed together."""

    guesses: list[int] = dataclasses.field(default_factory=list)
    level: int = 0
    seconds: float = 0.0
    right: int = 0


# ----------------------------------------------------------------------------------------------------------------
# Drafters


class Lookup:
    """Prompt lookup (Saxena 2023): what followed the last tokens where they occurred before."""

    def __init__(self) -> None:
        self.begin(())

    def begin(self, ids: Sequence[int]) -> None:
        """Another row, which holds these ids."""
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the place after the last occurrence of three tokens
        self._before: list[int] = []  # by place: the place after the occurrence before; 0: there is none
        self._source, self._common = 0, 0  # the place of the next guess (0: none), and tokens in common before it
        for identity in ids:
            self.push(identity)

    def push(self, identity: int) -> None:
        """The row gained a token."""
        ids = self._ids
        if self._source and ids[self._source] == identity:
            self._source, self._common = self._source + 1, self._common + 1
        else:
            self._source = 0
        ids.append(identity)
        key = tuple(ids[-_SHORTEST:])
        self._before.append(self._after.get(key, 0))
        if len(key) == _SHORTEST:
            self._after[key] = len(ids)

    def level(self) -> int | None:
        """By how many tokens are in common."""
        if not self._source and self._before and self._before[-1]:
            self._find()
        return sum(self._common > bound for bound in _LEVELS) if self._source else None

    def _find(self) -> None:
        """The longest match among the last occurrences, the last one of those."""
        ids, end = self._ids, len(self._ids)
        place, self._common = self._before[-1], 0
        for _ in range(_OCCURRENCES):
            common = _SHORTEST
            while common < _COMPARED and common < place and ids[place - 1 - common] == ids[end - 1 - common]:
                common += 1
            if common > self._common:
                self._source, self._common = place, common
            place = self._before[place - 1]
            if not place:
                break

    def prepare(self) -> bool:
        """Nothing: tokens are taken as they come."""
        return False

    def guess(self, row: Row, count: int) -> list[int]:
        """What follows; where that reaches the end, it goes on with the guesses themselves."""
        found: list[int] = []
        for place in range(self._source, self._source + count):
            identity = self._ids[place] if place < len(self._ids) else found[place - len(self._ids)]
            if identity in row.ends:
                break
            found.append(identity)
        return found


class DraftModel:
    """A smaller model of the same tokenizer, which chooses as the row's own sampler is going to."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ids: list[int] = []
        self._held: list[int] = []  # what its session holds, guesses among it
        self._common = 0  # so many of them are the row's

    def begin(self, ids: Sequence[int]) -> None:
        """Another row, which holds these ids."""
        self._ids, self._common = list(ids), 0

    def push(self, identity: int) -> None:
        """The row gained a token."""
        self._ids.append(identity)

    def level(self) -> int | None:
        """There is one sort, as long as its context is not full."""
        return 0 if len(self._ids) <= self._session.context else None

    def prepare(self) -> bool:
        """Reads what it has not seen, where that is more than a run leaves."""
        self._compare()
        behind = len(self._ids) - self._common > LONGEST + 1
        if behind:
            self._read()
        return behind

    def guess(self, row: Row, count: int) -> list[int]:
        """What it would say itself."""
        found: list[int] = []
        sampler, logits = row.sampler.fork(), self._read()
        count = min(count, self._session.context - len(self._ids) + 1)  # the last guess is not fed
        while True:
            try:
                choice = sampler.choose(logits[: row.vocab_size])
            except LlmcliError:
                if sampler.matcher is None:
                    raise
                return found  # its grammar cannot go on
            if choice.id in row.ends:
                return found
            found.append(choice.id)
            if len(found) >= count or (sampler.matcher is not None and sampler.matcher.ended):
                return found
            logits = self._session.feed(np.array([[choice.id]], np.int64))[0, -1]
            self._held.append(choice.id)

    def _compare(self) -> None:
        """How much of what its session holds is the row's, but for the last token, whose logits are asked for."""
        most = min(len(self._held), len(self._ids) - 1)
        while self._common < most and self._held[self._common] == self._ids[self._common]:
            self._common += 1
        self._common = min(self._common, most)

    def _read(self) -> Logits:
        """Logits after the row: (V,)."""
        self._compare()
        new = self._ids[self._common :]
        del self._held[self._common :]
        if self._common:
            self._session.rewind(self._common)
            logits: Logits = self._session.feed(np.array([new], np.int64))[0, -1]
        else:
            logits = self._session.start([new])[0]
        self._held += new
        return logits
