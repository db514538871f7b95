"""`evaluate`: how good a model is: on held-out text (loss, perplexity, bits per byte), or on labelled examples.

Labelled examples are the business of `evaluate_labelled`; below stands what is measured on text.

Invariant: every token of every text is scored exactly once. A document begins after the token that ends the one before
it (as in a corpus), which is given and not scored; so the figures do not depend on the order of the documents.

bits_per_byte divides by the bytes of the text itself and so compares between tokenizers; loss and perplexity, which
are per token, do not. Windows over the context overlap: the strided evaluation of Press et al., arXiv:2012.15832, 2.1.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmcli import config as configs
from llmcli.config import EvaluateConfig, LabelledConfig, TextConfig
from llmcli.data.formats import find_inputs
from llmcli.data.readers import Document, read_documents
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import ConfigError, DataError, LlmcliError, UsageError
from llmcli.files.artefacts import Model, find_model, resolve_model
from llmcli.operations.evaluate_figures import Difference, Missed, check_names, compare_text, missed, read_thresholds
from llmcli.operations.evaluate_labelled import TaskReport, evaluate_labelled, fitting_task
from llmcli.operations.records import Progress
from llmcli.runtime.scoring import Window, score_windows, windows
from llmcli.runtime.session import Session

_BLOCKS = 1000  # that the bootstrap draws from, at most; neighbouring windows are joined to so many
_RESAMPLES = 1000
_TAIL = (2.5, 97.5)  # percentiles: a 95 % interval
_POOL = 1 << 18  # ids that are gathered before they are scored

Ids = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class FileFigures:
    """How a model fares on one file."""

    file: str
    documents: int
    tokens: int
    bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class EvaluateReport:
    """Figures over all files. `loss` is in nats per token; intervals are (low, high), 95 %; None: too little text."""

    model: str
    task: str
    metrics: dict[str, float]  # loss, perplexity, bits_per_byte
    intervals: dict[str, tuple[float, float] | None]
    documents: int
    tokens: int
    bytes: int
    unknown_tokens: int  # characters that the tokenizer does not know: what stands there is not predicted
    context: int
    stride: int
    seconds: float
    tokens_per_second: float
    files: tuple[FileFigures, ...]
    other: EvaluateReport | None = None  # of a second model
    differences: dict[str, Difference] | None = None  # its bits per byte less the first one's
    missed: tuple[Missed, ...] = ()  # thresholds


@dataclasses.dataclass(frozen=True, slots=True)
class Fitting:
    """The examples are labelled, and this task would measure a model by their labels."""

    task: str
    layout: str


METRICS = ("loss", "perplexity", "bits_per_byte")


def evaluate(
    model: Model,
    inputs: Sequence[str],
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008  (frozen)
    text: TextConfig = TextConfig(),  # noqa: B008
    *,
    other: Model | None = None,
    columns: str | None = None,
    predictions: str | Path | None = None,
    overwrite: bool = False,
) -> Iterator[Progress | Fitting | EvaluateReport | TaskReport]:
    """Measures a model folder or a run on files. Yields Progress, last an EvaluateReport or (tasks) a TaskReport.

    `other` is a second model, measured on the same files and compared. With a task: `columns` says which field is what;
    `predictions` is a file (JSON Lines) for what the model made of each example.

    Raises DataError for data that cannot be read or are not the task's, ConfigError for settings that do not fit,
    LlmcliError where the model's predictions are not numbers.
    """
    configs.check(config)
    configs.check(text)
    labelled = LabelledConfig(columns=columns, encoding=text.encoding, errors=text.errors)
    if config.task is not None and config.task != "lm":
        models = [model] if other is None else [model, other]
        yield from evaluate_labelled(models, inputs, config, labelled, predictions=predictions, overwrite=overwrite)
        return
    fitting = fitting_task(inputs, labelled, text.text_field) if config.task is None else None
    if fitting is not None:
        task, layout, fields = fitting
        if text.text_field not in fields or predictions is not None:
            kind = "conversations" if task == "chat" else "labelled examples"
            raise UsageError(f"holds {kind} ({layout}); measure with --task {task}", where=inputs[0])
        yield Fitting(task, layout)
    for name, value in (("--predictions", predictions), ("--columns", columns)):
        if value is not None:
            raise UsageError(f"{name} goes with labelled examples and their --task, not with lm")
    thresholds = read_thresholds(config.fail_under)
    check_names(thresholds, METRICS)
    found: list[tuple[EvaluateReport, _Tally]] = []
    for each in [model] if other is None else [model, other]:
        for record in _evaluate_text(each, inputs, config, text):
            if isinstance(record, Progress):
                yield record
            else:
                found.append(record)
    (report, tally), *rest = found
    for second, theirs in rest:
        if theirs.bytes != tally.bytes:
            raise ConfigError("counts tokens, so models of two tokenizers read different texts", where="limit")
        differences = compare_text((tally.nats, tally.tokens), (theirs.nats, theirs.tokens), tally.bytes, config.seed)
        report = dataclasses.replace(report, other=second, differences=differences)
    below = (each for one, _ in found for each in missed(thresholds, one.metrics, one.model))
    yield dataclasses.replace(report, missed=tuple(below))


def second_model(inputs: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """(the second model, or None; the data): the first input is one where it is a model's or a run's folder.

    Raises UsageError where no data are left.
    """
    first, *rest = inputs
    if not Path(first).is_dir():
        return None, tuple(inputs)
    try:
        resolve_model(first)
    except DataError:
        return None, tuple(inputs)
    if not rest:
        raise UsageError("is a model; the data to measure on are missing", where=first)
    return first, tuple(rest)


def _evaluate_text(
    model: Model, inputs: Sequence[str], config: EvaluateConfig, text: TextConfig
) -> Iterator[Progress | tuple[EvaluateReport, _Tally]]:
    from llmcli.runtime.open import open_session

    place = find_model(model)
    sources = find_inputs(inputs)
    tokenizer = load_tokenizer(place.texts)
    session = open_session(place, device=config.device, threads=config.threads, quantize=config.quantize)
    try:
        scorer = _Scorer(session, tokenizer, config)
        began = time.perf_counter()
        sizes = [source.size for source in sources]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        done = 0

        def count(read: int) -> None:
            nonlocal done
            done += read

        figures = []
        for source in sources:
            tally = _Tally()
            for _ in scorer.score(_limited(read_documents([source], text, count), tokenizer, config.limit), tally):
                yield Progress("score", done, total, "bytes")
            figures.append(_file_figures(source.name, tally))
            scorer.total.add(tally)
        yield _report(str(model), config, scorer, figures, time.perf_counter() - began), scorer.total
    finally:
        session.close()


@dataclasses.dataclass(frozen=True, slots=True)
class _Encoded:
    """The ids of a document or of a piece of one, and the bytes that they stand for."""

    ids: Ids
    bytes: int
    final: bool


def _limited(documents: Iterable[Document], tokenizer: TextTokenizer, limit: int | None) -> Iterator[_Encoded]:
    """Documents as ids, at most `limit` of them."""
    fast = tokenizer.fast_encoder()
    left = limit
    for document in documents:
        ids = fast.encode(document.text).astype(np.int64)
        if left is not None and len(ids) >= left:
            reach = tokenizer.encode_in_detail(document.text).offsets[left - 1][1]
            yield _Encoded(ids[:left], len(document.text[:reach].encode()), True)
            return
        left = None if left is None else left - len(ids)
        yield _Encoded(ids, len(document.text.encode()), document.final)


@dataclasses.dataclass
class _Tally:
    """Sums over windows, kept one by one for the bootstrap."""

    nats: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    documents: int = 0
    bytes: int = 0
    unknown: int = 0

    def add(self, other: _Tally) -> None:
        """Adds a file's sums, its windows behind these."""
        self.nats += other.nats
        self.tokens += other.tokens
        self.documents += other.documents
        self.bytes += other.bytes
        self.unknown += other.unknown


class _Scorer:
    """A model that scores the documents of one file after another."""

    def __init__(self, session: Session, tokenizer: TextTokenizer, config: EvaluateConfig) -> None:
        if tokenizer.vocab_size > session.vocab_size:
            raise DataError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {session.vocab_size}")
        self.session, self.tokenizer, self.batch_size = session, tokenizer, config.batch_size
        self.context = session.context
        self.stride = config.stride or max(1, self.context // 2)
        if self.stride > self.context:
            raise ConfigError(f"must be at most the context, {self.context}; is {self.stride}", where="stride")
        self.begin = np.array([] if tokenizer.begin_id is None else [tokenizer.begin_id], np.int64)
        self.total = _Tally()

    def score(self, documents: Iterable[_Encoded], tally: _Tally) -> Iterator[None]:
        """Adds the documents to the tally, a pool of them at a time."""
        sequences: list[Ids] = []
        chosen: list[Window] = []
        pooled = 0
        before = self.begin  # what stands before the ids to come and is not scored again
        for piece in documents:
            tally.documents += piece.final
            tally.bytes += piece.bytes
            tally.unknown += int((piece.ids == self.tokenizer.unk_id).sum()) if self.tokenizer.unk_id is not None else 0
            sequence = np.concatenate([before, piece.ids])
            done = max(1, len(before))
            chosen += windows(len(sequence), self.context, self.stride, len(sequences), done=done)
            sequences.append(sequence)
            pooled += len(piece.ids)
            before = self.begin if piece.final else sequence[-self.context :]
            if pooled >= _POOL:
                self._flush(sequences, chosen, tally)
                sequences, chosen, pooled = [], [], 0
                yield
        self._flush(sequences, chosen, tally)
        yield

    def _flush(self, sequences: list[Ids], chosen: list[Window], tally: _Tally) -> None:
        """Scores the pool; the windows' sums stand in the order of the text."""
        place = {(window.sequence, window.end): index for index, window in enumerate(chosen)}
        nats = [0.0] * len(chosen)
        for scored in score_windows(self.session, sequences, chosen, self.batch_size):
            found = -float(scored.values.sum(dtype=np.float64))
            if not math.isfinite(found):
                raise LlmcliError("the model's predictions are not finite: its weights are broken")
            nats[place[scored.window.sequence, scored.window.end]] = found
        tally.nats += nats
        tally.tokens += [window.scored for window in chosen]


def _metrics(nats: float, tokens: int, size: int) -> dict[str, float]:
    loss = nats / max(tokens, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / max(size, 1),
    }


def _file_figures(name: str, tally: _Tally) -> FileFigures:
    tokens = sum(tally.tokens)
    if not tokens:
        raise DataError("holds no token to predict", where=name)
    return FileFigures(
        name, tally.documents, tokens, tally.bytes, **_metrics(math.fsum(tally.nats), tokens, tally.bytes)
    )


def _report(
    model: str, config: EvaluateConfig, scorer: _Scorer, figures: list[FileFigures], seconds: float
) -> EvaluateReport:
    total = scorer.total
    tokens = sum(total.tokens)
    return EvaluateReport(
        model=model,
        task="lm",
        metrics=_metrics(math.fsum(total.nats), tokens, total.bytes),
        intervals=_intervals(total, config.seed),
        documents=total.documents,
        tokens=tokens,
        bytes=total.bytes,
        unknown_tokens=total.unknown,
        context=scorer.context,
        stride=scorer.stride,
        seconds=seconds,
        tokens_per_second=tokens / max(seconds, 1e-9),
        files=tuple(figures),
    )


def _intervals(tally: _Tally, seed: int) -> dict[str, tuple[float, float] | None]:
    """95 % intervals by the block bootstrap (Kuensch 1989): windows of text are drawn anew, neighbours together.

    It tells how the figure would vary with other text of the same kind; bytes are taken as even over the tokens.
    """
    count = len(tally.nats)
    if count < 2:
        return dict.fromkeys(METRICS)
    edges = np.linspace(0, count, min(count, _BLOCKS) + 1).astype(np.int64)[:-1]
    nats = np.add.reduceat(np.array(tally.nats), edges)
    tokens = np.add.reduceat(np.array(tally.tokens, np.float64), edges)
    drawn = np.random.default_rng(seed).multinomial(len(edges), np.full(len(edges), 1 / len(edges)), _RESAMPLES)
    low, high = (float(value) for value in np.percentile((drawn @ nats) / (drawn @ tokens), _TAIL))
    per_byte = sum(tally.tokens) / max(tally.bytes, 1) / math.log(2)
    return {
        "loss": (low, high),
        "perplexity": (math.exp(min(low, 700)), math.exp(min(high, 700))),
        "bits_per_byte": (low * per_byte, high * per_byte),
    }
