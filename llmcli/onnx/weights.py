"""Weights read lazily from the safetensors shards of a model folder, some rows at a time, as float32.

Invariant: no more is in memory than what was asked for. Files are read, not mapped: pages of a map would count as the
process's memory, and a model of any size must be exported in little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmcli.errors import DataError, from_os_error
from llmcli.files.safetensors_header import TensorEntry, read_header
from llmcli.files.tensors import weight_files

Array = npt.NDArray[np.float32]
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PIECE = 1 << 24  # elements that are read at once


class Weights:
    """The tensors of a model folder by name. Every header is checked before a byte of it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, TensorEntry]] = {}
        for path in weight_files(folder):
            for name, entry in read_header(path).items():
                if name in self._places:
                    raise DataError(f"the tensor {name} is in another shard too", where=str(path))
                self._places[name] = (path, entry)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """All of them, in the order of the files."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of a tensor that is there."""
        return self._places[name][1].shape

    def size(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(entry.end - entry.start for _, entry in self._places.values())

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor that is there and has this shape, not read yet. Raises DataError else."""
        if name not in self._places:
            raise DataError(f"the weights do not fit config.json: {name}: missing", where=str(self.folder))
        path, entry = self._places[name]
        if entry.shape != tuple(shape):
            raise DataError(
                f"the weights do not fit config.json: {name}: shape {list(entry.shape)}, "
                f"the config asks for {list(shape)}",
                where=str(self.folder),
            )
        if entry.dtype not in _STORED:
            raise DataError(f"{name} is stored as {entry.dtype}; weights must be floating-point", where=str(path))
        return Tensor(path, entry)


class Held:
    """A tensor that was computed and is in memory."""

    def __init__(self, values: Array) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.values.shape

    def rows(self, first: int = 0, last: int | None = None) -> Array:
        """The slices first to last of the first dimension."""
        return self.values[first:last]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A stored tensor."""

    path: Path
    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.entry.shape

    def rows(self, first: int = 0, last: int | None = None) -> Array:
        """The slices first to last of the first dimension, as float32."""
        count = self.shape[0]
        first, last, _ = slice(first, last).indices(count)
        stored = np.dtype(_STORED[self.entry.dtype])
        width = self.entry.count // max(count, 1)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.entry.start + first * width * stored.itemsize)
                found = np.fromfile(file, stored, (last - first) * width)
        except OSError as error:
            raise from_os_error(error, self.path) from error
        if found.size != (last - first) * width:
            raise DataError("was cut while it was read", where=str(self.path))
        if self.entry.dtype == "BF16":
            found = (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return found.astype(np.float32, copy=False).reshape(last - first, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix (outputs, inputs) that a product uses: stored tensors one below the other, or one stored transposed."""

    name: str
    parts: tuple[Tensor | Held, ...]
    transposed: bool = False  # GPT-2 stores (inputs, outputs)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        first, second = self.parts[0].shape
        return (second, first) if self.transposed else (sum(part.shape[0] for part in self.parts), second)

    def apart(self, *names: str) -> tuple[Matrix, ...]:
        """Its stored tensors, each as a matrix of its own."""
        return tuple(Matrix(name, (part,)) for name, part in zip(names, self.parts, strict=True))

    def rows(self, first: int, last: int) -> Array:
        """Some of its rows, as float32, contiguous."""
        if self.transposed:
            return np.ascontiguousarray(self.parts[0].rows()[:, first:last].T)
        found, begin = [], 0
        for part in self.parts:
            count = part.shape[0]
            low, high = max(first - begin, 0), min(last - begin, count)
            if low < high:
                found.append(part.rows(low, high))
            begin += count
        return found[0] if len(found) == 1 else np.concatenate(found)

    def pieces(self, elements: int = PIECE, begin: int = 0, end: int | None = None) -> Iterator[Array]:
        """The rows from `begin` to `end`, in pieces of about so many elements."""
        outputs, inputs = self.shape
        end, step = outputs if end is None else end, max(1, elements // inputs)
        for first in range(begin, end, step):
            yield self.rows(first, min(first + step, end))
