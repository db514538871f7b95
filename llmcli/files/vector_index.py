"""An index of pieces of files: their vectors, texts and places, in formats that others open.

Invariant: what is opened is one index, whole: as many vectors as pieces, and as many of both as `index.json` says.

`index.json` says what it was made of and how; `vectors.npy` holds a row a piece (float32; of int8 bytes, 128 for 0,
with `steps.npy`), `pieces.jsonl` a line a piece, `pieces.npy` where each line begins.
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
from llmcli.files.artefacts import read_json

INDEX = "index.json"
FORMAT, VERSION = "llmcli-index", 1
_ARRAYS = {"vectors.npy": "vectors", "steps.npy": "steps", "pieces.npy": "places"}


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a file."""

    file: str
    line: int  # from 1, where it begins
    end_line: int
    text: str


class IndexWriter:
    """Writes an index into a staged folder, piece by piece."""

    def __init__(self, folder: Path, dimensions: int, *, as_bytes: bool) -> None:
        self.folder = folder
        self.pieces = 0
        self._end = 0
        self._files = [open(folder / name, "xb") for name in ("vectors.npy", "pieces.npy", "pieces.jsonl")]  # noqa: SIM115
        vectors, places, self._lines = self._files
        self._vectors = NpyRows(vectors, (dimensions,), "uint8" if as_bytes else "float32")
        self._places = NpyRows(places, (), "int64")
        self._steps: NpyRows | None = None
        if as_bytes:
            self._files.append(open(folder / "steps.npy", "xb"))  # noqa: SIM115
            self._steps = NpyRows(self._files[-1], (), "float32")

    def write(self, pieces: Sequence[Piece], vectors: npt.NDArray[Any], steps: npt.NDArray[Any] | None) -> None:
        """Appends pieces with their vectors: (pieces, dimensions)."""
        begins = []
        for piece in pieces:
            begins.append(self._end)
            content = json.dumps(dataclasses.asdict(piece), ensure_ascii=False)
            self._end += self._lines.write(content.encode("utf-8", "backslashreplace") + b"\n")
        self._places.write(np.array(begins, np.int64))
        self._vectors.write(vectors)
        if self._steps is not None and steps is not None:
            self._steps.write(steps)
        self.pieces += len(pieces)

    def finish(self, facts: dict[str, Any]) -> None:
        """Writes the headers, and index.json with these facts."""
        for array in (self._vectors, self._places, self._steps):
            if array is not None:
                array.finish()
        content = {"format": FORMAT, "version": VERSION, **facts, "pieces": self.pieces}
        (self.folder / INDEX).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()


class StoredIndex:
    """An index that is read: its facts, its arrays mapped, its pieces one by one."""

    vectors: npt.NDArray[Any]  # (pieces, dimensions)
    steps: npt.NDArray[np.float32] | None = None
    places: npt.NDArray[np.int64]  # where each piece's line begins

    def __init__(self, folder: Path) -> None:
        """Raises DataError for what is no index, or not whole."""
        self.folder = folder
        if not (folder / INDEX).is_file():
            raise DataError(f"is no index: it has no {INDEX}", where=str(folder))
        self.facts = read_json(folder / INDEX)
        if (self.facts.get("format"), self.facts.get("version")) != (FORMAT, VERSION):
            raise DataError("is not an index of this version; make it anew", where=str(folder / INDEX))
        for name, attribute in _ARRAYS.items():
            if name != "steps.npy" or self.facts.get("vectors") == "int8":
                setattr(self, attribute, _mapped(folder / name))
        counts = {len(self.vectors), len(self.places), self.facts.get("pieces")}
        if self.steps is not None:
            counts.add(len(self.steps))
        if len(counts) != 1 or self.vectors.ndim != 2 or self.vectors.shape[1] != self.facts.get("dimensions"):
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
