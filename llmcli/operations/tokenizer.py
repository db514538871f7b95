"""`tokenizer`: train one on files, encode and decode with one, and see how it fares on texts.

Invariant: the files of a trained tokenizer depend on the texts and the settings alone, byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llmcli import config as configs
from llmcli.config import TextConfig, TokenizerConfig
from llmcli.data.formats import find_inputs
from llmcli.data.readers import Document, read_documents
from llmcli.data.tokenizer import TextTokenizer
from llmcli.data.tokenizer_training import Trained, train
from llmcli.errors import DataError
from llmcli.files.atomic import refuse_existing, staged_folder
from llmcli.operations.records import Progress

_HEAD = 4_000_000  # characters from which the size of the whole is estimated
_BLOCK = 4096  # characters that --max-chars takes or leaves together
_SAMPLE = 200_000  # characters on which the new tokenizer's bytes per token are measured
_UNITS = {"count": "bytes", "merge": "merges", "prune": "pieces"}


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """The tokenizer that was made, and from what."""

    tokenizer: str  # its folder
    hash: str
    kind: str
    vocab_size: int
    special_tokens: tuple[str, ...]
    documents: int
    characters: int  # that were used
    distinct_words: int
    thinned: int  # how often rare words were thinned to stay within the memory
    bytes_per_token: float  # on the begin of the text
    seconds: float


def train_tokenizer(
    inputs: Sequence[str],
    output: str | Path,
    text: TextConfig = TextConfig(),  # noqa: B008  (frozen)
    config: TokenizerConfig = TokenizerConfig(),  # noqa: B008
    *,
    overwrite: bool = False,
    workers: int | None = None,
) -> Iterator[Progress | TrainReport]:
    """Trains a tokenizer on the inputs and writes it to the folder `output`. Yields Progress, last a TrainReport.

    Raises DataError for bad input, ConfigError for settings that do not fit, UsageError for an output that exists;
    then nothing is left at `output`.
    """
    configs.check(text)
    configs.check(config)
    refuse_existing(output, overwrite=overwrite)
    sources = find_inputs(inputs)
    sizes = [source.size for source in sources]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    started = time.perf_counter()
    read = _Read()
    documents = read.documents(read_documents(sources, text, read.add), config.doc_cap)
    texts = _spread(documents, config, lambda: read.bytes, total)
    done: Trained | None = None
    for step in train(read.sampled(texts), config, workers=workers):
        if isinstance(step, Trained):
            done = step
        elif step.stage == "count":
            yield Progress("count", min(read.bytes, total or read.bytes), total, _UNITS["count"])
        else:
            yield Progress(step.stage, step.done, step.total, _UNITS[step.stage])
    assert done is not None
    with staged_folder(output, overwrite=overwrite) as folder:
        done.tokenizer.save(folder)
    sample = "".join(read.sample)
    tokens = sum(len(ids) for ids in done.tokenizer.encode_batch(read.sample))
    yield TrainReport(
        tokenizer=str(output),
        hash=done.tokenizer.hash,
        kind=config.kind,
        vocab_size=done.tokenizer.vocab_size,
        special_tokens=tuple(done.tokenizer.token(identity) for identity in sorted(done.tokenizer.special_ids)),
        documents=read.count,
        characters=done.characters,
        distinct_words=done.distinct_words,
        thinned=done.thinned,
        bytes_per_token=len(sample.encode("utf-8", "replace")) / max(1, tokens),
        seconds=time.perf_counter() - started,
    )


class _Read:
    """Counts what is read, and keeps the begin of it."""

    def __init__(self) -> None:
        self.bytes = 0
        self.count = 0  # documents
        self.sample: list[str] = []
        self._sampled = 0

    def add(self, size: int) -> None:
        self.bytes += size

    def documents(self, documents: Iterable[Document], cap: int | None) -> Iterator[str]:
        """The texts, of each document at most `cap` characters."""
        room = cap
        for document in documents:
            text = document.text if room is None else document.text[:room]
            if text:
                yield text
            room = None if room is None else room - len(text)
            if document.final:
                self.count += 1
                room = cap

    def sampled(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            if self._sampled < _SAMPLE:
                self.sample.append(text[: _SAMPLE - self._sampled])
                self._sampled += len(self.sample[-1])
            yield text


def _spread(
    texts: Iterator[str], config: TokenizerConfig, bytes_read: Callable[[], int], total: int | None
) -> Iterator[str]:
    """At most `max_chars` characters, in blocks spread over the whole input as the seed has it.

    How much the whole is, is estimated from its begin and its size on the disk; where that is not known (stdin), the
    begin is taken.
    """
    if config.max_chars is None:
        yield from texts
        return
    head: list[str] = []
    characters = 0
    for text in texts:
        head.append(text)
        characters += len(text)
        if characters >= _HEAD:
            expected = characters * total / max(1, bytes_read()) if total else 0.0
            break
    else:
        expected = float(characters)
    share = config.max_chars / expected if expected else 1.0
    left = config.max_chars
    blocks = (
        text[begin : begin + _BLOCK] for text in itertools.chain(head, texts) for begin in range(0, len(text), _BLOCK)
    )
    for number, block in enumerate(blocks):
        if share >= 1 or _chance(config.seed, number) < share:
            yield block[:left]
            left -= len(block)
            if left <= 0:
                return


def _chance(seed: int, number: int) -> float:
    """A number in [0, 1) that seed and number determine."""
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") / 2**64


# ----------------------------------------------------------------------------------------------------------------
# Decoding what people type


def parse_ids(text: str, *, where: str = "ids") -> list[int]:
    """Ids from JSON lists or from numbers with spaces, commas or line ends between them.

    Raises DataError naming the first that is no id.
    """
    ids = []
    for number, word in enumerate(re.findall(r"[^\s,\[\]]+", text), start=1):
        if not (word.isascii() and word.isdigit() and len(word) < 12):
            raise DataError(f"{word[:40]!r} is not a token id", where=f"{where}: number {number}")
        ids.append(int(word))
    return ids


def parse_record(line: str, *, where: str) -> list[int]:
    """Ids from a line: what `tokenizer encode` writes, as JSON object or list, or plain numbers."""
    if not line.lstrip().startswith("{"):
        return parse_ids(line, where=where)
    try:
        ids = json.loads(line)["ids"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError('is not a JSON object with "ids"', where=where) from error
    if not isinstance(ids, list) or not all(type(identity) is int for identity in ids):
        raise DataError('"ids" must be a list of whole numbers', where=where)
    return ids


# ----------------------------------------------------------------------------------------------------------------
# Figures


@dataclasses.dataclass(frozen=True)
class FileFigures:
    """How a tokenizer fares on one file. Words are what stands between white space."""

    file: str
    documents: int
    bytes: int
    characters: int
    words: int
    tokens: int
    bytes_per_token: float
    tokens_per_word: float
    unknown_tokens: int
    unused_tokens: int  # of the vocabulary, special ones aside
    round_trip_failures: int  # documents that decoding does not give back
    first_failure: str | None  # file:line


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """What a tokenizer is, and its figures on each file."""

    tokenizer: str
    hash: str
    kind: str
    vocab_size: int
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    engine: str  # tiktoken, table or tokenizers: what encodes
    chat_template: bool
    files: tuple[FileFigures, ...]


def tokenizer_info(
    tokenizer: TextTokenizer,
    inputs: Sequence[str],
    text: TextConfig = TextConfig(),  # noqa: B008
) -> Iterator[Progress | TokenizerInfo]:
    """Measures a tokenizer on each input. Yields Progress, last the TokenizerInfo."""
    fast = tokenizer.fast_encoder()
    figures = []
    read = _Read()
    sources = find_inputs(inputs) if inputs else []
    sizes = [source.size for source in sources]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    for source in sources:
        measured = _Measured(tokenizer)
        for document in read_documents([source], text, read.add):
            measured.add(document, fast.encode(document.text))
            yield Progress("measure", read.bytes, total, "bytes")
        figures.append(measured.figures(source.name))
    yield TokenizerInfo(
        tokenizer=tokenizer.files.where,
        hash=tokenizer.hash,
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        special_tokens={tokenizer.token(identity): identity for identity in sorted(tokenizer.special_ids)},
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        unk_id=tokenizer.unk_id,
        engine=fast.engine,
        chat_template=tokenizer.chat_template is not None,
        files=tuple(figures),
    )


class _Measured:
    """Adds up the figures of a file."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.used = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.documents = self.bytes = self.characters = self.words = self.failures = 0
        self.first_failure: str | None = None
        self._failed = False  # the document whose pieces are coming

    def add(self, document: Document, ids: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:
        """Counts a document, or a piece of one."""
        text = document.text
        self.used += np.bincount(ids, minlength=len(self.used))
        self.bytes += len(text.encode("utf-8", "replace"))
        self.characters += len(text)
        self.words += len(text.split())
        if not self._failed and self.tokenizer.decode(ids.tolist()) != text:
            self._failed = True
            self.failures += 1
            self.first_failure = self.first_failure or f"{document.source}:{document.line}"
        if document.final:
            self.documents += 1
            self._failed = False

    def figures(self, name: str) -> FileFigures:
        """The figures of all that was added."""
        tokens = int(self.used.sum())
        plain = np.ones(len(self.used), dtype=bool)
        plain[sorted(self.tokenizer.special_ids)] = False
        unknown = self.tokenizer.unk_id
        return FileFigures(
            file=name,
            documents=self.documents,
            bytes=self.bytes,
            characters=self.characters,
            words=self.words,
            tokens=tokens,
            bytes_per_token=self.bytes / max(1, tokens),
            tokens_per_word=tokens / max(1, self.words),
            unknown_tokens=0 if unknown is None else int(self.used[unknown]),
            unused_tokens=int((self.used[plain] == 0).sum()),
            round_trip_failures=self.failures,
            first_failure=self.first_failure,
        )
