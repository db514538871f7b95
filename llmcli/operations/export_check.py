"""The gate of `export`: the graph beside the model in torch, on real text.

Every way of running is compared: a prompt at once, token by token with the cache, rows of unequal length. In float the
logits must be equal; quantized weights must not be worse in one way than in another, and the quality is measured:
perplexity, KL divergence and how often the most probable token is the same.

Invariant: what is reported was computed by the files that were written, opened anew.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llmcli.config import ExportConfig
from llmcli.errors import CheckError
from llmcli.operations.export_text import Ids, ReferenceText
from llmcli.operations.records import Progress
from llmcli.runtime.session import Logits, Session

EQUAL = {"fp32": 1e-3, "fp16": 5e-2}  # of logits, where they spread by 1 or less; by more: times that
_ALLOWED_INCREASE = {"fp32": 0.1, "fp16": 0.5, "int8": 3.0, "int4": 20.0}  # percent of perplexity, where none is set
_WORK = 3e12  # floating-point operations that measuring may take in torch
_TOKENS = (1024, 16_384)  # that are measured on: at least, at most
_DECODED = 32
_PIECE = 1 << 22  # logits at once
_SHORT = 1.0  # seconds of a run that is measured again


@dataclasses.dataclass(frozen=True, slots=True)
class CheckReport:
    """What the gate found. Differences are the largest of any logit; speeds are in tokens per second."""

    tokens: int  # that perplexity, divergence and agreement were measured on
    prefill_difference: float
    cached_difference: float
    batch_difference: float
    greedy_tokens: int
    greedy_equal: int
    perplexity_before: float
    perplexity_after: float
    perplexity_increase_percent: float
    kl_divergence: float  # nats per token, of the graph's predictions from the model's
    top1_agreement: float
    prefill_before: float
    prefill_after: float
    decode_before: float
    decode_after: float

    @property
    def cost(self) -> float:
        """What quantizing costs, in percent."""
        return self.perplexity_increase_percent


def check_export(
    source: Path, staged: Path, text: ReferenceText, parameters: int, config: ExportConfig
) -> Iterator[Progress | CheckReport]:
    """Compares the folder that was written with its model. Yields Progress, last a CheckReport.

    Raises CheckError for the first thing that does not hold.
    """
    from llmcli.runtime.onnx_session import OnnxSession
    from llmcli.runtime.torch_session import open_session

    theirs: Session = open_session(source, device="cpu", threads=config.threads)
    ours: Session = OnnxSession(staged, threads=config.threads, prefill=False)
    whole: Session = OnnxSession(staged, threads=config.threads) if config.prefill in ("float", "int8") else ours
    try:
        windows = text.measured(int(min(max(_WORK / (2 * parameters), _TOKENS[0]), _TOKENS[1])))
        tally = _Tally()
        for number, window in enumerate(windows):
            for before, after, targets in _side_by_side(theirs, ours, window):
                tally.add(before, after, targets)
            yield Progress("check", number + 1, len(windows), "windows")
        _expect_equal("a prompt at once", tally.largest, tally, config.precision)
        cached = _cached(theirs, ours, windows[0])
        _expect_alike("decoding with the cache", cached, tally, config.precision)
        batch = _batch(theirs, ours, windows)
        _expect_alike("rows of unequal length", batch, tally, config.precision)
        if whole is not ours:
            _expect_alike("a prompt by the second graph", _prompts(theirs, whole, windows), tally, config.precision)
        equal = _greedy(theirs, ours, windows[-1], tally, config.precision)
        increase = _quality(tally, config)
        yield Progress("speed", 0, 1, "runs")
        slow, fast = _speeds(theirs, windows[0]), _speeds(whole, windows[0])
        yield CheckReport(
            tokens=tally.tokens,
            prefill_difference=tally.largest,
            cached_difference=cached.largest,
            batch_difference=batch.largest,
            greedy_tokens=equal[1],
            greedy_equal=equal[0],
            perplexity_before=math.exp(tally.nats_before / tally.tokens),
            perplexity_after=math.exp(tally.nats_after / tally.tokens),
            perplexity_increase_percent=increase,
            kl_divergence=tally.divergence / tally.tokens,
            top1_agreement=tally.agreed / tally.tokens,
            prefill_before=round(slow[0], 1),
            prefill_after=round(fast[0], 1),
            decode_before=round(slow[1], 1),
            decode_after=round(fast[1], 1),
        )
    finally:
        for session in (theirs, ours, whole):
            session.close()


class _Tally:
    """Sums over positions: logits of the model (before) and of the graph (after)."""

    def __init__(self) -> None:
        self.tokens = self.agreed = 0
        self.nats_before = self.nats_after = self.divergence = 0.0
        self.largest = 0.0
        self._logits = self._squares = self._differences = 0.0

    def add(self, before: Logits, after: Logits, targets: Ids | None = None) -> None:
        """Takes logits (n, V) of the same positions, and the tokens that follow them."""
        # Both: quantizing activations turns NaN into numbers.
        for whose, logits in (("model", before), ("graph", after)):
            if not np.isfinite(logits).all():
                raise CheckError(f"the {whose} gives logits that are not finite (NaN or infinite)")
        difference = after - before
        self.largest = max(self.largest, float(np.abs(difference).max()))
        self._logits += before.size
        self._squares += float(((before - before.mean(-1, keepdims=True)) ** 2).sum(dtype=np.float64))
        self._differences += float((difference**2).sum(dtype=np.float64))
        if targets is None:
            return
        first, second = _log_softmax(before), _log_softmax(after)
        rows = np.arange(len(targets))
        self.tokens += len(targets)
        self.nats_before -= float(first[rows, targets].sum(dtype=np.float64))
        self.nats_after -= float(second[rows, targets].sum(dtype=np.float64))
        self.divergence += float((np.exp(first) * (first - second)).sum(dtype=np.float64))
        self.agreed += int((before.argmax(-1) == after.argmax(-1)).sum())

    @property
    def spread(self) -> float:
        """Standard deviation of the model's logits."""
        return math.sqrt(self._squares / max(self._logits, 1))

    @property
    def error(self) -> float:
        """Root of the mean squared difference."""
        return math.sqrt(self._differences / max(self._logits, 1))


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(-1, keepdims=True)
    found: Logits = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


# ----------------------------------------------------------------------------------------------------------------
# Ways of running


def _start(session: Session, *prompts: Ids) -> Logits:
    return session.start([prompt.tolist() for prompt in prompts])


def _side_by_side(theirs: Session, ours: Session, window: Ids) -> Iterator[tuple[Logits, Logits, Ids]]:
    """Logits of a window's positions but the last, in pieces, by both, and the tokens that follow."""
    yield _start(theirs, window[:1]), _start(ours, window[:1]), window[1:2]
    step = max(1, _PIECE // ours.vocab_size)
    for begin in range(1, len(window) - 1, step):
        end = min(begin + step, len(window) - 1)
        fed = window[None, begin:end]
        yield theirs.feed(fed, end - begin)[0], ours.feed(fed, end - begin)[0], window[begin + 1 : end + 1]


def _cached(theirs: Session, ours: Session, window: Ids) -> _Tally:
    """Token by token, after a prompt."""
    tally, half = _Tally(), max(1, len(window) // 2)
    tally.add(_start(theirs, window[:half]), _start(ours, window[:half]))
    for identity in window[half : half + _DECODED]:
        fed = np.array([[identity]], np.int64)
        tally.add(theirs.feed(fed)[:, -1], ours.feed(fed)[:, -1])
    return tally


def _prompts(theirs: Session, ours: Session, windows: list[Ids]) -> _Tally:
    """Prompts at once, and a token after each."""
    tally = _Tally()
    for window in windows[:4]:
        tally.add(_start(theirs, window[:-1]), _start(ours, window[:-1]))
        tally.add(theirs.feed(window[None, -1:])[0], ours.feed(window[None, -1:])[0])
    return tally


def _batch(theirs: Session, ours: Session, windows: list[Ids]) -> _Tally:
    """Rows of unequal length, token by token; the middle one ends early."""
    tally = _Tally()
    rows = [windows[place % len(windows)] for place in range(3)]
    lengths = [max(1, len(row) // share) for row, share in zip(rows, (2, 7, 3), strict=True)]
    prompts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    tally.add(_start(theirs, *prompts), _start(ours, *prompts))
    kept = [0, 1, 2]
    for step in range(8):
        if step == 4:
            kept = [0, 2]
            theirs.select(kept)
            ours.select(kept)
        places = [min(lengths[row] + step, len(rows[row]) - 1) for row in kept]
        fed = np.array([[rows[row][place]] for row, place in zip(kept, places, strict=True)], np.int64)
        if max(theirs.lengths) < theirs.context:
            tally.add(theirs.feed(fed)[:, -1], ours.feed(fed)[:, -1])
    return tally


def _greedy(theirs: Session, ours: Session, window: Ids, tally: _Tally, precision: str) -> tuple[int, int]:
    """(how many of the model's greedy tokens are the graph's, of how many)."""
    prompt = window[: max(1, min(len(window) // 2, 64))]
    before, after = _start(theirs, prompt)[0], _start(ours, prompt)[0]
    count = min(_DECODED, theirs.context - len(prompt))
    equal = 0
    for _ in range(count):
        chosen, other = int(before.argmax()), int(after.argmax())
        equal += chosen == other
        close = 2 * _tolerance(precision, tally.spread) if precision in EQUAL else math.inf
        if before[chosen] - before[other] > close:
            raise CheckError(f"greedy decoding gives the token {other} where the model gives {chosen}")
        fed = np.array([[chosen]], np.int64)
        before, after = theirs.feed(fed)[0, -1], ours.feed(fed)[0, -1]
    return equal, count


def _speeds(session: Session, window: Ids) -> tuple[float, float]:
    """Tokens per second of a prompt at once and of decoding after it; the best of three runs, where they are short."""
    prompt = window[: max(1, len(window) - _DECODED)]
    count = min(_DECODED // 2, session.context - len(prompt))
    fed = np.array([[window[-1]]], np.int64)
    best = [0.0, 0.0]
    for _ in range(3):
        began = time.perf_counter()
        _start(session, prompt)
        middle = time.perf_counter()
        for _ in range(count):
            session.feed(fed)
        ended = time.perf_counter()
        best = [max(best[0], len(prompt) / (middle - began)), max(best[1], count / (ended - middle))]
        if ended - began > _SHORT:
            break
    return best[0], best[1]


# ----------------------------------------------------------------------------------------------------------------
# What must hold


def _tolerance(precision: str, spread: float) -> float:
    return EQUAL[precision] * max(1.0, spread)


def _expect_equal(what: str, largest: float, tally: _Tally, precision: str) -> None:
    if precision in EQUAL and largest > _tolerance(precision, tally.spread):
        allowed = _tolerance(precision, tally.spread)
        raise CheckError(
            f"the graph does not give what the model gives: {what}, logits differ by {largest:.3g}, "
            f"{allowed:.3g} is allowed"
        )


def _expect_alike(what: str, found: _Tally, tally: _Tally, precision: str) -> None:
    """Equal in float; quantized, no further from the model than a prompt at once is."""
    _expect_equal(what, found.largest, tally, precision)
    allowed = 2 * tally.error + 0.05 * tally.spread
    if found.error > allowed:
        raise CheckError(
            f"the graph contradicts itself: {what}, logits differ from the model's by {found.error:.3g} on average, "
            f"by {tally.error:.3g} for a prompt at once"
        )


def _quality(tally: _Tally, config: ExportConfig) -> float:
    """Percent of perplexity above the model's. Raises CheckError where that is more than is allowed."""
    increase = 100 * math.expm1((tally.nats_after - tally.nats_before) / tally.tokens)
    limit = config.max_perplexity_increase
    allowed = _ALLOWED_INCREASE[config.precision] if limit is None else limit
    if increase > allowed:
        raise CheckError(
            f"perplexity is {increase:.2f} % above float32's, {allowed:g} % is allowed (--max-perplexity-increase)"
        )
    return increase
