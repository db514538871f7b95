"""Texts side by side in one row, none of which sees another: packing without leaks and without filling up.

Invariant: what a text's positions give is what the text would give alone. Embedding, products and norms go over one
row that holds every text and nothing else; attention alone looks at the texts one by one, those of a similar length
together, filled up on the right, where causal attention never looks and attention both ways is kept from looking.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcli.models.cache import causal_window
from llmcli.models.ops import attend, attend_both

_ROOM = 1.3  # the longest of a group may be so many times the shortest: what is filled up stays below a third


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where the texts of a row lie. N tokens in all; group g has R texts of at most T tokens."""

    positions: Tensor  # (1, N): each text's begin at 0
    groups: tuple[tuple[int, int], ...]  # (R, T) of each
    index: Tensor  # (sum of R x T,): where in the row each place of the groups comes from
    places: Tensor  # (N,): the place in the groups of each place in the row
    real: Tensor  # (sum of R x T,): whether a place of the groups is a token, and not filled up
    even: tuple[bool, ...]  # of each group: whether all its texts are equally long, so that nothing is filled up
    in_order: bool  # whether the groups are the row as it stands
    window: int | None = None  # tokens that a token attends to; see DecoderConfig.sliding_window

    def to(self, device: torch.device) -> Segments:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("positions", "index", "places", "real")}
        return dataclasses.replace(self, **moved)


def segments_of(lengths: Sequence[int], *, equal: bool = False) -> Segments:
    """The segments of texts of these lengths, in this order in the row.

    `equal`: only texts of one length make a group, which fills nothing up; for texts that are sorted by length.
    """
    sizes = np.asarray(lengths, np.int64)
    starts = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    order = np.argsort(sizes, kind="stable")
    groups, index, reals, even, places = [], [], [], [], np.empty(total, np.int64)
    begin = filled = 0
    while begin < len(order):
        end = begin + 1
        most = sizes[order[begin]] if equal else max(_ROOM * sizes[order[begin]], 32)
        while end < len(order) and sizes[order[end]] <= most:
            end += 1
        members = order[begin:end]
        longest = int(sizes[members[-1]])
        within = np.minimum(np.arange(longest)[None], sizes[members][:, None] - 1)  # (R, T)
        index.append((starts[members][:, None] + within).ravel())
        real = (np.arange(longest)[None] < sizes[members][:, None]).ravel()
        places[index[-1][real]] = filled + np.flatnonzero(real)
        reals.append(real)
        even.append(bool(real.all()))
        groups.append((len(members), longest))
        filled += len(members) * longest
        begin = end
    positions = np.arange(total) - np.repeat(starts, sizes)
    return Segments(
        torch.from_numpy(positions)[None],
        tuple(groups),
        torch.from_numpy(np.concatenate(index)),
        torch.from_numpy(places),
        torch.from_numpy(np.concatenate(reals)),
        tuple(even),
        all(even) and bool((order == np.arange(len(order))).all()),
    )


class _Spread(torch.autograd.Function):
    """Rows into the groups. What is filled up gets no gradient, so the way back is a choice too, and no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor) -> Tensor:  # (N, C) -> (M, C)
        ctx.save_for_backward(places)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class _Gathered(torch.autograd.Function):
    """Rows out of the groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:  # (M, C) -> (N, C)
        ctx.save_for_backward(places)
        ctx.rows = x.size(0)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        whole = gradients[0].new_zeros(ctx.rows, gradients[0].size(1))
        return whole.index_copy_(0, places, gradients[0]), None


def attend_apart(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Causal attention within each text. query (1, H, N, D); key, value (1, K, N, D) -> (1, H, N, D)."""
    heads, shared, size = query.size(1), key.size(1), query.size(3)
    parts = torch.cat((query[0], key[0], value[0])).transpose(0, 1).flatten(1)  # (N, (H + 2 K) D)
    spread = _Spread.apply(parts, segments.index, segments.places)  # type: ignore[no-untyped-call]
    outputs, begin = [], 0
    for rows, longest in segments.groups:
        end = begin + rows * longest
        group = spread[begin:end].view(rows, longest, heads + 2 * shared, size).transpose(1, 2)  # (R, H + 2 K, T, D)
        queries, keys, values = group.split((heads, shared, shared), 1)
        mask = None
        if segments.window is not None and longest > segments.window:
            positions = torch.arange(longest, device=query.device)
            mask = causal_window(positions[None], positions, segments.window)
        found = attend(queries, keys, values, mask)  # (R, H, T, D)
        outputs.append(found.transpose(1, 2).reshape(end - begin, heads * size))
        begin = end
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    result = _Gathered.apply(joined, segments.places)  # type: ignore[no-untyped-call]
    return result.view(1, -1, heads, size).transpose(1, 2)


def attend_both_apart(parts: Tensor, heads: int, segments: Segments, dropout: float = 0.0) -> Tensor:
    """Attention both ways within each text. parts (1, N, 3 C): query, key and value side by side -> (1, N, C)."""
    spread = parts[0]
    if not segments.in_order:
        spread = _Spread.apply(spread, segments.index, segments.places)  # type: ignore[no-untyped-call]
    outputs, begin = [], 0
    for (rows, longest), even in zip(segments.groups, segments.even, strict=True):
        end = begin + rows * longest
        mask = None if even else segments.real[begin:end].view(rows, longest)
        group = spread[begin:end].view(rows, longest, -1)
        outputs.append(attend_both(group, heads, mask, dropout).reshape(end - begin, -1))
        begin = end
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if not segments.in_order:
        joined = _Gathered.apply(joined, segments.places)  # type: ignore[no-untyped-call]
    return joined[None]
