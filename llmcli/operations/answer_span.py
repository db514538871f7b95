"""Answers by an encoder: of the spans of a text the one that answers a question, in windows of many questions at once.

Invariant: a question's answer does not depend on the questions beside it, but for rounding; a span is believed unless
"no answer" scores further above it than the model's fine-tuning found, or `no_answer_threshold` allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from llmcli.config import AnswerConfig
from llmcli.data.span_windows import (
    FEWEST,
    Array,
    Span,
    SpanWindow,
    believed,
    best_span,
    span_windows,
    threshold_of,
)
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import DataError
from llmcli.files.artefacts import ModelPlace, is_onnx, read_json, refuse_adapter

_AHEAD = 64  # questions whose windows are sorted together


@dataclasses.dataclass(frozen=True, slots=True)
class SpanAnswer:
    """What a text answers; None: nothing. Places are in characters of the text."""

    answer: str | None
    start: int | None
    end: int | None
    probability: float  # of the span in its window, or of "no answer" in the window that is least for it
    windows: int
    doubt: float  # how far "no answer" scores above the best span


class SpanScorer(Protocol):
    """What scores the tokens of windows as an answer's first and last one: a model in torch, or a graph."""

    longest: int  # tokens of a window at most

    def scores(self, windows: Sequence[SpanWindow]) -> list[tuple[Array, Array]]:
        """Of each window (starts, ends): (tokens,) each; what stands behind the window's own tokens is not read."""
        ...


class SpanAnswerer:
    """An encoder with a head for spans, and its tokenizer."""

    def __init__(self, place: ModelPlace, config: AnswerConfig = AnswerConfig()) -> None:  # noqa: B008  (frozen)
        refuse_adapter(place)
        self.tokenizer = load_tokenizer(place.texts)
        self.scorer = _opened(place, config)
        self.config = config
        self.threshold = threshold_of(read_json(place.folder / "config.json"))
        if config.no_answer_threshold is not None:
            self.threshold = config.no_answer_threshold

    def answers(self, asked: Iterable[tuple[str, str, str | None]]) -> Iterator[SpanAnswer]:
        """A record for each (text, question, place that errors name), in order."""
        held: list[tuple[str, str, str | None]] = []
        for each in asked:
            held.append(each)
            if len(held) == _AHEAD:
                yield from self._answered(held)
                held = []
        yield from self._answered(held)

    def _answered(self, asked: list[tuple[str, str, str | None]]) -> list[SpanAnswer]:
        longest = self.scorer.longest
        rows = []  # (number of the question, window)
        for number, (text, question, where) in enumerate(asked):
            if not text.strip():
                raise DataError("the text is empty, so nothing can be answered from it", where=where)
            shared = round(self.config.overlap * max(FEWEST, longest - len(self.tokenizer.encode(question))))
            rows += [
                (number, window) for window in span_windows(self.tokenizer, question, text, longest, shared, where)
            ]
        found: list[list[Span]] = [[] for _ in asked]
        scored = self.scorer.scores([window for _, window in rows])
        for (number, window), (starts, ends) in zip(rows, scored, strict=True):
            found[number].append(best_span(window, starts, ends, self.config.max_new_tokens, asked[number][0]))
        return [self._record(text, windows) for (text, _, _), windows in zip(asked, found, strict=True)]

    def _record(self, text: str, windows: list[Span]) -> SpanAnswer:
        best, doubt = believed(windows)
        if best.begin == best.end or (self.threshold is not None and doubt > self.threshold):
            silent = min(span.null_probability for span in windows)
            return SpanAnswer(None, None, None, silent, len(windows), doubt)
        said = text[best.begin : best.end]
        return SpanAnswer(said, best.begin, best.end, best.probability, len(windows), doubt)


def _opened(place: ModelPlace, config: AnswerConfig) -> SpanScorer:
    """The encoder, on the engine that its files ask for."""
    if not is_onnx(place.folder):
        from llmcli.operations.span_scores import TorchSpanScorer

        return TorchSpanScorer(place.folder, device=config.device, threads=config.threads)
    from llmcli.operations.graph_scores import GraphSpanScorer

    return GraphSpanScorer(Path(place.folder), device=config.device, threads=config.threads)
