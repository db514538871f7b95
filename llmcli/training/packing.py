"""Batches of examples of unlike length: side by side in one row, in an order that depends on (seed, step) alone.

Invariant: nothing is drawn from a global random state and no position is kept, so a resumed run sees exactly the
batches that it would have seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmcli.models.segments import Segments, segments_of

# For a product of a new shape the CPU's library first makes code, which takes a few milliseconds, longer than the
# product of a thousand tokens. So a row is filled up to one of few lengths (docs/log.md, "Rows of few lengths").
_LEAST_STEP, _STEPS = 16, 16
R = TypeVar("R")
Ids = npt.NDArray[np.integer[Any]]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Texts in one row, and the places in it whose hidden states are wanted.

    Behind the texts the row is filled up, by texts of zeros that nothing is wanted of; `tokens` do not count them.
    """

    ids: Tensor  # (1, N)
    segments: Segments
    chosen: Tensor  # (M,)
    tokens: int  # of the texts
    number: int = 0  # of the batch, for what is drawn at random
    types: Tensor | None = None  # (1, N): of each token, whether it is of a first text (0) or of a second (1)

    @property
    def lengths(self) -> Tensor:
        """The tokens of each text: (R,)."""
        positions = self.segments.positions[0, : self.tokens]
        starts = (positions == 0).nonzero().flatten()
        return torch.diff(starts, append=starts.new_tensor([len(positions)]))

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        moved = self.ids.to(device), self.segments.to(device), self.chosen.to(device)
        return Packed(*moved, self.tokens, self.number, None if self.types is None else self.types.to(device))


def pack(texts: Sequence[Ids], chosen: Sequence[Ids] | None = None, *, types: Sequence[Ids] | None = None) -> Packed:
    """Texts of ids side by side. `chosen`: the places of each text that are wanted, counted from its begin."""
    lengths = [len(text) for text in texts]
    places = np.empty(0, np.int64)
    if chosen is not None:
        starts = np.cumsum([0, *lengths[:-1]])
        places = np.concatenate([start + each for start, each in zip(starts, chosen, strict=True)]).astype(np.int64)
    tokens = sum(lengths)
    size = filled_up(tokens)
    added = [max(lengths)] * ((size - tokens) // max(lengths))  # none longer than a text, which the context holds
    added += [rest] if (rest := size - tokens - sum(added)) else []
    return Packed(
        _joined(texts, size),
        segments_of([*lengths, *added]),
        torch.from_numpy(places),
        tokens,
        types=None if types is None else _joined(types, size),
    )


def _joined(texts: Sequence[Ids], size: int) -> Tensor:
    """Side by side, and zeros behind them: (1, size)."""
    row = np.zeros((1, size), np.int64)
    row[0, : sum(map(len, texts))] = np.concatenate(texts)
    return torch.from_numpy(row)


def filled_up(tokens: int) -> int:
    """The least of few lengths that so many tokens fit in: at most 15 tokens longer, or a 16th."""
    step = max(_LEAST_STEP, 2 ** (tokens.bit_length() - 1) // _STEPS)
    return -(-tokens // step) * step


class ExampleOrder:
    """Which examples a micro-batch holds: each epoch visits every example once, in a new order."""

    def __init__(self, count: int, *, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def batch(self, number: int) -> list[int]:
        """The examples of micro-batch `number`."""
        return [self._visited(number * self.batch_size + row) for row in range(self.batch_size)]

    def _visited(self, sample: int) -> int:
        epoch, place = divmod(sample, self.count)
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order, self._epoch = random.permutation(self.count), epoch
        return int(self._order[place])


def batches(
    rows: Sequence[R],
    order: ExampleOrder,
    made: Callable[[Sequence[R]], tuple[Packed, Tensor]],
    first: int,
    device: torch.device,
) -> Iterator[tuple[Packed, Tensor]]:
    """Micro-batches from number `first` on, endlessly."""
    number = first
    while True:
        packed, targets = made([rows[index] for index in order.batch(number)])
        yield dataclasses.replace(packed.to(device), number=number), targets.to(device)
        number += 1


def in_turn(
    rows: Sequence[R], made: Callable[[Sequence[R]], tuple[Packed, Tensor]], *, length: Callable[[R], int], tokens: int
) -> Iterator[tuple[Packed, Tensor]]:
    """All rows once, the short ones first, at most `tokens` in a batch where a single one has no more."""
    held: list[R] = []
    filled = 0
    for row in sorted(rows, key=length):
        if held and filled + length(row) > tokens:
            yield made(held)
            held, filled = [], 0
        held.append(row)
        filled += length(row)
    if held:
        yield made(held)
