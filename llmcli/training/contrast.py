"""Contrastive learning of texts as vectors: InfoNCE over a batch, whose gradients are made piece by piece.

Invariant: however many pieces a batch is worked off in, loss and gradients are those of the whole batch; only one
piece's activations are held at a time.

Sources: InfoNCE (arXiv:1807.03748), two views by dropout (SimCSE, arXiv:2104.08821), gradient caching (GradCache,
arXiv:2101.06983), alignment and uniformity (arXiv:2005.10242).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from llmcli.training.embedding_losses import ranking_losses, same_text
from llmcli.training.packing import ExampleOrder, Packed, pack

Ids = npt.NDArray[np.integer[Any]]


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A whole batch, in pieces: R anchors, then what belongs to each, then, where there are some, what does not."""

    pieces: tuple[Packed, ...]  # of views x R texts each
    views: int  # 2, or 3 with texts that do not belong
    names: Tensor  # (views, B): equal where texts are equal
    number: int  # of the batch, for what is drawn at random

    def to(self, device: torch.device) -> Contrast:
        """The same on a device."""
        pieces = tuple(piece.to(device) for piece in self.pieces)
        return dataclasses.replace(self, pieces=pieces, names=self.names.to(device))


class Groups:
    """Texts that belong together, as ids: one (its two views are made by dropout), a pair, or a pair and a third."""

    def __init__(self, groups: Sequence[tuple[Ids, ...]]) -> None:
        self.groups = groups
        self.views = max(2, len(groups[0])) if groups else 2
        known: dict[bytes, int] = {}
        self._names = [[known.setdefault(text.tobytes(), len(known)) for text in group] for group in groups]

    def __len__(self) -> int:
        return len(self.groups)

    def batch(self, chosen: Sequence[int], pieces: int, number: int) -> tuple[Contrast, Tensor]:
        """A batch of groups, worked off in so many pieces, and the place of each anchor's own text."""
        size = -(-len(chosen) // pieces)
        parts = [chosen[begin : begin + size] for begin in range(0, len(chosen), size)]
        names = [self._viewed(self._names[index]) for index in chosen]
        made = tuple(self._piece(part) for part in parts)
        return Contrast(made, self.views, torch.tensor(names).t(), number), torch.arange(len(chosen))

    def _viewed(self, group: Sequence[Any]) -> list[Any]:
        return [group[0], group[0]] if len(group) == 1 else list(group)

    def _piece(self, part: Sequence[int]) -> Packed:
        rows = [self._viewed(self.groups[index]) for index in part]
        return pack([row[view] for view in range(self.views) for row in rows])


def batches(
    groups: Groups, order: ExampleOrder, pieces: int, first: int, device: torch.device
) -> Iterator[tuple[Contrast, Tensor]]:
    """Batches from number `first` on, endlessly."""
    number = first
    while True:
        made, targets = groups.batch(order.batch(number), pieces, number)
        yield made.to(device), targets.to(device)
        number += 1


# ----------------------------------------------------------------------------------------------------------------
# The loss


def info_nce(vectors: Tensor, names: Tensor, temperature: float) -> Tensor:
    """Sum of -log of each anchor's share on its own text, among all second (and third) texts of the batch.

    vectors (views, B, C), of any length; names (views, B). What says the same as an anchor's own text counts as no
    other's; see `same_text`.
    """
    wide = vectors.float()
    ours = same_text(names[0], names[1], names[1:].flatten())
    return ranking_losses(wide[0], wide[1:].flatten(0, 1), ours, 1 / temperature).sum()


class _Again(torch.autograd.Function):
    """What `run` gives, with nothing kept of the way there: the way back runs it once more."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], Tensor], _parameter: Tensor) -> Tensor:
        ctx.run = run
        with torch.no_grad():
            return run()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.enable_grad():
            again = ctx.run()
        torch.autograd.backward([again], list(gradients))
        return None, None


def cached(runs: Sequence[Callable[[], Tensor]], parameter: Tensor) -> list[Tensor]:
    """The outputs of runs that share parameters, `parameter` among them; one run's activations are held at a time.

    A run must give the same each time: it sets the random state that it draws from.
    """
    if len(runs) == 1:
        return [runs[0]()]
    return [_Again.apply(run, parameter) for run in runs]  # type: ignore[no-untyped-call]


# ----------------------------------------------------------------------------------------------------------------
# Figures


def alignment(vectors: Tensor) -> float:
    """Mean squared distance of texts that belong together: (2, R, C), less is better."""
    first, second = F.normalize(vectors.double(), dim=-1)
    return float((first - second).square().sum(-1).mean())


def uniformity(vectors: Tensor) -> float:
    """Log of the mean of exp(-2 squared distance) over all pairs of texts: (R, C), less is better."""
    unit = F.normalize(vectors.double(), dim=-1)
    if len(unit) < 2:
        return 0.0
    return float(torch.pdist(unit).square().mul(-2).exp().mean().log())
