"""Windows: a question and a text as an encoder reads them to find an answer, the text piece by piece where it is long.

Invariant: every token of the text is in a window, each window has the whole question, and a span that is found is told
in characters of the text, white space around it left out.

Sources: BERT (arXiv:1810.04805), sections 4.2 and 4.3: the score of a span is the sum of its first token's and its last
one's, and "no answer" is the span of the first token of all, [CLS].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError

Array = npt.NDArray[np.floating[Any]]
FEWEST = 8  # tokens of the text in a window
THRESHOLD = "no_answer_threshold"  # in config.json; null: there is always an answer


@dataclasses.dataclass(frozen=True, slots=True)
class SpanWindow:
    """A question and a piece of a text."""

    ids: npt.NDArray[np.int32]
    types: npt.NDArray[np.int32]
    first: int  # the place of the piece's first token
    offsets: npt.NDArray[np.int64]  # (tokens of the piece, 2): the characters of the text that each stands for


def span_windows(
    tokenizer: TextTokenizer, question: str, text: str, longest: int, shared: int, where: str | None = None
) -> list[SpanWindow]:
    """The windows, of at most `longest` tokens; `shared` tokens of the text are in two of them that follow each other.

    At most half of a window is shared. Raises DataError where the question leaves a text no room, or there is no text.
    """
    whole = tokenizer.encode_framed(question, text)
    places = [place for place, owner in enumerate(whole.texts) if owner == 1]
    if not places:
        raise DataError("the text has no token", where=where)
    first, last = places[0], places[-1] + 1
    before, behind = slice(0, first), slice(last, None)
    room = longest - first - (len(whole.ids) - last)
    if room < min(FEWEST, last - first):
        asked = len(whole.ids) - (last - first)
        raise DataError(
            f"the question takes {asked:,} tokens, which leaves the text no room in {longest:,}", where=where
        )
    step = room - min(shared, room // 2)
    offsets = np.array(whole.offsets[first:last], np.int64)
    found = []
    for begin in range(0, max(1, last - first - room + step), step):
        end = min(begin + room, last - first)
        piece = slice(first + begin, first + end)
        ids, types = (
            np.array([*each[before], *each[piece], *each[behind]], np.int32) for each in (whole.ids, whole.types)
        )
        found.append(SpanWindow(ids, types, first, offsets[begin:end]))
    return found


def place_of(window: SpanWindow, begin: int, end: int) -> tuple[int, int] | None:
    """The places of the first and the last token of a span of characters; None where the window has not all of it."""
    begins, ends = window.offsets[:, 0], window.offsets[:, 1]
    if begin < begins[0] or end > ends[-1]:
        return None
    first = int(np.searchsorted(ends, begin, "right"))  # the first token that ends behind the span's begin
    last = int(np.searchsorted(begins, end, "left")) - 1  # the last one that begins before its end
    return (window.first + first, window.first + last) if first <= last else None


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """The best span of a window."""

    begin: int  # characters of the text
    end: int
    score: float
    null: float  # the score of "no answer"
    probability: float  # of the span, among all places of the text and "no answer"
    null_probability: float


def best_span(window: SpanWindow, starts: Array, ends: Array, longest: int, text: str) -> Span:
    """The span of at most `longest` tokens whose first and last token score best. Scores of all the window's tokens."""
    piece = slice(window.first, window.first + len(window.offsets))
    first, last = starts[piece].astype(np.float64), ends[piece].astype(np.float64)
    count = len(first)
    # The best start for each end: within `longest` tokens before it.
    best, chosen = -np.inf, (0, 0)
    for back in range(min(longest, count)):
        scores = first[: count - back] + last[back:]
        place = int(scores.argmax())
        if scores[place] > best:
            best, chosen = float(scores[place]), (place, place + back)
    begin, end = int(window.offsets[chosen[0], 0]), int(window.offsets[chosen[1], 1])
    while begin < end and text[begin].isspace():
        begin += 1
    while end > begin and text[end - 1].isspace():
        end -= 1
    null = float(starts[0]) + float(ends[0])
    total = sum(_log_sum(np.append(part, zero)) for part, zero in ((first, starts[0]), (last, ends[0])))
    return Span(begin, end, best, null, float(np.exp(best - total)), float(np.exp(null - total)))


def _log_sum(values: npt.NDArray[np.float64]) -> float:
    most = values.max()
    return float(most + np.log(np.exp(values - most).sum()))


def best_threshold(doubts: Array, answered: Array, silent: Array) -> float:
    """How far "no answer" may score above the best span for the span to be given, so that the mean score is greatest.

    `doubts`: how far it does, of each question; `answered`, `silent`: what a question scores with the span, and with
    no answer. As evaluate-v2.0.py of SQuAD finds it, but in the middle between two questions.
    """
    order = np.argsort(doubts, kind="stable")
    gains = np.concatenate([[0.0], np.cumsum((answered - silent)[order])])
    sorted_doubts = doubts[order].astype(np.float64)
    gains[1:-1][sorted_doubts[1:] == sorted_doubts[:-1]] = -np.inf  # nothing parts what is doubted alike
    best = int(gains.argmax())
    if best == 0:
        return float(sorted_doubts[0]) - 1.0
    if best == len(order):
        return float(sorted_doubts[-1]) + 1.0
    return float(sorted_doubts[best - 1] + sorted_doubts[best]) / 2


def believed(spans: Sequence[Span]) -> tuple[Span, float]:
    """The best span of a text's windows, and how far "no answer" scores above it, by the window least for that."""
    best = max(spans, key=lambda span: span.score)
    return best, min(span.null for span in spans) - best.score


def threshold_of(values: Mapping[str, Any]) -> float | None:
    """The threshold that a config.json names; None: there is always an answer. Where it names none, 0."""
    found = values.get(THRESHOLD, 0.0)
    return float(found) if isinstance(found, int | float) else None
