"""Preparing a corpus: documents read, cleaned, split, encoded and written.

Invariant: the corpus depends on the inputs, the tokenizer and the settings alone, byte for byte: not on the number of
workers, their speed, or the engine that encodes. Memory does not grow with the size of the input, but for the 30 bytes
a document that `--dedup exact` takes (`near`: 300), and those a sentence that `--sentences` takes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from llmcli import config as configs
from llmcli.config import CorpusConfig, TextConfig
from llmcli.data.cores import available_cores
from llmcli.data.corpus import SHARD_TOKENS, dtype_for, write_description
from llmcli.data.corpus_parts import CorpusParts, Meta
from llmcli.data.encode_pool import EncodePool, Encoder, EncoderConfig, EngineMismatchError
from llmcli.data.formats import Source, compression_of, find_inputs, open_source
from llmcli.data.readers import ReadLog, read_documents
from llmcli.data.sentences import with_sentences
from llmcli.data.split import Piece, Split, SplitScan, kept_pieces
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import DataError, UsageError
from llmcli.files.atomic import refuse_existing, staged_folder
from llmcli.files.manifest import versions, write_manifest
from llmcli.operations.records import Progress

_BATCH_BYTES = 1 << 18
_BATCH_TEXTS = 1024
_SMALL = 4 << 20  # bytes of input for which starting workers takes longer than encoding
_SAMPLES = 20  # documents that are encoded by both engines before the work begins
_SAMPLE_CHARACTERS = 1 << 16
_LISTED_SOURCES = 10_000


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What the corpus holds, and what was left out of it."""

    corpus: str
    hash: str
    tokenizer_hash: str
    vocab_size: int
    dtype: str
    train_tokens: int
    train_bytes: int
    train_documents: int
    train_sentences: int  # written beside their documents
    val_tokens: int
    val_bytes: int
    val_documents: int
    split: str  # none, hash, tail
    split_place: str  # tail: file:line where validation begins
    dropped: dict[str, int]  # empty, short, duplicates
    pii: dict[str, int]  # label: how many were replaced
    replaced: int  # invalid bytes that were replaced
    sources: int
    encodings: dict[str, int]  # other than UTF-8: how many files
    skipped: tuple[str, ...]  # files of folders that hold no text
    engine: str  # tiktoken, table or tokenizers: which encoded
    workers: int
    input_bytes: int
    seconds: float  # of encoding, reading and writing included


def prepare(
    inputs: Sequence[str],
    tokenizer: str | Path,
    output: str | Path,
    text: TextConfig = TextConfig(),  # noqa: B008  (frozen)
    config: CorpusConfig = CorpusConfig(),  # noqa: B008
    *,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> Iterator[Progress | PrepareReport]:
    """Writes the corpus of the inputs to the folder `output`. Yields Progress, last a PrepareReport.

    Raises DataError for bad input, UsageError for an output that exists; then nothing is left at `output`.
    """
    configs.check(text)
    configs.check(config)
    refuse_existing(output, overwrite=overwrite)
    opened = load_tokenizer(tokenizer)
    if opened.eos_id is None:
        raise DataError("the tokenizer has no end-of-text token, which ends each document", where=str(tokenizer))
    dtype = dtype_for(opened.vocab_size, config.dtype)
    found = find_inputs(inputs)
    _refuse_own_input(found, Path(output))
    with staged_folder(output, overwrite=overwrite) as folder:
        opened.save(folder)
        encoder = EncoderConfig(
            str(folder.resolve()), "", dtype, opened.eos_id, config.scrub_pii, config.dedup == "near"
        )
        sources = [_kept(source, folder, number) for number, source in enumerate(found)]
        job = _Job(sources, folder, text, config, shard_tokens)
        split = yield from job.split()
        encoder = dataclasses.replace(encoder, engine=job.engine(encoder))
        started = time.perf_counter()
        try:
            written, log = yield from job.run(encoder, split)
        except EngineMismatchError:  # the samples did not show it; the ids of tokenizers are the ones that count
            job.clear()
            encoder = dataclasses.replace(encoder, engine="tokenizers")
            written, log = yield from job.run(encoder, split)
        seconds = time.perf_counter() - started
        written.refuse_empty(config)
        for spool in folder.glob(".input-*"):
            spool.unlink()
        facts = {
            "tokenizer_hash": opened.hash,
            "vocab_size": opened.vocab_size,
            "end_of_text": opened.eos_id,
            "dtype": dtype,
            "split": split.description(),
            "options": _options(text, config),
            "train_sentences": written.sentences,
            "dropped": dict(sorted(written.dropped.items())),
            "pii": written.pii_counts(),
            **_described(log),
        }
        content = write_description(folder, written.writers, facts)
        lineage = {"corpus": content["hash"], "tokenizer": opened.hash, "seed": config.seed, "versions": versions()}
        write_manifest(folder, lineage)
    yield _report(written, log, str(output), content, encoder.engine, job.workers, seconds)


def _refuse_own_input(sources: Sequence[Source], output: Path) -> None:
    """An output that replaces its own input would be read while it is written, or lost."""
    place = output.resolve()
    for source in sources:
        if source.path is not None and Path(source.path).resolve().is_relative_to(place):
            raise UsageError("is an input and stands in the output's place", where=source.name)


def _kept(source: Source, folder: Path, number: int) -> Source:
    """The source itself, or for a pipe a copy on the disk: the text is read twice where the split asks for it."""
    if source.size is not None:
        return source
    path = folder / f".input-{number}"
    stream, _ = open_source(source, decompress=False)
    with stream, open(path, "wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)
    with open(path, "rb") as file:
        head = file.read(8)
    return dataclasses.replace(source, path=str(path), size=path.stat().st_size, compression=compression_of(head))


def _options(text: TextConfig, config: CorpusConfig) -> dict[str, object]:
    return {key: value for key, value in {**vars(text), **vars(config)}.items() if key != "workers"}


def _described(log: ReadLog) -> dict[str, object]:
    """The sources for corpus.json; of a great many the first, and one hash of all."""
    listed = [dataclasses.asdict(source) for source in log.sources]
    every = hashlib.sha256("".join(f"{source.sha256}\n" for source in log.sources).encode()).hexdigest()
    return {"source_count": len(listed), "sources_sha256": every, "sources": listed[:_LISTED_SOURCES]}


class _Job:
    """The passes over the sources."""

    def __init__(
        self, sources: list[Source], folder: Path, text: TextConfig, config: CorpusConfig, shard_tokens: int
    ) -> None:
        self.sources, self.folder, self.text, self.config = sources, folder, text, config
        self.shard_tokens = shard_tokens
        self.total = sum(source.size or 0 for source in sources)
        self.done = 0
        cores = config.workers or available_cores()
        self.workers = 0 if cores == 1 or (config.workers is None and self.total < _SMALL) else cores

    def _count(self, read: int) -> None:
        self.done += read

    def _pieces(self, log: ReadLog, dropped: Counter[str]) -> Iterator[Piece]:
        self.done = 0
        documents = read_documents(self.sources, self.text, self._count, log)
        return kept_pieces(documents, self.config.min_chars, dropped)

    def split(self) -> Generator[Progress, None, Split]:
        """Decides the split; its generator returns it."""
        config = self.config
        if config.val_fraction == 0:
            return Split("none", 0.0, config.seed)
        if config.val_by == "hash":
            return Split("hash", config.val_fraction, config.seed)
        scan = SplitScan(config)
        told = 0
        for piece in self._pieces(ReadLog(), Counter()):
            if not scan.take(piece):
                break
            if self.done - told >= 16 << 20:
                told = self.done
                yield Progress("scan", self.done, self.total, "bytes")
        return scan.decide()

    def engine(self, config: EncoderConfig) -> str:
        """The fastest engine that gives the ids of the tokenizers library on the first documents."""
        encoder = Encoder(config)
        engine = encoder.engine
        for number, piece in enumerate(self._pieces(ReadLog(), Counter())):
            if number >= _SAMPLES or engine == "tokenizers":
                break
            if encoder.differs(piece.text[:_SAMPLE_CHARACTERS]):
                engine = "tokenizers"
        return engine

    def clear(self) -> None:
        """Removes the shards of a pass that is repeated."""
        for path in self.folder.glob("*.npy"):
            path.unlink()

    def run(self, encoder: EncoderConfig, split: Split) -> Generator[Progress, None, tuple[CorpusParts, ReadLog]]:
        """Encodes and writes; its generator returns what was written, and what was read."""
        log, dropped = ReadLog(hashed=True), Counter[str]()
        split.place = ""
        with (
            CorpusParts(self.folder, encoder, self.shard_tokens, split, self.config, dropped) as written,
            self._pool(encoder) as pool,
        ):
            yield Progress("encode", 0, self.total, "bytes")
            pieces = split.divide(self._pieces(log, dropped))
            if self.config.sentences:
                pieces = with_sentences(pieces)
            for batch, encoded in pool.encode(self._batches(pieces)):
                for meta, result in zip(batch, encoded, strict=True):
                    written.take(result, meta)
                yield Progress("encode", self.done, self.total, "bytes")
            written.finish()
        return written, log

    def _pool(self, encoder: EncoderConfig) -> EncodePool[list[Meta]]:
        return EncodePool(encoder, self.workers)

    @staticmethod
    def _batches(pieces: Iterator[Piece]) -> Iterator[tuple[list[Meta], list[tuple[bytes, bool]]]]:
        """Pieces of about equal size in sum, as UTF-8, and what else is to be known of each."""
        batch: list[Meta] = []
        texts: list[tuple[bytes, bool]] = []
        size = 0
        for piece in pieces:
            data = piece.text.encode()
            batch.append(Meta(piece.first, piece.final, piece.part, piece.sentence))
            texts.append((data, piece.final))
            size += len(data)
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_TEXTS:
                yield batch, texts
                batch, texts, size = [], [], 0
        if batch:
            yield batch, texts


def _report(
    written: CorpusParts,
    log: ReadLog,
    output: str,
    content: dict[str, object],
    engine: str,
    workers: int,
    seconds: float,
) -> PrepareReport:
    """The last record."""
    train, val, sources = written.writers["train"], written.writers["val"], log.sources
    encodings = Counter(source.encoding for source in sources if source.encoding != "utf-8")
    return PrepareReport(
        corpus=output,
        hash=str(content["hash"]),
        tokenizer_hash=str(content["tokenizer_hash"]),
        vocab_size=int(str(content["vocab_size"])),
        dtype=str(content["dtype"]),
        train_tokens=train.tokens,
        train_bytes=train.bytes,
        train_documents=train.documents,
        train_sentences=written.sentences,
        val_tokens=val.tokens,
        val_bytes=val.bytes,
        val_documents=val.documents,
        split=written.split.by,
        split_place=written.split.place,
        dropped=dict(sorted(written.dropped.items())),
        pii=written.pii_counts(),
        replaced=sum(source.replaced for source in sources),
        sources=len(sources),
        encodings=dict(sorted(encodings.items())),
        skipped=tuple(log.skipped),
        engine=engine,
        workers=max(1, workers),
        input_bytes=sum(source.size for source in sources),
        seconds=seconds,
    )
