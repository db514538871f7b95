"""An index of pieces of files: their vectors, texts and places, in formats that others open.

Invariant: what is opened is one index, whole: as many vectors as pieces, and as many of both as `index.json` says.

`index.json` says what it was made of and how; `vectors.npy` holds a row a piece, `bytes.npy` the same as bytes and
`steps.npy` what one of a row's bytes is worth; `pieces.jsonl` a line a piece, `pieces.npy` where each line begins.
`lists.faiss` stands beside them where search is approximate (`vector_lists`); `manifest.json` holds all to account.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.errors import DataError, from_os_error
from llmcli.files.arrays import NpyRows
from llmcli.files.artefacts import INDEX as INDEX
from llmcli.files.artefacts import read_json

FORMAT, VERSION = "llmcli-index", 1
ZERO = 128  # the byte that stands for 0
_EXACT = "vectors.npy"  # which an index of bytes alone has not
_ARRAYS = {_EXACT: "vectors", "bytes.npy": "codes", "steps.npy": "steps", "pieces.npy": "places"}


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a file."""

    file: str
    line: int  # from 1, where it begins
    end_line: int
    text: str


def to_bytes(vectors: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Rows as bytes, and each one's step: (n, C) -> (n, C), (n,). A row is (bytes - 128) x step, within half a step."""
    steps = np.maximum(np.abs(vectors).max(axis=1), 1e-30) / 127
    return (np.rint(vectors / steps[:, None]) + ZERO).astype(np.uint8), steps.astype(np.float32)


class IndexWriter:
    """Writes an index into a staged folder, piece by piece."""

    def __init__(self, folder: Path, dimensions: int, *, exact: bool) -> None:
        """`exact`: the vectors themselves too, beside their bytes."""
        self.folder, self.pieces, self._end = folder, 0, 0
        rows: dict[str, tuple[tuple[int, ...], str]] = {
            _EXACT: ((dimensions,), "float32"),
            "bytes.npy": ((dimensions,), "uint8"),
        }
        rows |= {"steps.npy": ((), "float32"), "pieces.npy": ((), "int64")}
        if not exact:
            del rows[_EXACT]
        self._files = {name: open(folder / name, "xb") for name in (*rows, "pieces.jsonl")}  # noqa: SIM115
        self._arrays = {name: NpyRows(self._files[name], row, dtype) for name, (row, dtype) in rows.items()}

    def write(self, pieces: Sequence[Piece], vectors: npt.NDArray[np.float32]) -> None:
        """Appends pieces with their vectors: (pieces, dimensions)."""
        codes, steps = to_bytes(vectors)
        self._append(pieces, {_EXACT: vectors, "bytes.npy": codes, "steps.npy": steps})

    def copy(self, pieces: Sequence[Piece], other: StoredIndex, begin: int) -> None:
        """Appends pieces with the vectors that another index holds from a row on."""
        end = begin + len(pieces)
        arrays: dict[str, npt.NDArray[Any]] = {"bytes.npy": other.codes[begin:end], "steps.npy": other.steps[begin:end]}
        if other.vectors is not None:
            arrays[_EXACT] = other.vectors[begin:end]
        self._append(pieces, arrays)

    def _append(self, pieces: Sequence[Piece], arrays: dict[str, npt.NDArray[Any]]) -> None:
        begins = []
        for piece in pieces:
            begins.append(self._end)
            content = json.dumps(dataclasses.asdict(piece), ensure_ascii=False)
            self._end += self._files["pieces.jsonl"].write(content.encode("utf-8", "backslashreplace") + b"\n")
        for name, array in self._arrays.items():
            array.write(np.array(begins, np.int64) if name == "pieces.npy" else arrays[name])
        self.pieces += len(pieces)

    def finish(self, facts: dict[str, Any]) -> None:
        """Writes the headers, and index.json with these facts. Nothing can be appended after."""
        for array in self._arrays.values():
            array.finish()
        for file in self._files.values():
            file.close()
        write_facts(self.folder, {"format": FORMAT, "version": VERSION, **facts, "pieces": self.pieces})

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes index.json into a staged folder."""
    (folder / INDEX).write_text(json.dumps(facts, ensure_ascii=False, indent=2) + "\n", "utf-8")


class StoredIndex:
    """An index that is read: its facts, its arrays mapped, its pieces one by one."""

    vectors: npt.NDArray[np.float32] | None = None  # (pieces, dimensions)
    codes: npt.NDArray[np.uint8]  # (pieces, dimensions)
    steps: npt.NDArray[np.float32]  # (pieces,)
    places: npt.NDArray[np.int64]  # where each piece's line begins

    def __init__(self, folder: Path) -> None:
        """Raises DataError for what is no index, or not whole."""
        self.folder = folder
        if not folder.exists():
            raise DataError("no such file or folder", where=str(folder))
        if not (folder / INDEX).is_file():
            raise DataError(f"is no index: it has no {INDEX}", where=str(folder))
        self.facts = read_json(folder / INDEX)
        if (self.facts.get("format"), self.facts.get("version")) != (FORMAT, VERSION):
            raise DataError("is not an index of this version; make it anew", where=str(folder / INDEX))
        for name, attribute in _ARRAYS.items():
            if name != _EXACT or self.facts.get("vectors") != "int8":
                setattr(self, attribute, _mapped(folder / name))
        rows, wanted = self.facts.get("pieces"), self.facts.get("dimensions")
        wide = [each.shape for each in (self.codes, self.vectors) if each is not None]
        if any(shape != (rows, wanted) for shape in wide) or {self.steps.shape, self.places.shape} != {(rows,)}:
            raise DataError("is not whole: its vectors are not as many as its pieces; make it anew", where=str(folder))

    def piece(self, number: int) -> Piece:
        """A piece by its row."""
        path = self.folder / "pieces.jsonl"
        try:
            with open(path, "rb") as file:
                file.seek(int(self.places[number]))
                content = json.loads(file.readline())
            return Piece(**content)
        except OSError as error:
            raise from_os_error(error, path) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"the piece {number} is damaged; make the index anew", where=str(path)) from error


def _mapped(path: Path) -> npt.NDArray[Any]:
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise from_os_error(error, path) from error
    except (ValueError, EOFError) as error:
        raise DataError("is not a whole .npy file", where=str(path)) from error
    return found
