"""Steps of one token a row over a cache of fixed shapes: on CUDA captured as a graph, which is one launch a step.

Invariant: what a graph reads and writes lies where it was when it was captured; with the cache's tensors it is dropped.
"""

from __future__ import annotations

import torch

from llmcli.models.cache import KeyValueCache
from llmcli.models.decoder import Decoder
from llmcli.runtime.session import Ids, Logits

# Steps that run before one is captured, which costs as much as some dozens: rows of a batch may end before it pays.
# They also make ready what a capture must not: kernels are compiled, libraries take their memory.
_EAGER = 4


class Steps:
    """The steps that a cache allows until it grows or its rows change."""

    def __init__(self, model: Decoder, cache: KeyValueCache) -> None:
        self._model, self._cache, self._step = model, cache, model.new_step(cache)
        device = self._step.positions.device
        self._cuda = device.type == "cuda"
        # One copy a step for ids and positions, one back for the logits, both without staging.
        self._given = torch.zeros(2, cache.rows, 1, dtype=torch.long, pin_memory=self._cuda)
        self._taken = torch.zeros(2, cache.rows, 1, dtype=torch.long, device=device)
        self._ids, self._step.positions = self._taken.unbind(0)
        self._read = torch.empty(cache.rows, model.config.vocab_size, pin_memory=self._cuda)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None  # the graph's
        self._count = 0

    def fit(self, cache: KeyValueCache) -> bool:
        """Whether they are of this cache as it is."""
        return self._cache is cache and self._step.fits(cache)

    def run(self, ids: Ids) -> Logits:
        """Appends (rows, 1) ids, for which there is room; logits (rows, 1, V)."""
        self._given[0] = torch.from_numpy(ids)
        self._given[1, :, 0] = self._cache.lengths
        self._taken.copy_(self._given, non_blocking=True)
        if self._cuda and self._graph is None and self._count >= _EAGER:
            self._capture()
        if self._graph is None:
            logits = self._model.step(self._ids, self._step)
        else:
            assert self._logits is not None
            self._graph.replay()
            logits = self._logits
        self._count += 1
        self._read.copy_(logits, non_blocking=True)
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        self._cache.commit(1)
        return self._read[:, None].numpy().copy()

    def _capture(self) -> None:
        """Captures a step. To run it twice writes the same keys and values to the same places."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._model.step(self._ids, self._step)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._model.step(self._ids, self._step)
