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

# Texts of up to so many tokens may share a row of so many places: on the CPU attention over rows of 32 costs a third of
# that over twice as many texts of 12 (docs/log.md, "Encoders: attention over short texts").
_SHARED = 32
_ROOM = 1.3  # the longest of a group may be so many times the shortest: what is filled up stays below a third


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where the texts of a row lie. N tokens in all; group g has R texts of at most T tokens."""

    positions: Tensor  # (1, N): each text's begin at 0
    groups: tuple[tuple[int, int], ...]  # (R, T) of each
    index: Tensor  # (sum of R x T,): where in the row each place of the groups comes from
    places: Tensor  # (N,): the place in the groups of each place in the row
    texts: Tensor  # (sum of R x T,): which text a place of the groups is of; -1: filled up
    kinds: tuple[str, ...]  # of each group: "even", all texts equally long; "filled"; "shared", several texts a row
    in_order: bool  # whether the groups are the row as it stands
    longest: int  # tokens of the longest text
    window: int | None = None  # tokens that a token attends to; see DecoderConfig.sliding_window

    def to(self, device: torch.device) -> Segments:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("positions", "index", "places", "texts")}
        return dataclasses.replace(self, **moved)

    def masks(self) -> list[Tensor | None]:
        """What the texts of each group attend to when they look both ways: (R, 1, 1 or T, T); None: every place."""
        found: list[Tensor | None] = []
        begin = 0
        for (rows, longest), kind in zip(self.groups, self.kinds, strict=True):
            texts = self.texts[begin : begin + rows * longest].view(rows, 1, 1, longest)
            begin += rows * longest
            if kind == "shared":  # what is filled up looks at its like, so that no row is without anything to look at
                found.append(texts == texts.transpose(2, 3))
            else:
                found.append(None if kind == "even" else texts >= 0)
        return found


def segments_of(lengths: Sequence[int], *, shared: bool = False) -> Segments:
    """The segments of texts of these lengths, in this order in the row.

    `shared`: short texts share rows of the groups, which is the fastest on the CPU where attention looks both ways;
    causal attention cannot.
    """
    sizes = np.asarray(lengths, np.int64)
    starts = np.cumsum(sizes) - sizes
    order = np.argsort(sizes, kind="stable")
    begin = int(np.searchsorted(sizes[order], _SHARED, "right")) if shared else 0
    groups, kinds, texts = [], [], []
    if begin:
        rows = _shared_rows(order[:begin], sizes)
        groups.append(rows.shape)
        kinds.append("shared")
        texts.append(rows.ravel())
    while begin < len(order):
        end = begin + 1
        while end < len(order) and sizes[order[end]] <= max(_ROOM * sizes[order[begin]], 32):
            end += 1
        members = order[begin:end]
        longest = int(sizes[members[-1]])
        real = np.arange(longest)[None] < sizes[members][:, None]  # (R, T)
        groups.append(real.shape)
        kinds.append("even" if real.all() else "filled")
        texts.append(np.where(real, members[:, None], -1).ravel())
        begin = end
    every = np.concatenate(texts)
    real = every >= 0
    # A text's places stand one after the other, so its first says how far each is from its begin.
    found = np.flatnonzero(real)
    first = np.empty(len(sizes), np.int64)
    first[every[found][::-1]] = found[::-1]
    index = np.where(real, starts[every] + np.arange(len(every)) - first[every], 0)
    places = np.empty(int(sizes.sum()), np.int64)
    places[index[found]] = found
    return Segments(
        torch.from_numpy(np.arange(len(places)) - np.repeat(starts, sizes))[None],
        tuple((int(rows), int(longest)) for rows, longest in groups),
        torch.from_numpy(index),
        torch.from_numpy(places),
        torch.from_numpy(every),
        tuple(kinds),
        len(index) == len(places) and bool((index == np.arange(len(index))).all()),
        int(sizes.max()),
    )


def _shared_rows(order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which text each place of rows is of (-1: none): the longest first, each where the least room is left over."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(_SHARED + 1)]
    for text in order[::-1].tolist():
        size = int(sizes[text])
        room = next((room for room in range(size, _SHARED) if by_room[room]), _SHARED)
        if room == _SHARED:
            rows.append([])
            by_room[room].append(len(rows) - 1)
        row = by_room[room].pop()
        rows[row] += [text] * size
        by_room[room - size].append(row)
    return np.array([row + [-1] * (_SHARED - len(row)) for row in rows])


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


def attend_both_apart(
    parts: Tensor, heads: int, segments: Segments, masks: Sequence[Tensor | None], dropout: float = 0.0
) -> Tensor:
    """Attention both ways within each text. parts (1, N, 3 C): query, key and value side by side -> (1, N, C).

    `masks`: those of the segments, which serve every layer.
    """
    spread = parts[0]
    if not segments.in_order:
        spread = _Spread.apply(spread, segments.index, segments.places)  # type: ignore[no-untyped-call]
    outputs, begin = [], 0
    for (rows, longest), mask in zip(segments.groups, masks, strict=True):
        end = begin + rows * longest
        group = spread[begin:end].view(rows, longest, -1)
        outputs.append(attend_both(group, heads, mask, dropout).reshape(end - begin, -1))
        begin = end
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if not segments.in_order:
        joined = _Gathered.apply(joined, segments.places)  # type: ignore[no-untyped-call]
    return joined[None]
