"""Texts to a file of vectors: JSON Lines, `.npy` or safetensors, written as they are made, in the order of the texts.

Invariant: the file appears whole or not at all, in bounded memory, and says how its vectors were made: in its metadata,
or in a JSON file beside it. Lines of an interrupted call are kept beside it, and the same call goes on behind them, to
the bytes that an undisturbed one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmcli.config_embed import EmbedConfig
from llmcli.data.text_rows import TextRow
from llmcli.errors import UsageError
from llmcli.files.arrays import NpyRows, SafetensorsRows
from llmcli.files.artefacts import Model
from llmcli.files.atomic import refuse_existing, staged_file, write_file
from llmcli.files.manifest import sha256_of
from llmcli.files.partial import PartialFile, partial_file
from llmcli.files.prompt_cache import model_key
from llmcli.operations.embed import Embedded, Embedder
from llmcli.operations.records import Progress

SUFFIXES = (".jsonl", ".npy", ".safetensors")
_EVERY = 256  # texts between two records of progress


@dataclasses.dataclass(frozen=True, slots=True)
class EmbedReport:
    """What was written."""

    output: str
    texts: int
    rows: int  # vectors, or sets of them where there are several layers
    left_out: int  # tokens that were not read
    facts: dict[str, Any]
    resumed: int = 0  # of the texts, those that an interrupted call had written


def embed_file(
    model: Model,
    texts: Iterable[str | TextRow],
    output: str | Path,
    config: EmbedConfig = EmbedConfig(),  # noqa: B008  (frozen)
    *,
    overwrite: bool = False,
) -> Iterator[Progress | EmbedReport]:
    """Writes the vectors of texts; the report comes last. Raises what `embed` raises, and then there is no file.

    Of JSON Lines what was written until then is kept, and the same call goes on there. Raises UsageError where that is
    of another model, other settings or other texts.
    """
    refuse_output(output, overwrite=overwrite)
    embedder = Embedder(model, config)
    try:
        yield from embed_into(embedder, texts, output, overwrite=overwrite)
    finally:
        embedder.model.close()


def refuse_output(output: str | Path, *, overwrite: bool) -> None:
    """Raises UsageError where the name tells no known kind of file, or where one of the files is there already."""
    place = Path(output)
    if place.suffix not in SUFFIXES:
        raise UsageError(f"must end with one of {', '.join(SUFFIXES)}", where=str(output))
    for path in (place, facts_beside(place)):
        if path is not None:
            refuse_existing(path, overwrite=overwrite)


def facts_beside(output: Path) -> Path | None:
    """Where the file with the facts stands; None where the output holds them itself."""
    return None if output.suffix == ".safetensors" else output.with_suffix(".json")


def embed_into(
    embedder: Embedder, texts: Iterable[str | TextRow], output: str | Path, *, overwrite: bool = False
) -> Iterator[Progress | EmbedReport]:
    """As `embed_file`, by a model that is loaded."""
    place, beside = Path(output), facts_beside(Path(output))
    count = left_out = 0
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(staged_file(beside, overwrite=overwrite)) if beside is not None else None
        sink = stack.enter_context(_sink(place, embedder, stack, overwrite=overwrite))
        yield Progress("texts", 0, None, "texts")  # the first window may take long
        for record in embedder.embed(texts, sink.kept):
            sink.write(count, record)
            count += 1
            left_out += record.left_out
            if count % _EVERY == 0:
                yield Progress("texts", count, None, "texts")
        rows = sink.finish()
        facts = {**embedder.said, "texts": count, "rows": rows}
        if said is not None:
            said.write((json.dumps(facts, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "backslashreplace"))
    yield EmbedReport(str(output), count, rows, left_out, facts, sink.kept)


def write_attentions(embedder: Embedder, text: str, output: str | Path, *, overwrite: bool = False) -> list[str]:
    """Writes how much each token of a text looks at each, as `attentions` (layer, head, query, key); gives the tokens.

    The file is safetensors; its metadata hold model, text and tokens. Raises what `embed` raises.
    """
    from safetensors.numpy import save

    if Path(output).suffix != ".safetensors":
        raise UsageError("must end with .safetensors", where=str(output))
    refuse_existing(output, overwrite=overwrite)
    ids = embedder.ids(text)
    tokens = [embedder.tokenizer.token(identity) for identity in ids]
    facts = {"model": json.dumps(embedder.name), "text": json.dumps(text), "tokens": json.dumps(tokens)}
    write_file(output, save({"attentions": embedder.model.attentions(ids)}, facts))
    return tokens


# ----------------------------------------------------------------------------------------------------------------
# The files


class _Sink(Protocol):
    @property
    def kept(self) -> int: ...  # texts whose vectors stand already

    def write(self, index: int, record: Embedded) -> None: ...

    def finish(self) -> int: ...


@contextlib.contextmanager
def _sink(place: Path, embedder: Embedder, stack: contextlib.ExitStack, *, overwrite: bool) -> Iterator[_Sink]:
    facts = embedder.facts
    row = (*((len(facts.layers),) if embedder.several else ()), facts.dimensions)
    every = facts.pooling == "none"
    if place.suffix == ".jsonl":
        with partial_file(place, _key(embedder), overwrite=overwrite) as lines:
            yield _Lines(lines)
        return
    with staged_file(place, overwrite=overwrite) as file:
        if place.suffix == ".npy":
            tokens = None
            if every:
                beside = stack.enter_context(staged_file(place.with_suffix(".tokens.npy"), overwrite=overwrite))
                tokens = NpyRows(beside, (2,), "int64")
            yield _Npy(NpyRows(file, row, "float32"), tokens)
        else:
            tensors: dict[str, Any] = {"embeddings": (row, "float32"), **({"tokens": ((2,), "int64")} if every else {})}
            metadata = {name: json.dumps(value) for name, value in embedder.said.items()}
            with contextlib.closing(SafetensorsRows(file, tensors, metadata)) as rows:
                yield _Safetensors(rows)


def _key(embedder: Embedder) -> str:
    """Tells by a hash the model and all that decides what vectors it gives."""
    place, config = embedder.place, embedder.config
    adapter = [] if place.adapter is None else sorted(path for path in place.adapter.iterdir() if path.is_file())
    files = [model_key(place.folder), embedder.tokenizer.hash, {path.name: sha256_of(path) for path in adapter}]
    how = {name: value for name, value in embedder.said.items() if name != "model"}
    ways = [config.precision, config.truncate, embedder.several, embedder.own.lower]
    return hashlib.sha256(json.dumps([files, how, ways], sort_keys=True).encode()).hexdigest()


class _Lines:
    """JSON Lines, behind those of an interrupted call, which must be of the same texts."""

    def __init__(self, lines: PartialFile) -> None:
        self.lines, self.rows, self.kept = lines, 0, lines.kept
        self._standing = lines.begins()

    def write(self, index: int, record: Embedded) -> None:
        if index < self.kept:
            if not next(self._standing).startswith(_bytes(_head_of(record)[:-1] + ", ")):
                self._refuse(index)
        else:
            self.lines.write(_bytes(line_of(record) + "\n"))
        self.rows += 1

    def _refuse(self, index: int) -> None:
        where = f"{self.lines.path}:{index + 1}"
        raise UsageError("is the begin of this output, of other texts; --overwrite begins anew", where=where)

    def finish(self) -> int:
        if self.rows < self.kept:
            self._refuse(self.rows)
        return self.rows


@dataclasses.dataclass
class _Npy:
    """An array of vectors and, where there is one a token, another: number of the text, id of the token."""

    vectors: NpyRows
    tokens: NpyRows | None
    kept = 0

    def write(self, index: int, record: Embedded) -> None:
        self.vectors.write(_rows(record))
        if self.tokens is not None:
            self.tokens.write(_tokens(index, record))

    def finish(self) -> int:
        self.vectors.finish()
        if self.tokens is not None:
            self.tokens.finish()
        return self.vectors.rows


@dataclasses.dataclass
class _Safetensors:
    """The same as two tensors: embeddings and tokens."""

    tensors: SafetensorsRows
    kept = 0

    def write(self, index: int, record: Embedded) -> None:
        self.tensors.write("embeddings", _rows(record))
        if record.ids is not None:
            self.tensors.write("tokens", _tokens(index, record))

    def finish(self) -> int:
        self.tensors.finish()
        return self.tensors.rows["embeddings"]


def _rows(record: Embedded) -> np.ndarray[Any, Any]:
    """(rows, [layers,] dimensions)"""
    if record.ids is None:
        return record.embedding[None]
    return np.moveaxis(record.embedding, -2, 0)  # tokens first


def _tokens(index: int, record: Embedded) -> np.ndarray[Any, Any]:
    ids = np.asarray(record.ids, np.int64)
    return np.stack([np.full_like(ids, index), ids], 1)


# ----------------------------------------------------------------------------------------------------------------
# JSON


def line_of(record: Embedded, *, ascii_only: bool = False) -> str:
    """A record as a JSON object on one line. Nine digits give each float32 back as it was."""
    head = _head_of(record, ascii_only=ascii_only)[:-1]
    if record.tokens is not None:
        head += f', "tokens": {json.dumps(record.tokens, ensure_ascii=ascii_only)}'
    return f'{head}, "embedding": {_numbers(record.embedding)}}}'


def _head_of(record: Embedded, *, ascii_only: bool = False) -> str:
    """What a line says of the text itself, as a JSON object."""
    head: dict[str, Any] = {} if record.id is None else {"id": record.id}
    return json.dumps({**head, "text": record.text}, ensure_ascii=ascii_only)


def _bytes(line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace")


def _numbers(values: np.ndarray[Any, Any]) -> str:
    if values.ndim > 1:
        return "[" + ", ".join(map(_numbers, values)) + "]"
    return "[" + ", ".join(["%.9g"] * len(values)) % tuple(values.tolist()) + "]"
