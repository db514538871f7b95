"""Vectors in lists around centres, in faiss's own file: which rows an approximate search has to look at.

Invariant: faiss reads no byte that decides where it reads but those that were written: the file's size and the sha256
of all that stands before its codes are held against what `index.json` says. A code or row that is damaged behind that
costs a hit, never more: rows are looked at by their own vectors after.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.errors import DataError, MissingExtraError, from_os_error

LISTS = "lists.faiss"
_ROW = 8  # bytes of a row's number
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class ListFacts:
    """What `index.json` says of the lists."""

    lists: int
    probes: int  # lists that a search looks at
    recall_at_5: float  # of a sample of pieces: the share of their nearest five that is found
    sample: int
    seconds: float  # that making it took
    size: int  # bytes of the file
    head: int  # bytes before the codes
    head_sha256: str


def import_faiss() -> Any:
    """The library. Raises MissingExtraError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss-cpu", "search", "approximate search") from error
    return faiss


def has_faiss() -> bool:
    """Whether the library is there."""
    try:
        import_faiss()
    except MissingExtraError:
        return False
    return True


def write_lists(folder: Path, index: Any) -> dict[str, Any]:
    """Writes faiss's lists into a staged folder; size, head and its sha256."""
    path = folder / LISTS
    import_faiss().write_index(index, str(path))
    size = path.stat().st_size
    head = size - index.ntotal * (index.code_size + _ROW)
    return {"size": size, "head": head, "head_sha256": _sha256_of_head(path, head)}


def _sha256_of_head(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size and (chunk := file.read(min(size, _CHUNK))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def facts_of_lists(said: Any, where: str) -> ListFacts | None:
    """What `search` of `index.json` says; None: there are none. Raises DataError for what it cannot say."""
    if said is None or (isinstance(said, dict) and said.get("kind") == "exact"):
        return None
    kinds = {"recall_at_5": float, "seconds": float, "head_sha256": str}
    names = [field.name for field in dataclasses.fields(ListFacts)]
    if not isinstance(said, dict) or any(type(said.get(name)) is not kinds.get(name, int) for name in names):
        raise DataError("does not say how its lists were made; make the index anew", where=where)
    return ListFacts(**{name: said[name] for name in names})


def check_lists(folder: Path, facts: ListFacts) -> None:
    """Raises DataError where the file of the lists is not the one that the facts tell of; its codes are not read."""
    path = folder / LISTS
    try:
        sound = path.stat().st_size == facts.size and _sha256_of_head(path, facts.head) == facts.head_sha256
    except OSError as error:
        raise from_os_error(error, path) from error
    if not sound:
        raise DataError("is damaged, or another index's; make the index anew, or add --search exact", where=str(path))


class StoredLists:
    """Lists that are open, their codes mapped."""

    def __init__(self, folder: Path, facts: ListFacts, rows: int, dimensions: int) -> None:
        """Raises DataError for what is not whole or of another index, MissingExtraError without faiss."""
        faiss = import_faiss()
        check_lists(folder, facts)
        self.rows, self.facts = rows, facts
        path = folder / LISTS
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
            faiss.downcast_InvertedLists(self._index.invlists).prefetch_nthread = 0  # threads made for each search
            found = (self._index.ntotal, self._index.d, self._index.nlist)
        except (RuntimeError, AttributeError) as error:
            raise DataError("is no file of this faiss; make the index anew", where=str(path)) from error
        if found != (rows, dimensions, facts.lists):
            raise DataError("holds other vectors than the index; make the index anew", where=str(path))
        self._ways = faiss.SearchParametersIVF(nprobe=facts.probes)

    def candidates(self, vector: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
        """Rows that may be among the nearest to a vector, so many at most."""
        _, found = self._index.search(vector[None], count, params=self._ways)
        rows: npt.NDArray[np.int64] = np.unique(found[0])
        return rows[(rows >= 0) & (rows < self.rows)]
