"""Where onnxruntime computes, CPU or CUDA: graphs, and keys or values of a layer, read and written in place.

Invariant: what cannot run where it was asked for is an error before a step, never another device. Rows of a cache
lie one after the other, so some of them are a block of memory that begins at `address`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.data.heap import huge_pages
from llmcli.errors import UsageError
from llmcli.files.artefacts import GRAPH
from llmcli.runtime.session import States

_SLACK = 64 << 20  # bytes beside the packed weights: scales in float32, activations, the graph
CUDA = "CUDAExecutionProvider"
TILES = "ORT_GQA_DISABLE_FLASH_ATTENTION"  # onnxruntime's own switch, which its sessions cannot set


class Engines:
    """The graph that decodes, and the one that reads prompts of at least so many tokens, opened for the first one."""

    def __init__(self, step: Any, least: int = 0, opened: Callable[[], Any] | None = None) -> None:
        self.step, self._least, self._opened = step, least, opened
        self._prompt: Any = None

    def of(self, tokens: int) -> Any:
        """The graph for a run of so many tokens."""
        if self._opened is None or tokens < self._least:
            return self.step
        if self._prompt is None:
            self._prompt = self._opened()
        return self._prompt


class HostCache:
    """An array (rows, K, capacity, D) of the session's own."""

    device = "cpu"

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, dtype
        self._array: npt.NDArray[Any] = np.zeros(shape, dtype)

    def address(self, first: int) -> int:
        """Where the rows from `first` on begin."""
        return int(self._array[first:].ctypes.data)

    def read(self, row: int, length: int) -> States:
        """The first entries of a row: (K, length, D)."""
        return self._array[row, :, :length]

    def write(self, row: int, states: States) -> None:
        """Puts entries at the begin of a row."""
        self._array[row, :, : states.shape[1]] = states

    def chosen(self, rows: Sequence[int], lengths: Sequence[int], capacity: int) -> HostCache:
        """Another with these rows' first entries, in that order, and room for more."""
        made = HostCache((len(rows), self.shape[1], capacity, self.shape[3]), self.dtype)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            made.write(place, self.read(row, length))
        return made


class DeviceCache(HostCache):
    """The same in a device's memory. Steps leave it there; what is read or written from here goes by the host."""

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, device: str, content: npt.NDArray[Any] | None = None
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        value = importlib.import_module("onnxruntime").OrtValue
        self._value = value.ortvalue_from_numpy(np.zeros(shape, dtype) if content is None else content, device, 0)

    def address(self, first: int) -> int:
        """Where the rows from `first` on begin, on the device."""
        row = int(np.prod(self.shape[1:])) * np.dtype(self.dtype).itemsize
        return int(self._value.data_ptr() + first * row)

    def read(self, row: int, length: int) -> States:
        """The first entries of a row, copied: (K, length, D)."""
        found: States = self._value.numpy()[row, :, :length].copy()
        return found

    def write(self, row: int, states: States) -> None:
        """Puts entries at the begin of a row."""
        whole = self._value.numpy().copy()
        whole[row, :, : states.shape[1]] = states
        self._value.update_inplace(whole)

    def chosen(self, rows: Sequence[int], lengths: Sequence[int], capacity: int) -> DeviceCache:
        """Another with these rows' first entries, in that order, and room for more."""
        whole = self._value.numpy()
        made = np.zeros((len(rows), self.shape[1], capacity, self.shape[3]), self.dtype)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            made[place, :, :length] = whole[row, :, :length]
        return DeviceCache(made.shape, self.dtype, self.device, made)


def check_graph(precision: str, folder: str) -> None:
    """Raises UsageError for a graph that CUDA does not run whole.

    GroupQueryAttention takes no float32 there, and that is what all but an fp16 graph computes in: each block would go
    by the processor.
    """
    if precision != "fp16":
        raise UsageError(
            f"on CUDA an ONNX folder runs in fp16, this one is {precision}: export with --precision fp16, or give the "
            "model that was exported (with --quantize int8 or int4 for fewer bits)",
            where=folder,
        )


def providers(device: str) -> list[str]:
    """What onnxruntime is to run on. Raises UsageError where it has no CUDA and that is asked for."""
    if device == "cpu":
        return ["CPUExecutionProvider"]
    onnxruntime = importlib.import_module("onnxruntime")
    if CUDA not in onnxruntime.get_available_providers():
        raise UsageError(
            "no working cuda device was found: this onnxruntime has no CUDA; pip install onnxruntime-gpu in its place",
            where="--device",
        )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        onnxruntime.preload_dlls()  # CUDA's libraries, where they came as packages of Python; it prints what it misses
    return [CUDA, "CPUExecutionProvider"]  # which has the little that deals with shapes


def check_device(engine: Any, device: str) -> None:
    """Raises UsageError where onnxruntime fell back from what was asked for."""
    if device == "cuda" and CUDA not in engine.get_providers():
        raise UsageError(
            "no working cuda device was found: onnxruntime's CUDA provider does not load; see llmcli doctor",
            where="--device",
        )


@contextlib.contextmanager
def as_cpu_likes(graph: Path) -> Iterator[None]:
    """A graph opened meanwhile packs its weights onto huge pages and computes attention's scores whole, not in tiles.

    Whole scores take half the time of a prompt's on a CPU. onnxruntime reads that from the environment as it opens a
    graph; what a user has set there stays.
    """
    data = graph.with_name(f"{GRAPH}.data")  # of both graphs
    size = data.stat().st_size if data.is_file() else 0
    with huge_pages(size + size // 4 + _SLACK):
        if TILES in os.environ:
            yield
            return
        os.environ[TILES] = "1"
        try:
            yield
        finally:
            os.environ.pop(TILES, None)
