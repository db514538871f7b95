"""The corpus: token ids on the disk, in shards that are mapped into memory, and `corpus.json` that says what they are.

Invariant: a shard is a valid one-dimensional .npy file of uint16 or uint32 at every moment after it is closed, and
`corpus.json` holds counts and a sha256 of each, so that a folder either opens as what was written or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmcli.errors import DataError, from_os_error
from llmcli.files.artefacts import read_json
from llmcli.files.atomic import write_json
from llmcli.files.manifest import manifest_problems, sha256_of

CORPUS = "corpus.json"
VERSION = 1
SHARD_TOKENS = 1 << 28  # 512 MB of uint16
PARTS = ("train", "val")
_HELD_TOKENS = 1 << 17
_HEADER = 128  # bytes of a .npy header of ours: its magic, its length, a dictionary padded with spaces


def dtype_for(vocab_size: int, wanted: str = "auto") -> str:
    """uint16 where every id fits, else uint32. Raises DataError where uint16 was asked for and is too small."""
    fits = vocab_size <= 1 << 16
    if wanted == "uint16" and not fits:
        raise DataError(f"a vocabulary of {vocab_size} tokens does not fit uint16; take --dtype uint32", where="dtype")
    return wanted if wanted != "auto" else "uint16" if fits else "uint32"


@dataclasses.dataclass(frozen=True)
class Mark:
    """A place in a part that can be returned to."""

    shard: int
    shard_tokens: int
    tokens: int
    size: int


class PartWriter:
    """Writes the ids of one part (train or val) into shards."""

    def __init__(self, folder: Path, part: str, dtype: str, shard_tokens: int) -> None:
        self.folder, self.part, self.dtype, self.shard_tokens = folder, part, dtype, shard_tokens
        self.itemsize = np.dtype(dtype).itemsize
        self.file: BinaryIO | None = None
        self.counts: list[int] = []  # tokens of each shard
        self.tokens = self.bytes = self.documents = 0
        self._held: list[np.ndarray] = []  # ids that are counted and not yet in a file: short documents come in crowds
        self._held_tokens = 0

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{self.part}-{shard:05d}.npy"

    def write(self, ids: np.ndarray, size: int) -> None:
        """Appends ids that stand for `size` bytes of UTF-8 text. They must not change after."""
        self.tokens += len(ids)
        self.bytes += size
        self._held.append(ids)
        self._held_tokens += len(ids)
        if self._held_tokens >= _HELD_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        ids = np.concatenate(self._held, dtype=self.dtype)
        self._held, self._held_tokens = [], 0
        while len(ids):
            if self.file is None or self.counts[-1] >= self.shard_tokens:
                self._next_shard()
            assert self.file is not None
            part = ids[: self.shard_tokens - self.counts[-1]]
            self.file.write(part.data)
            self.counts[-1] += len(part)
            ids = ids[len(part) :]

    def mark(self) -> Mark:
        """Where the part stands now."""
        self._flush()
        return Mark(len(self.counts), self.counts[-1] if self.counts else 0, self.tokens, self.bytes)

    def return_to(self, mark: Mark) -> None:
        """Takes back what was written after the mark."""
        self._flush()
        while len(self.counts) > mark.shard:
            self._close()
            self.path(len(self.counts) - 1).unlink()
            self.counts.pop()
        if self.counts:
            if self.file is None:
                self.file = open(self.path(mark.shard - 1), "r+b")  # noqa: SIM115
            self.counts[-1] = mark.shard_tokens
            self.file.flush()
            self.file.seek(_HEADER + mark.shard_tokens * self.itemsize)
            self.file.truncate()
        self.tokens, self.bytes = mark.tokens, mark.size

    def close(self) -> None:
        """Completes the last shard."""
        self._flush()
        self._close()

    def pour_into(self, other: PartWriter, end: int, seed: int) -> None:
        """Appends its documents, each of which ends with the id `end`, to another part in an order drawn by the seed.

        Its own files are removed; the other's count of documents stays. It must be of one shard.
        """
        self.close()
        for path in map(self.path, range(len(self.counts))):
            for document in _drawn(path, end, seed):
                other.write(document, 0)
            path.unlink()  # its map is gone by now, which Windows insists on
        other.bytes += self.bytes
        self.counts = []

    def _next_shard(self) -> None:
        self._close()
        self.counts.append(0)
        self.file = open(self.path(len(self.counts) - 1), "wb")  # noqa: SIM115
        self.file.write(_header(self.dtype, 0))

    def _close(self) -> None:
        if self.file is not None:
            self.file.seek(0)
            self.file.write(_header(self.dtype, self.counts[-1]))
            self.file.close()
            self.file = None


def _drawn(path: Path, end: int, seed: int) -> Iterator[np.ndarray]:
    """The documents of a shard, each of which ends with the id `end`, in an order drawn by the seed."""
    ids = np.load(path, mmap_mode="r")
    pieces = ((begin, ids[begin : begin + _HELD_TOKENS]) for begin in range(0, len(ids), _HELD_TOKENS))
    ends = np.concatenate([begin + np.flatnonzero(piece == end) + 1 for begin, piece in pieces])
    for document in np.random.Generator(np.random.Philox(key=seed)).permutation(len(ends)):
        yield np.array(ids[ends[document - 1] if document else 0 : ends[document]])


def _header(dtype: str, count: int) -> bytes:
    """The header of a one-dimensional .npy file, always of the same length (numpy.lib.format, version 1.0)."""
    described = f"{{'descr': '{np.dtype(dtype).newbyteorder('<').str}', 'fortran_order': False, 'shape': ({count},), }}"
    room = _HEADER - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + described.ljust(room - 1).encode() + b"\n"


def write_description(folder: Path, writers: Mapping[str, PartWriter], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `corpus.json` for closed writers; `facts`: tokenizer_hash, vocab_size, split and the like. Returns it."""
    content: dict[str, Any] = {"format": "llmcli corpus", "version": VERSION, "hash": "", **facts}
    identity = hashlib.sha256(str(facts["tokenizer_hash"]).encode())
    shards = []
    for part, writer in writers.items():
        content[f"{part}_tokens"] = writer.tokens
        content[f"{part}_bytes"] = writer.bytes
        content[f"{part}_documents"] = writer.documents
        for shard, count in enumerate(writer.counts):
            path = writer.path(shard)
            entry = {"file": path.name, "tokens": count, "sha256": sha256_of(path)}
            identity.update(json.dumps(entry, sort_keys=True).encode())
            shards.append(entry)
    content["shards"] = shards
    content["hash"] = identity.hexdigest()
    write_json(folder / CORPUS, content)
    return content


# ----------------------------------------------------------------------------------------------------------------
# Reading


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus folder that was looked through."""

    path: Path
    hash: str
    tokenizer_hash: str
    vocab_size: int
    end_of_text: int  # the id that ends each document
    dtype: str
    train_tokens: int
    val_tokens: int
    train_bytes: int  # UTF-8 bytes of the text that the tokens stand for
    val_bytes: int
    train_documents: int
    val_documents: int
    split: Mapping[str, Any]
    shards: tuple[tuple[str, int], ...]  # (file, tokens)

    @property
    def documents(self) -> int:
        """Documents of both parts."""
        return self.train_documents + self.val_documents

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer that made the ids: the corpus holds a copy."""
        return self.path

    def train(self) -> list[np.memmap]:
        """The ids to train on, shard by shard, mapped read-only."""
        return self._mapped("train")

    def val(self) -> list[np.memmap]:
        """The ids to validate on; empty when there are none."""
        return self._mapped("val")

    def _mapped(self, part: str) -> list[np.memmap]:
        return [_map(self.path / file, self.dtype, tokens) for file, tokens in self.shards if file.startswith(part)]


_NUMBERS = (
    "vocab_size",
    "end_of_text",
    *(f"{part}_{what}" for part in PARTS for what in ("tokens", "bytes", "documents")),
)


def open_corpus(path: str | Path, *, check_hashes: bool = False) -> Corpus:
    """Opens a corpus folder. Raises DataError, naming the file, for what is missing, cut short or contradicts itself.

    `check_hashes` reads every byte and compares it with the manifest.
    """
    folder = Path(path)
    place = folder / CORPUS
    if not folder.is_dir():
        raise DataError("is not a corpus folder", where=str(path))
    content = read_json(place)
    corpus = _parsed(folder, content)
    for part in PARTS:
        total = sum(tokens for file, tokens in corpus.shards if file.startswith(part))
        if total != content[f"{part}_tokens"]:
            raise DataError(f"{part}_tokens is not what its shards hold", where=str(place))
    corpus.train(), corpus.val()
    if check_hashes:
        for problem in manifest_problems(folder):
            raise DataError(problem, where=str(folder))
    return corpus


def _parsed(folder: Path, content: Mapping[str, Any]) -> Corpus:
    where = str(folder / CORPUS)
    if content.get("version") != VERSION:
        raise DataError(f"is of version {content.get('version')!r}; this llmcli reads version {VERSION}", where=where)
    for name in _NUMBERS:
        if not isinstance(content.get(name), int) or isinstance(content[name], bool) or content[name] < 0:
            raise DataError(f"field {name!r} must be a whole number, is {content.get(name)!r}", where=where)
    for name, kind in (("hash", str), ("tokenizer_hash", str), ("dtype", str), ("split", dict), ("shards", list)):
        if not isinstance(content.get(name), kind):
            raise DataError(f"field {name!r} is missing or of a wrong type", where=where)
    if content["dtype"] not in ("uint16", "uint32"):
        raise DataError(f"dtype must be uint16 or uint32, is {content['dtype']!r}", where=where)
    shards = []
    for shard in content["shards"]:
        file, tokens = (shard.get("file"), shard.get("tokens")) if isinstance(shard, dict) else (None, None)
        if not isinstance(file, str) or not isinstance(tokens, int) or Path(file).name != file:
            raise DataError("field 'shards' must name files of this folder with their tokens", where=where)
        if not file.startswith(PARTS) or not file.endswith(".npy"):
            raise DataError(f"{file!r} is no name of a shard", where=where)
        shards.append((file, tokens))
    named = {field.name: content[field.name] for field in dataclasses.fields(Corpus) if field.name in content}
    return Corpus(**{**named, "path": folder, "shards": tuple(shards)})


def _map(path: Path, dtype: str, tokens: int) -> np.memmap:
    """Maps a shard. Raises DataError where its header or length is not what corpus.json says."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise from_os_error(error, path) from error
    except (ValueError, EOFError, SyntaxError) as error:
        raise DataError("is not a whole .npy file", where=str(path)) from error
    if not isinstance(ids, np.memmap) or ids.ndim != 1 or str(ids.dtype) != dtype or len(ids) != tokens:
        raise DataError(f"must hold {tokens} ids of {dtype}, holds {ids.shape} of {ids.dtype}", where=str(path))
    return ids
