"""`similar`: files as an index of pieces and their vectors, kept up to date, and searched by meaning.

Invariant: an index holds the files that it was last made of, as they were then, by one model: a file with the same
bytes as before is not embedded again, one that is gone leaves, and vectors of another model never stand beside these.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmcli import settings as configs
from llmcli.config import TextConfig
from llmcli.config_embed import EmbedConfig, IndexConfig, SearchConfig
from llmcli.data.formats import Source, find_inputs
from llmcli.data.readers import ReadLog, read_documents
from llmcli.data.sections import sections_of
from llmcli.data.text_rows import TextRow
from llmcli.errors import DataError, UsageError
from llmcli.files.artefacts import AdaptedModel, Model, ModelPlace
from llmcli.files.atomic import refuse_existing, staged_folder
from llmcli.files.manifest import sha256_of, versions, write_manifest
from llmcli.files.prompt_cache import model_key
from llmcli.files.vector_index import INDEX, IndexWriter, Piece, StoredIndex
from llmcli.files.vector_lists import import_faiss
from llmcli.operations.approximate import makes_lists, open_search, settle_search
from llmcli.operations.embed import Embedder
from llmcli.operations.records import Progress

_ROWS = 4096  # vectors that are copied, or turned into bytes, at once
_EVERY = 64  # pieces between two records of progress
DOCUMENT, QUERY = ("document", "passage", "corpus"), ("query",)  # prompts of a model that are meant for either


@dataclasses.dataclass(frozen=True, slots=True)
class IndexReport:
    """What an index holds, and what was done for it."""

    index: str
    files: int
    pieces: int
    embedded: int  # pieces that were embedded now
    kept: int  # pieces of files that were as before
    removed: int  # files that were in the index and are no more, or are others now
    dimensions: int
    vectors: str
    pooling: str
    search: dict[str, Any]  # `kind`: exact or approximate; of lists: how many, how many a search looks at, recall@5
    skipped: list[str]
    notes: list[str]  # why the search is another than was asked for


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
    """A piece that was found; the score is the cosine of its vector and the query's."""

    file: str
    line: int
    end_line: int
    score: float
    text: str


# ----------------------------------------------------------------------------------------------------------------
# Index


def index_files(
    inputs: Sequence[str],
    model: Model,
    output: str | Path,
    config: IndexConfig = IndexConfig(),  # noqa: B008  (frozen)
    *,
    overwrite: bool = False,
) -> Iterator[Progress | IndexReport]:
    """Makes an index of files, or brings one up to date. The report comes last.

    Raises UsageError where the index is one of another model, DataError for a file that cannot be read, and
    MissingExtraError before the model is loaded where lists are asked for and faiss is not there.
    """
    configs.check(config)
    place = Path(output)
    is_index = (place / INDEX).is_file()
    if not is_index:
        refuse_existing(place, overwrite=overwrite)
    before = StoredIndex(place) if is_index and not overwrite else None
    sources = find_inputs(inputs)
    for source in sources:
        if source.size is None:
            raise UsageError("is no file; an index is made of files", where=source.name)
    if config.search == "approximate":
        import_faiss()  # before hours of embedding
    embedder = Embedder(model, _embedding(config), purposes=DOCUMENT)
    try:
        yield from _write(sources, embedder, place, config, before)
    finally:
        embedder.model.close()


def _embedding(config: IndexConfig | SearchConfig, **facts: Any) -> EmbedConfig:
    shared = {field.name for field in dataclasses.fields(EmbedConfig)}
    own = {name: value for name, value in dataclasses.asdict(config).items() if name in shared}
    return EmbedConfig(**{**own, **facts, "normalize": True, "truncate": True})


def _write(
    sources: Sequence[Source], embedder: Embedder, place: Path, config: IndexConfig, before: StoredIndex | None
) -> Iterator[Progress | IndexReport]:
    made_by = _made_by(embedder)
    how = {"chunk_tokens": config.chunk_tokens, "vectors": config.vectors}
    known: dict[str, dict[str, Any]] = {}
    if before is not None:
        _refuse_another(before, embedder, made_by)
        if all(before.facts.get(name) == value for name, value in how.items()):
            known = {entry["sha256"]: entry for entry in before.facts["files"]}
    files = []
    for source in sources:
        assert source.path is not None
        files.append((source, sha256_of(Path(source.path))))
    entries: list[dict[str, Any]] = []
    skipped: list[str] = []
    with (
        staged_folder(place, overwrite=True) as folder,
        IndexWriter(folder, embedder.facts.dimensions, exact=config.vectors == "float32") as writer,
    ):
        for source, digest in files:
            if before is not None and digest in known:
                entries.append(_copied(before, known[digest], source.name, writer))
        kept = writer.pieces
        fresh = [(source, digest) for source, digest in files if digest not in known]
        yield from _embedded(fresh, embedder, writer, config, entries, skipped)
        if not writer.pieces:
            first = f", the first: {skipped[0]}" if skipped else ""
            raise DataError(f"no text was found; {len(skipped):,} files were skipped{first}")
        facts = {"model": made_by, **how, "dimensions": embedder.facts.dimensions, "files": entries}
        writer.finish(facts)
        pieces = writer.pieces
        if makes_lists(config, pieces):
            yield Progress("making lists", 0, pieces, "pieces")
        search, notes = settle_search(folder, config)
        write_manifest(folder, {"model": made_by["key"], "versions": versions()})
    old = {entry["sha256"] for entry in before.facts["files"]} if before is not None else set()
    yield IndexReport(
        index=str(place),
        files=len(entries),
        pieces=pieces,
        embedded=pieces - kept,
        kept=kept,
        removed=len(old - {digest for _, digest in files}),
        dimensions=embedder.facts.dimensions,
        vectors=config.vectors,
        pooling=embedder.facts.pooling,
        search=search,
        skipped=skipped,
        notes=notes,
    )


def _copied(before: StoredIndex, entry: dict[str, Any], name: str, writer: IndexWriter) -> dict[str, Any]:
    """Takes a file's pieces over from the index as it was."""
    first, count = entry["first"], entry["pieces"]
    begun = writer.pieces
    for begin in range(first, first + count, _ROWS):
        end = min(begin + _ROWS, first + count)
        pieces = [dataclasses.replace(before.piece(number), file=name) for number in range(begin, end)]
        writer.copy(pieces, before, begin)
    return {**entry, "file": name, "first": begun}


def _embedded(
    fresh: Sequence[tuple[Source, str]],
    embedder: Embedder,
    writer: IndexWriter,
    config: IndexConfig,
    entries: list[dict[str, Any]],
    skipped: list[str],
) -> Iterator[Progress]:
    """Cuts, embeds and writes the files that are new."""
    waiting: collections.deque[Piece] = collections.deque()
    total = sum(source.size or 0 for source, _ in fresh)
    read = 0
    first = writer.pieces

    def texts() -> Iterator[TextRow]:
        nonlocal read, first
        for source, digest in fresh:
            count = 0
            for piece in _pieces(source, embedder, config, skipped):
                count += 1
                waiting.append(piece)
                yield TextRow(piece.text, f"{piece.file}:{piece.line}")
            read += source.size or 0
            entry = {"file": source.name, "sha256": digest, "size": source.size, "first": first, "pieces": count}
            entries.append(entry)
            first += count

    held: list[np.ndarray[Any, Any]] = []

    def flush() -> None:
        writer.write([waiting.popleft() for _ in held], np.stack(held))
        held.clear()

    for number, record in enumerate(embedder.embed(texts()), start=1):
        held.append(record.embedding)
        if len(held) == _ROWS:
            flush()
        if number % _EVERY == 0:
            yield Progress("reading", read, total, "bytes")
    if held:
        flush()


def _pieces(source: Source, embedder: Embedder, config: IndexConfig, skipped: list[str]) -> Iterator[Piece]:
    """A file in pieces that the model reads whole, blank ones left out."""
    tokenizer = embedder.tokenizer
    room = max(1, min(config.chunk_tokens, embedder.room - len(tokenizer.encode(embedder.facts.prompt))))
    problems: list[DataError] = []
    log = ReadLog(on_problem=None if source.named else problems.append)
    try:
        for document in read_documents([source], TextConfig(), log=log):
            line = document.line
            for section in sections_of(document.text, lambda text: len(tokenizer.encode(text)), room):
                bare = section.strip()
                if bare:
                    begin = line + section[: len(section) - len(section.lstrip())].count("\n")
                    yield Piece(source.name, begin, begin + bare.count("\n"), bare)
                line += section.count("\n")
    finally:
        skipped += [*map(str, problems), *log.skipped]


# ----------------------------------------------------------------------------------------------------------------
# Of which model


def _made_by(embedder: Embedder) -> dict[str, Any]:
    """The model and all that decides what vectors it gives."""
    place, facts = embedder.place, embedder.facts
    files = (
        {path.name: sha256_of(path) for path in sorted(place.adapter.iterdir()) if path.is_file()}
        if place.adapter
        else {}
    )
    said = [model_key(place.folder), files, embedder.tokenizer.hash]
    return {
        "path": str(place.folder.resolve()),
        "adapter": None if place.adapter is None else str(place.adapter.resolve()),
        "key": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(),
        "stamps": _stamps(place),
        "pooling": facts.pooling,
        "dimensions": facts.dimensions,
        "cut": embedder.config.dimensions,
        "lower": embedder.own.lower,
    }


def _stamps(place: ModelPlace) -> dict[str, list[int]]:
    """Size and time of the model's files: while these are the same, the files are not read again for their hash."""
    folders = [folder for folder in (place.folder, place.adapter) if folder is not None]
    paths = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    return {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _refuse_another(index: StoredIndex, embedder: Embedder, made_by: dict[str, Any] | None = None) -> None:
    """Raises UsageError where an index was made by another model than this one, or by other ways of it."""
    of = index.facts.get("model")
    if not isinstance(of, dict):
        raise DataError("names no model; make the index anew", where=str(index.folder / INDEX))
    if made_by is None and of.get("stamps") == _stamps(embedder.place):
        return
    made_by = made_by or _made_by(embedder)
    ways = [name for name in ("key", "pooling", "dimensions", "lower") if of.get(name) != made_by[name]]
    if ways:
        what = "another model" if "key" in ways else f"other {ways[0]} ({of.get(ways[0])})"
        raise UsageError(
            f"holds vectors of {what} than {embedder.name} gives (made by {of.get('path')}); "
            "use that one, or make the index anew with --overwrite",
            where=str(index.folder),
        )


# ----------------------------------------------------------------------------------------------------------------
# Search


class Searcher:
    """An index that is open, with the model that made it."""

    def __init__(
        self,
        index: str | Path,
        model: Model | None = None,
        config: SearchConfig = SearchConfig(),  # noqa: B008  (frozen)
    ) -> None:
        """`model`: where the index's own is no longer where it was. Raises UsageError for another one."""
        configs.check(config)
        self.index = StoredIndex(Path(index))
        self.nearest, self.notes = open_search(self.index, config)
        self.count = config.count
        of = self.index.facts.get("model")
        if not isinstance(of, dict) or not isinstance(of.get("path"), str):
            raise DataError("names no model; make the index anew", where=str(self.index.folder / INDEX))
        if model is None:
            model = of["path"] if of.get("adapter") is None else AdaptedModel(of["path"], of["adapter"])
            if not Path(of["path"]).exists():
                raise DataError(
                    f"the model that made it is no longer at {of['path']}; name it: --model", where=str(index)
                )
        whole = _embedding(config, pooling=of.get("pooling"), dimensions=of.get("cut"))
        self.embedder = Embedder(model, whole, purposes=QUERY)
        _refuse_another(self.index, self.embedder)

    def search(self, query: str, count: int | None = None) -> list[Hit]:
        """The pieces that are nearest to a text, the nearest first. Raises DataError for an empty text."""
        (vector,) = self.embedder.vectors([query])
        places, scores = self.nearest.search(vector, count or self.count)
        hits = []
        for place, score in zip(places, scores, strict=True):
            piece = self.index.piece(int(place))
            hits.append(Hit(piece.file, piece.line, piece.end_line, float(score), piece.text))
        return hits
