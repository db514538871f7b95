"""The key/value cache of a decoder: rows of unequal length side by side, grown by doubling up to the context.

Invariant: entry j of a row holds that row's position j; what lies at or beyond a row's length is never attended to.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmcli.errors import UsageError
from llmcli.models.config import DecoderConfig


class KeyValueCache:
    """Keys and values of all layers: each (B, K, capacity, D)."""

    def __init__(
        self, config: DecoderConfig, rows: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.context, self.window = config.max_position_embeddings, config.sliding_window
        self.capacity = min(max(capacity, 1), self.context)
        self.lengths = torch.zeros(rows, dtype=torch.long)  # on the CPU: it decides shapes
        shape = (rows, config.num_key_value_heads, self.capacity, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self._positions: Tensor | None = None  # of the run under way, for rows of unequal length: (B, T)
        self._start = 0
        self._end = 0

    @property
    def rows(self) -> int:
        """How many sequences it holds."""
        return self.lengths.numel()

    def begin(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Makes room for `count` new tokens a row.

        Returns their positions (B or 1, T) and the mask (B or 1, 1, T, S), None where plain causal attention is meant.
        Raises UsageError when a row would pass the context.
        """
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        self.make_room(count)
        device = self.keys[0].device
        self._start, self._end = longest, longest + count
        if shortest == longest:
            self._positions = None
            positions = torch.arange(self._start, self._end, device=device)[None]
            within = self.window is None or longest + count <= self.window
            if within and (longest == 0 or count == 1):
                return positions, None
        else:
            positions = (self.lengths[:, None] + torch.arange(count)).to(device)
            self._positions = positions
        return positions, causal_window(positions, torch.arange(self._end, device=device), self.window)

    def make_room(self, count: int) -> None:
        """Grows, where it must, for `count` more tokens a row. Raises UsageError where a row would pass the context."""
        longest = int(self.lengths.max()) + count
        self._check_room(longest)
        self._reserve(longest)

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values (B, K, T, D) of a layer and returns all of them: (B, K, S, D)."""
        keys, values = self.keys[layer], self.values[layer]
        if self._positions is None:
            keys[:, :, self._start : self._end] = key
            values[:, :, self._start : self._end] = value
        else:
            index = self._positions[:, None, :, None].expand_as(key)
            keys.scatter_(2, index, key)
            values.scatter_(2, index, value)
        return keys[:, :, : self._end], values[:, :, : self._end]

    def commit(self, count: int) -> None:
        """Counts the new tokens as held, after all layers have put theirs."""
        self.lengths += count

    def rewind(self, length: int | Sequence[int]) -> None:
        """Forgets what lies beyond `length`, one for all rows or one for each."""
        wanted = torch.as_tensor(length, dtype=torch.long).expand(self.rows)
        self.lengths = torch.minimum(self.lengths, wanted.clamp(min=0))

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the rows named, in that order; a row may be named twice, which copies it."""
        index = torch.as_tensor(rows, dtype=torch.long)
        self.lengths = self.lengths[index]
        on_device = index.to(self.keys[0].device)
        self.keys = [keys[on_device] for keys in self.keys]
        self.values = [values[on_device] for values in self.values]

    def emptied(self, row: int, length: int) -> KeyValueCache:
        """A row by itself, emptied, with room for `length` tokens: a cache over the same memory, to be filled anew."""
        self._check_room(length)
        self._reserve(length)
        self.lengths[row] = 0
        alone = copy.copy(self)
        alone.lengths = self.lengths[row : row + 1]
        alone.keys = [keys[row : row + 1] for keys in self.keys]
        alone.values = [values[row : row + 1] for values in self.values]
        return alone

    def copy(self, source: int, target: int, length: int) -> None:
        """Puts the first `length` entries of a row in the place of what another one holds."""
        if source != target:
            for held in (*self.keys, *self.values):
                held[target, :, :length] = held[source, :, :length]
        self.lengths[target] = length

    def _check_room(self, length: int) -> None:
        if length > self.context:
            raise UsageError(f"{length} tokens do not fit the model's context of {self.context}")

    def _reserve(self, length: int) -> None:
        if length <= self.capacity:
            return
        self.capacity = min(max(2 * self.capacity, length), self.context)
        self.keys = [self._grown(keys) for keys in self.keys]
        self.values = [self._grown(values) for values in self.values]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros((*old.shape[:2], self.capacity, old.shape[3]))
        new[:, :, : old.size(2)] = old
        return new


class Step:
    """A cache as a step of one token a row sees it: shapes depend on rows and capacity alone, no device is awaited.

    It holds until the cache gets other tensors, as it does when it grows or rows are chosen: see `fits`.
    """

    def __init__(self, cache: KeyValueCache, kernels: Any = None) -> None:
        """`kernels`: those that do the whole of attention, where there are some (`ops.cuda_kernels`)."""
        self.keys, self.values, self.window, self.kernels = cache.keys, cache.values, cache.window, kernels
        device = cache.keys[0].device
        self.positions = torch.zeros(cache.rows, 1, dtype=torch.long, device=device)  # of the new tokens
        self._places = torch.arange(cache.capacity, device=device)

    def fits(self, cache: KeyValueCache) -> bool:
        """Whether the cache still has the tensors that the step was made for."""
        return self.keys is cache.keys

    def begin(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The positions (B, 1), and the mask over the whole capacity (B, 1, 1, capacity), None for the kernels."""
        assert count == 1
        mask = None if self.kernels is not None else causal_window(self.positions, self._places, self.window)
        return self.positions, mask

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values (B, K, 1, D) of a layer and returns the whole capacity's."""
        keys, values = self.keys[layer], self.values[layer]
        index = self.positions[:, None, :, None].expand_as(key)
        return keys.scatter_(2, index, key), values.scatter_(2, index, value)


def causal_window(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys (S,) the queries at `positions` (B, T) attend to: (B, 1, T, S); at most `window` of them each."""
    queries = positions[..., None]
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    return mask[:, None]
