"""Decoding: rows of token ids grow token by token through a session. Ids only; who reads them as text may end a row.

Invariant: each row ends with exactly one `Finished`, after its last `Token`; its tokens depend on no other row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

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
    session: Session, rows: Sequence[Row], prefill: Callable[[Sequence[int]], Logits] | None = None
) -> Iterator[Token | Finished]:
    """Grows all rows together until each has ended. Rows of one and the same prompt object share its prefill.

    The last token is never fed, so a row may hold one token more than the context. `prefill` puts the prompt that all
    rows share into the session in place of `start`; who knows what the session holds already need not feed all of it.
    """
    prompts: list[Sequence[int]] = []
    places: dict[int, int] = {}
    for row in rows:
        if id(row.prompt) not in places:
            places[id(row.prompt)] = len(prompts)
            prompts.append(row.prompt)
    logits = session.start(prompts) if prefill is None or len(prompts) > 1 else prefill(prompts[0])
    copies = [places[id(row.prompt)] for row in rows]
    if copies != list(range(len(prompts))):
        session.select(copies)
        logits = logits[copies]
    running = list(range(len(rows)))
    while True:
        alive: list[int] = []  # places among the running ones
        for place, index in enumerate(running):
            row = rows[index]
            choice = row.sampler.choose(logits[place, : row.vocab_size], top=row.logprobs)
            if choice.id in row.ends:
                row.finish_reason = STOP
            else:
                row.ids.append(choice.id)
                yield Token(index, choice)
                if row.finish_reason is None and row.sampler.matcher is not None and row.sampler.matcher.ended:
                    row.finish_reason = STOP
                if row.finish_reason is None and len(row.ids) >= row.max_new_tokens:
                    row.finish_reason = LENGTH
                if row.finish_reason is None and len(row.prompt) + len(row.ids) > session.context:
                    row.finish_reason = CUT
            if row.finish_reason is None:
                alive.append(place)
            else:
                yield Finished(index)
        if not alive:
            return
        if len(alive) < len(running):
            session.select(alive)
            running = [running[place] for place in alive]
        last = np.array([[rows[index].ids[-1]] for index in running], np.int64)
        logits = session.feed(last)[:, -1]
