"""Arrays that are written row by row, in bounded memory: `.npy`, and safetensors.

Invariant: the header, written last, tells how many rows there are, and stands in room that was left for it; so the
files are what `numpy.save` and safetensors would write, but for spaces in the header.
Formats: NumPy's NEP 1 and `numpy.lib.format`; https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

_ROWS = 10**15  # more than any file holds: the room for a header is that of one that says so
_NAMES = {"float32": "F32", "float16": "F16", "int8": "I8", "int32": "I32", "int64": "I64"}


class NpyRows:
    """An array in a `.npy` file: rows of a shape and type, appended. The file is the caller's to close."""

    def __init__(self, file: BinaryIO, row: Sequence[int], dtype: str) -> None:
        self.file, self.row, self.dtype, self.rows = file, tuple(row), np.dtype(dtype), 0
        self._size = len(self._header(_ROWS, 0))
        file.write(self._header(0, self._size))

    def _header(self, rows: int, size: int) -> bytes:
        """The header, filled up with spaces to `size`, and to whole steps of 64 bytes."""
        said = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (rows, *self.row)}
        text = repr(said).encode("ascii")
        length = max(size, -(-(10 + len(text) + 1) // 64) * 64)
        return b"\x93NUMPY\x01\x00" + (length - 10).to_bytes(2, "little") + text.ljust(length - 11) + b"\n"

    def write(self, rows: npt.NDArray[Any]) -> None:
        """Appends rows: (n, *row)."""
        _append(self.file, rows, self.row, self.dtype)
        self.rows += len(rows)

    def finish(self) -> None:
        """Writes the header. Nothing can be appended after."""
        self.file.seek(0)
        self.file.write(self._header(self.rows, self._size))


class SafetensorsRows:
    """Tensors in a safetensors file: rows of a shape and type each, appended. The file is the caller's to close."""

    def __init__(
        self, file: BinaryIO, tensors: Mapping[str, tuple[Sequence[int], str]], metadata: Mapping[str, str]
    ) -> None:
        """`tensors`: the shape of a row and its type, by name. All but the first wait in files without a name."""
        self.tensors = {name: (tuple(row), np.dtype(dtype)) for name, (row, dtype) in tensors.items()}
        self.rows = dict.fromkeys(self.tensors, 0)
        self.metadata = dict(metadata)
        self._size = len(self._header(dict.fromkeys(self.tensors, _ROWS), 0))
        file.write(self._header(self.rows, self._size))
        self.file = file
        self._rest = {name: tempfile.TemporaryFile() for name in list(self.tensors)[1:]}  # noqa: SIM115

    def _header(self, rows: Mapping[str, int], size: int) -> bytes:
        """The header with its length, filled up with spaces to `size` in all."""
        content: dict[str, Any] = {"__metadata__": self.metadata}
        end = 0
        for name, (row, dtype) in self.tensors.items():
            begin, end = end, end + rows[name] * math.prod(row) * dtype.itemsize
            content[name] = {"dtype": _NAMES[dtype.name], "shape": [rows[name], *row], "data_offsets": [begin, end]}
        raw = json.dumps(content, separators=(",", ":")).encode("utf-8")
        length = max(size - 8, -(-len(raw) // 64) * 64)
        return length.to_bytes(8, "little") + raw.ljust(length)

    def write(self, name: str, rows: npt.NDArray[Any]) -> None:
        """Appends rows of a tensor: (n, *row)."""
        row, dtype = self.tensors[name]
        _append(self._rest.get(name, self.file), rows, row, dtype)
        self.rows[name] += len(rows)

    def finish(self) -> None:
        """Puts the tensors behind each other and writes the header. Nothing can be appended after."""
        for rest in self._rest.values():
            rest.seek(0)
            shutil.copyfileobj(rest, self.file, 1 << 20)
        self.file.seek(0)
        self.file.write(self._header(self.rows, self._size))

    def close(self) -> None:
        """Closes the files without a name."""
        for rest in self._rest.values():
            rest.close()


def _append(file: IO[bytes], rows: npt.NDArray[Any], row: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    assert rows.shape[1:] == row, (rows.shape, row)
    file.write(np.ascontiguousarray(rows, dtype).tobytes())
