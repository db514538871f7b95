"""Batches: windows of a long stream of token ids, in an order that depends on (seed, step, rank) alone.

Invariant: nothing is drawn from a global random state and no position is kept, so a resumed run sees exactly the
batches that it would have seen (nanoGPT #467, accelerate #4071).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmcli.errors import DataError

Ids = npt.NDArray[np.integer]


class TokenWindows:
    """Windows of `context + 1` ids, of which neighbours share one: the last target is the next window's first input.

    Each epoch visits every window once, in a new order and with a new phase.
    """

    def __init__(
        self,
        shards: Sequence[Ids],
        *,
        context: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.shards = [shard for shard in shards if len(shard) > context]
        self.context, self.batch_size, self.seed, self.rank, self.world = context, batch_size, seed, rank, world
        # One window a shard is given up for the phase, where there are enough of them.
        whole = [(len(shard) - 1) // context for shard in self.shards]
        self.counts = [count - 1 if count > 8 else count for count in whole]
        self.slack = [len(shard) - 1 - n * context for shard, n in zip(self.shards, self.counts, strict=True)]
        self.per_epoch = sum(self.counts)
        if not self.per_epoch:
            found = max((len(shard) for shard in shards), default=0)
            hint = f"a context of {found - 1} would fit" if found > 2 else "give more"
            raise DataError(f"too little text: {found} tokens, a context of {context} needs {context + 1}; {hint}")
        self._ends = np.cumsum(self.counts)
        self._epoch = -1
        self._order: Ids = np.empty(0, np.int64)
        self._phase: list[int] = []

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        self._phase = [int(random.integers(0, slack + 1)) for slack in self.slack]
        self._order = random.permutation(self.per_epoch)
        self._epoch = epoch

    def window(self, sample: int) -> Ids:
        """The window that is visited as number `sample` since the beginning: (context + 1,)."""
        epoch, place = divmod(sample, self.per_epoch)
        self._enter(epoch)
        index = int(self._order[place])
        shard = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[shard - 1]) if shard else 0)
        start = self._phase[shard] + within * self.context
        return self.shards[shard][start : start + self.context + 1]

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of micro-batch `number`: (batch_size, context) each, int64.

        Raises DataError for an id beyond the vocabulary.
        """
        first = (number * self.world + self.rank) * self.batch_size
        return _inputs_and_targets([self.window(first + row) for row in range(self.batch_size)], self.vocab_size)


def _inputs_and_targets(rows: Sequence[Ids], vocab_size: int | None) -> tuple[Tensor, Tensor]:
    ids = np.stack(rows).astype(np.int64)
    if vocab_size is not None and ids.max() >= vocab_size:
        # An embedding would answer with an IndexError, on CUDA with a process that is of no use any more.
        raise DataError(f"the corpus holds the id {ids.max()} of a vocabulary of {vocab_size}; see llmcli verify")
    stacked = torch.from_numpy(ids)
    return stacked[:, :-1].contiguous(), stacked[:, 1:].contiguous()


def validation_windows(
    shards: Sequence[Ids], *, context: int, batch_size: int, tokens: int, vocab_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of at most `tokens` targets, from windows spread evenly over the shards, always the same.

    A shard's last, shorter window is left out, but where it is the only one: then it is all there is.
    """
    starts = [(shard, start) for shard in shards for start in range(0, len(shard) - context, context)]
    if not starts:
        longest = max(shards, key=len, default=np.empty(0, np.int64))
        if len(longest) < 2:
            return
        yield _inputs_and_targets([longest], vocab_size)
        return
    wanted = max(1, min(len(starts), tokens // context))
    chosen = [starts[index * len(starts) // wanted] for index in range(wanted)]
    for first in range(0, wanted, batch_size):
        rows = [shard[start : start + context + 1] for shard, start in chosen[first : first + batch_size]]
        yield _inputs_and_targets(rows, vocab_size)


class Batches(Protocol):
    """What gives the micro-batch of a number: inputs, which can be moved as a tensor can, and targets."""

    def batch(self, number: int) -> tuple[Any, Tensor]:
        """Inputs and targets of micro-batch `number`."""


def prefetched(windows: Batches, first: int, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """Micro-batches from number `first` on, endlessly; on CUDA pinned and copied while the one before is worked on."""
    if device.type != "cuda":
        number = first
        while True:
            inputs, targets = windows.batch(number)
            yield inputs.to(device), targets.to(device)
            number += 1
    from concurrent.futures import ThreadPoolExecutor

    def load(number: int) -> tuple[Any, Tensor]:
        inputs, targets = windows.batch(number)
        return inputs.pin_memory(), targets.pin_memory()

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(load, first)
        number = first
        while True:
            inputs, targets = coming.result()
            number += 1
            coming = pool.submit(load, number)
            yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
