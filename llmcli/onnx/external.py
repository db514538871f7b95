"""The file beside a graph that holds its large tensors, written as they come.

Invariant: every tensor begins at a multiple of ALIGNMENT, so that a mapped file serves it without a copy, and equal
places of the file may be named by several tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir

from llmcli.errors import from_os_error

ALIGNMENT = 4096  # a page: onnxruntime maps a tensor only from a whole page
_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int64": ir.DataType.INT64,
}


class ExternalData:
    """Writes tensors one after the other into a staged folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "xb")  # noqa: SIM115 -- closed by close()
        except OSError as error:
            raise from_os_error(error, path) from error

    def add(self, name: str, pieces: Iterable[np.ndarray[Any, Any]], shape: tuple[int, ...]) -> ir.ExternalTensor:
        """Appends a tensor of this shape, piece by piece; all pieces are of one type."""
        try:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            begin, kind = self._file.tell(), ""
            for piece in pieces:
                kind = str(piece.dtype)
                self._file.write(np.ascontiguousarray(piece).data)
            size = self._file.tell() - begin
        except OSError as error:
            raise from_os_error(error, self.path) from error
        assert size == int(np.prod(shape)) * np.dtype(kind).itemsize, name
        return self._tensor(name, begin, size, _TYPES[kind], shape)

    def add_packed(
        self, name: str, data: np.ndarray[Any, Any], shape: tuple[int, ...], kind: ir.DataType
    ) -> ir.ExternalTensor:
        """Appends a tensor of less than a byte a number, packed."""
        tensor = self.add(name, [data], data.shape)
        assert tensor.offset is not None
        return self._tensor(name, tensor.offset, data.nbytes, kind, shape)

    def again(self, name: str, tensor: ir.ExternalTensor, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """The same bytes under another name and shape."""
        assert tensor.offset is not None
        assert tensor.length is not None
        return self._tensor(name, tensor.offset, tensor.length, tensor.dtype, shape)

    def _tensor(
        self, name: str, offset: int, length: int, kind: ir.DataType, shape: tuple[int, ...]
    ) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self.path.name, offset, length, kind, shape=ir.Shape(shape), name=name, base_dir=self.path.parent
        )

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InMemory(ExternalData):
    """Keeps tensors in memory instead, for a graph that is run at once."""

    def __init__(self) -> None:
        self.path = Path()

    def add(self, name: str, pieces: Iterable[np.ndarray[Any, Any]], shape: tuple[int, ...]) -> Any:
        """Joins a tensor's pieces."""
        return ir.tensor(np.concatenate([piece.reshape(-1) for piece in pieces]).reshape(shape), name=name)
