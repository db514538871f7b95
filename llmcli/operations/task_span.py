"""Fine-tuning an encoder on questions about texts: the first and the last token of the answer, or [CLS] for none.

Invariant: a row is a window of a text with the whole question, and all windows of a question are trained on or all held
out; what is validated is the question's answer, by all its windows together, as `answer` gives it.

A window without the answer is learnt as one that gives none (arXiv:1810.04805, section 4.3). How sure "no answer" must
be is found on what is held out, for the best F1, and kept in config.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmcli.config_finetune import AnswerTuneConfig
from llmcli.data.examples import AnswerExample, Example
from llmcli.data.span_windows import (
    THRESHOLD,
    Span,
    SpanWindow,
    believed,
    best_span,
    best_threshold,
    place_of,
    span_windows,
)
from llmcli.data.tokenizer import TextTokenizer
from llmcli.models.encoder import Encoder
from llmcli.models.encoder_heads import SpanReader, with_head
from llmcli.models.text_model import TextModel
from llmcli.operations.evaluate_answer import answer_scores
from llmcli.operations.task_prompted import of_another_task
from llmcli.operations.tasks import Row
from llmcli.training.loop import Validation
from llmcli.training.packing import Packed, pack


@dataclasses.dataclass(frozen=True, slots=True)
class WindowRow(Row):
    """A window; `wanted` are the places of the answer's first and last token."""

    window: SpanWindow
    example: AnswerExample
    number: int  # of the row, by which a validation knows it again

    @property
    def together(self) -> bytes:
        """What is held out together: the question with its text."""
        return f"{self.example.question}\0{self.example.context}".encode("utf-8", "surrogatepass")


class SpanTask:
    """SQuAD's questions, on an encoder."""

    name = "answer"
    keeps: Sequence[str] = ("span",)

    def __init__(self, config: AnswerTuneConfig = AnswerTuneConfig()) -> None:  # noqa: B008  (frozen)
        self.config = config
        self._longest = 0
        self._count = 0
        self._rows: dict[int, WindowRow] = {}
        self._silent = False  # whether any question has no answer
        self._facts: dict[str, Any] = {THRESHOLD: None}

    def tokenizer(self, base: TextTokenizer) -> TextTokenizer:
        """The model's own."""
        return base

    def longest(self, context: int) -> int:
        """All tokens are read; windows are made to that length."""
        self._longest = context
        return context

    def encoded(self, examples: Iterable[Example], tokenizer: TextTokenizer) -> Iterator[Row]:
        """The windows of each question."""
        for example in examples:
            if not isinstance(example, AnswerExample):
                raise of_another_task(example, "question about a text")
            shared = self.config.doc_stride
            found = span_windows(
                tokenizer, example.question, example.context, self._longest, shared, where=example.where
            )
            for window in found:
                place = None
                if example.answers:
                    text, start = example.answers[0]
                    place = place_of(window, start, start + len(text))
                yield WindowRow(window.ids, place or (0, 0), example.where, window, example, self._count)
                self._count += 1

    def cut(self, row: Row, length: int) -> Row | None:
        """Nothing is too long: a text is read in windows."""
        return None

    def classes(self, row: Row) -> Sequence[str]:
        """None: any question can be measured."""
        return ()

    def settle(self, train: Sequence[Row], validation: Sequence[Row]) -> None:
        """Keeps what validation must know again."""
        self._rows = {row.number: row for row in validation if isinstance(row, WindowRow)}
        every = (row.example for row in [*train, *validation] if isinstance(row, WindowRow))
        self._silent = any(not example.answers for example in every)
        self._facts[THRESHOLD] = 0.0 if self._silent else None

    def model(self, base: TextModel, generator: torch.Generator) -> TextModel:
        """The base under a head for spans: its own where it has one."""
        assert isinstance(base, Encoder)
        return with_head(base, "span", generator)

    def facts(self, tokenizer: TextTokenizer) -> dict[str, Any]:
        """The threshold, as the last validation found it."""
        return self._facts

    def ends(self, tokenizer: TextTokenizer) -> Sequence[int]:
        """None: it generates nothing."""
        return ()

    def batch(self, rows: Sequence[Row]) -> tuple[Packed, Tensor]:
        """Targets (R, 3): the places of the answer's first and last token, and the row's number."""
        windows = [row for row in rows if isinstance(row, WindowRow)]
        packed = pack(
            [row.ids for row in windows],
            [np.array([0]) for _ in windows],
            types=[row.window.types for row in windows],
        )
        return packed, torch.tensor([[*row.wanted, row.number] for row in windows])

    def loss(self, model: TextModel, packed: Packed, targets: Tensor, scale: Tensor) -> Tensor:
        """The mean of both places' cross-entropy among the window's tokens."""
        return self._summed(in_windows(model, packed), targets) * scale

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), targets[:, :2].flatten(), reduction="sum") / 2

    def validate(self, model: TextModel, batches: Iterable[tuple[Packed, Tensor]]) -> Validation:
        """The loss of a window; exact match and F1 of the questions at the best threshold, which is kept."""
        loss, count = 0.0, 0
        found: dict[int, list[tuple[WindowRow, Span]]] = {}
        for packed, targets in batches:
            logits = in_windows(model, packed)
            loss += float(self._summed(logits, targets))
            count += len(targets)
            for number, scores in zip(targets[:, 2].tolist(), logits.float().cpu().numpy(), strict=True):
                row = self._rows[number]
                text = row.example.context
                span = best_span(row.window, scores[:, 0], scores[:, 1], self.config.max_answer_length, text)
                found.setdefault(id(row.example), []).append((row, span))
        doubts, scores_said, scores_silent = [], [], []
        for windows in found.values():
            example = windows[0][0].example
            span, doubt = believed([span for _, span in windows])
            right = [text for text, _ in example.answers]
            doubts.append(doubt)
            scores_said.append(answer_scores(right, example.context[span.begin : span.end]))
            scores_silent.append(answer_scores(right, ""))
        said, silent = np.array(scores_said), np.array(scores_silent)  # (questions, 2)
        figures = {"exact_match": float(said[:, 0].mean()), "f1": float(said[:, 1].mean())}
        if self._silent:
            threshold = best_threshold(np.array(doubts), said[:, 1], silent[:, 1])
            given = np.where((np.array(doubts) <= threshold)[:, None], said, silent).mean(0)
            figures = {"exact_match": float(given[0]), "f1": float(given[1]), THRESHOLD: threshold}
            self._facts[THRESHOLD] = threshold
        return Validation(loss / count, None, figures, criterion=-figures["f1"])


def in_windows(model: TextModel, packed: Packed) -> Tensor:
    """The scores of each window's tokens as first and as last one, filled up with -inf: (windows, tokens, 2)."""
    assert isinstance(model, SpanReader)
    states = model.hidden(packed.ids, segments=packed.segments, types=packed.types)[0]
    scores = model.spans(states[: packed.tokens]).float()  # (tokens, 2)
    lengths = packed.lengths
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    whole = scores.new_full((len(lengths), int(lengths.max()), 2), -torch.inf)
    return whole.index_put((rows, packed.segments.positions[0, : packed.tokens]), scores)
