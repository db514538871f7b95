"""Answers by an encoder: of the spans of a text the one that answers a question, in windows of many questions at once.

Invariant: a question's answer does not depend on the questions beside it, but for rounding; a span is believed unless
"no answer" scores further above it than the model's fine-tuning found, or `no_answer_threshold` allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from llmcli.config import AnswerConfig
from llmcli.data.cores import available_cores
from llmcli.data.span_windows import FEWEST, Span, best_span, span_windows
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import DataError
from llmcli.files.artefacts import ModelPlace, read_json, refuse_adapter
from llmcli.models.encoder_folder import CONFIG, load_encoder
from llmcli.models.text_model import most_tokens
from llmcli.operations.task_span import believed, in_windows, threshold_of
from llmcli.runtime.torch_session import working_device
from llmcli.training.packing import in_turn, pack

_TOKENS = 4096  # of a batch
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


class SpanAnswerer:
    """An encoder with a head for spans, and its tokenizer."""

    def __init__(self, place: ModelPlace, config: AnswerConfig = AnswerConfig()) -> None:  # noqa: B008  (frozen)
        refuse_adapter(place)
        self.tokenizer = load_tokenizer(place.texts)
        device = working_device(config.device)
        torch.set_num_threads(config.threads or available_cores())
        self.model = load_encoder(
            place.folder, device, torch.bfloat16 if device == "cuda" else torch.float32, kind="span"
        )
        self.config = config
        self.threshold = threshold_of(read_json(place.folder / CONFIG))
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

    @torch.inference_mode()
    def _answered(self, asked: list[tuple[str, str, str | None]]) -> list[SpanAnswer]:
        longest = most_tokens(self.model.config)
        rows = []  # (number of the question, window)
        for number, (text, question, where) in enumerate(asked):
            if not text.strip():
                raise DataError("the text is empty, so nothing can be answered from it", where=where)
            shared = round(self.config.overlap * max(FEWEST, longest - len(self.tokenizer.encode(question))))
            rows += [
                (number, window) for window in span_windows(self.tokenizer, question, text, longest, shared, where)
            ]
        found: list[list[Span]] = [[] for _ in asked]
        batches = in_turn(
            range(len(rows)),
            lambda numbers: (
                pack(
                    [rows[at][1].ids for at in numbers],
                    [np.array([0]) for _ in numbers],
                    types=[rows[at][1].types for at in numbers],
                ),
                torch.tensor(numbers),
            ),
            length=lambda at: len(rows[at][1].ids),
            tokens=_TOKENS,
        )
        spans: dict[int, Span] = {}
        for packed, numbers in batches:
            logits = in_windows(self.model, packed.to(self.model.embedding.device)).cpu().numpy()
            for at, scores in zip(numbers.tolist(), logits, strict=True):
                number, window = rows[at]
                text = asked[number][0]
                spans[at] = best_span(window, scores[:, 0], scores[:, 1], self.config.max_new_tokens, text)
        for at in range(len(rows)):
            found[rows[at][0]].append(spans[at])
        return [self._record(text, windows) for (text, _, _), windows in zip(asked, found, strict=True)]

    def _record(self, text: str, windows: list[Span]) -> SpanAnswer:
        best, doubt = believed(windows)
        if best.begin == best.end or (self.threshold is not None and doubt > self.threshold):
            silent = min(span.null_probability for span in windows)
            return SpanAnswer(None, None, None, silent, len(windows), doubt)
        said = text[best.begin : best.end]
        return SpanAnswer(said, best.begin, best.end, best.probability, len(windows), doubt)
