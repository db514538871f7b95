"""`quickstart`: the whole way once, by the same operations as the commands: text, tokenizer, corpus, model, words, a
chat about Python's functions, and the same model in int4 on onnxruntime.

Invariant: everything it makes lies in one folder, and each step's figures are in the record that ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmcli.config import (
    ChatConfig,
    CompleteConfig,
    CorpusConfig,
    ExportConfig,
    FinetuneConfig,
    GenerateConfig,
    PretrainConfig,
    SamplingConfig,
    TextConfig,
    TokenizerConfig,
)
from llmcli.data.python_text import function_pairs, python_texts
from llmcli.errors import MissingExtraError
from llmcli.files.atomic import make_folders, moved_aside, refuse_existing, write_file
from llmcli.operations.chat import Answer, open_chat
from llmcli.operations.complete import complete
from llmcli.operations.export import ExportReport, export
from llmcli.operations.finetune import finetune
from llmcli.operations.generate import Generated, generate
from llmcli.operations.plot import draw, read_curves
from llmcli.operations.prepare import PrepareReport, prepare
from llmcli.operations.pretrain import pretrain
from llmcli.operations.records import Progress
from llmcli.operations.tokenizer import TrainReport, train_tokenizer
from llmcli.operations.training_run import Started
from llmcli.training.loop import TrainingEvent

PROMPT = "The "
PREFIX = "The func"
_MADE = ("text.jsonl", "tokenizer", "corpus", "run", "functions.jsonl", "chat", "int4")
_FUNCTIONS = 200  # that are taught: the shortest, since so small a model learns few in seconds
_ASKED = ("posixpath.basename", "os.getenv")  # the first of these that this Python documents, else its first function


@dataclasses.dataclass(frozen=True, slots=True)
class StageDone:
    """A stage that ended: what it made and its figures, in the order to show them."""

    stage: str
    seconds: float
    made: str
    figures: dict[str, Any]


def quickstart(
    inputs: Sequence[str],
    folder: str | Path,
    *,
    seconds: float = 90.0,
    seed: int = 0,
    overwrite: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[Progress | Started | TrainingEvent | StageDone, None, None]:
    """Text to a model that writes, in torch and as int4 ONNX, in the folder `folder`; without inputs Python's own text.

    `seconds` bounds the training. Yields what the operations yield, and a StageDone after each. What stood at `folder`
    stays where the text proves to be none: it goes when the corpus is made.
    """
    place = Path(folder)
    refuse_existing(place, overwrite=overwrite)
    fresh = not place.exists()
    make_folders(place)
    names = {*_MADE, *(path.name for path in place.iterdir())}
    try:
        with moved_aside(place, sorted(names)) as keep:
            for record in _stages(inputs, place, seconds, seed, stopping):
                if isinstance(record, StageDone) and record.stage == "corpus":
                    keep()
                yield record
    except BaseException:
        if fresh:
            with contextlib.suppress(OSError):  # where something of it stays
                place.rmdir()
        raise


def _stages(
    inputs: Sequence[str], place: Path, seconds: float, seed: int, stopping: Callable[[], bool]
) -> Iterator[Progress | Started | TrainingEvent | StageDone]:
    began = time.perf_counter()

    def done(stage: str, made: Path | str, **figures: Any) -> StageDone:
        nonlocal began
        now = time.perf_counter()
        began, taken = now, now - began
        return StageDone(stage, taken, str(made), figures)

    texts = list(inputs)
    if not texts:
        path = place / "text.jsonl"
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in python_texts()]
        write_file(path, "".join(lines))
        texts = [str(path)]
        yield done("text", path, documents=len(lines), bytes=path.stat().st_size)

    settings = TokenizerConfig(vocab_size=2048)
    for step in train_tokenizer(texts, place / "tokenizer", TextConfig(), settings):
        if isinstance(step, TrainReport):
            yield done("tokenizer", place / "tokenizer", vocabulary=step.vocab_size)
        else:
            yield step
    for record in prepare(texts, place / "tokenizer", place / "corpus", TextConfig(), CorpusConfig()):
        if isinstance(record, PrepareReport):
            yield done("corpus", place / "corpus", **_corpus_figures(record))
        else:
            yield record

    run = place / "run"
    config = PretrainConfig(preset="1m", max_seconds=seconds, seed=seed, eval_every=100)
    best = last = None
    parameters = 0
    for event in pretrain(str(place / "corpus"), run, config, stopping=stopping):
        yield event
        if isinstance(event, Started):
            parameters = event.plan.parameters
        elif isinstance(event, TrainingEvent):
            last = event
            best = event if event.best else best
    assert last is not None
    if last.reason == "stopped":
        return
    yield done(
        "model",
        run / "model",
        parameters=parameters,
        steps=last.step,
        tokens=last.tokens,
        tokens_per_second=round(last.tokens / max(last.elapsed_seconds, 1e-9)),
        bits_per_byte=best.bits_per_byte if best else None,
    )
    try:
        draw(read_curves([run]), run / "loss.svg")
        yield done("curve", run / "loss.svg")
    except MissingExtraError:
        pass
    yield from _words(run / "model", seed, done)
    for tuned in _tuned(run / "model", place, seconds, seed, stopping, done):
        yield tuned
        if isinstance(tuned, TrainingEvent) and tuned.reason == "stopped":
            return
    yield from _exported(run / "model", place / "corpus", place / "int4", done)
    yield _sample("int4", place / "int4", seed, done)


def _corpus_figures(report: PrepareReport) -> dict[str, Any]:
    return {
        "documents": report.train_documents + report.val_documents,
        "train_tokens": report.train_tokens,
        "validation_tokens": report.val_tokens,
    }


def _words(model: Path, seed: int, done: Callable[..., StageDone]) -> Iterator[StageDone]:
    """A sample and an autocompletion."""
    yield _sample("sample", model, seed, done)
    found = complete(model, PREFIX, CompleteConfig(count=5))
    yield done("completion", "", prefix=PREFIX, completions=[dataclasses.asdict(item) for item in found.completions])


def _sample(stage: str, model: Path, seed: int, done: Callable[..., StageDone]) -> StageDone:
    for record in generate(model, [PROMPT], GenerateConfig(max_new_tokens=80, seed=seed)):
        if isinstance(record, Generated):
            return done(stage, "", prompt=PROMPT, text=record.text, tokens=record.tokens)
    raise AssertionError("a prompt has a text")


def _tuned(
    model: Path,
    place: Path,
    seconds: float,
    seed: int,
    stopping: Callable[[], bool],
    done: Callable[..., StageDone],
) -> Iterator[Progress | Started | TrainingEvent | StageDone]:
    """The model taught to answer what Python's functions do, and such an answer."""
    data, run = place / "functions.jsonl", place / "chat"
    pairs = sorted(function_pairs(), key=lambda pair: len("".join(pair)))[:_FUNCTIONS]
    asked = {f"What does {signature} do?": sentence for signature, sentence in pairs}
    lines = [{"instruction": question, "output": sentence} for question, sentence in asked.items()]
    write_file(data, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    config = FinetuneConfig(
        epochs=20, max_seconds=max(2.0, seconds / 6), learning_rate=3e-3, val_split=0, seed=seed, on_long="drop"
    )
    last = None
    loss: float | None = None
    for event in finetune("chat", model, data, run, config, stopping=stopping):
        yield event
        if isinstance(event, TrainingEvent):
            last = event
            loss = event.loss if event.event == "step" else loss
    assert last is not None
    if last.reason == "stopped":
        return
    yield done("chat", run / "model", examples=len(lines), steps=last.step, loss=loss)
    question = next((each for name in _ASKED for each in asked if f" {name}(" in each), lines[0]["instruction"])
    chat = open_chat(run / "model", ChatConfig(max_new_tokens=48, seed=seed), SamplingConfig(temperature=0))
    try:
        answer = next(each for each in chat.ask(question) if isinstance(each, Answer))
    finally:
        chat.close()
    yield done("answer", "", question=question, text=answer.content.strip(), tokens=answer.tokens)


def _exported(
    model: Path, corpus: Path, output: Path, done: Callable[..., StageDone]
) -> Iterator[Progress | StageDone]:
    """The int4 folder, checked on the text that was held out."""
    for record in export(model, output, ExportConfig(precision="int4", quantizer="search", calibration=str(corpus))):
        if isinstance(record, ExportReport):
            yield done("export", output, **_export_figures(record))
        else:
            yield record


def _export_figures(report: ExportReport) -> dict[str, Any]:
    from llmcli.operations.export_check import CheckReport

    checks = report.checks
    assert isinstance(checks, CheckReport)
    return {
        "model_bytes": report.source_bytes,
        "int4_bytes": report.size_bytes,
        "bits_per_weight": report.bits_per_weight,
        "perplexity_increase_percent": round(checks.perplexity_increase_percent, 3),
        "tokens_per_second_before": checks.decode_before,
        "tokens_per_second_after": checks.decode_after,
    }
