"""The gate of `export` for a classifier: the graph's scores and labels beside the model's, on texts.

In float the scores must be equal; quantized weights may change few labels, and rows of unequal length must give what
each gives alone.

Invariant: what is reported was computed by the files that were written, opened anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmcli.config import ExportConfig
from llmcli.errors import CheckError
from llmcli.files.artefacts import ModelPlace, read_json
from llmcli.models.labels import gives_several
from llmcli.operations.classify import Scorer, probabilities
from llmcli.operations.export_check import EQUAL
from llmcli.operations.export_text import Ids, ReferenceText
from llmcli.operations.records import Progress
from llmcli.runtime.session import Logits

_ALLOWED_CHANGES = {"fp32": 1.0, "fp16": 2.0, "int8": 5.0, "int4": 20.0}  # percent of the texts, where none is set
_WORK = 3e12  # floating-point operations that measuring may take in torch
_TOKENS = (2048, 32_768)  # that are measured on: at least, at most
_SIZES = (4, 23, 64, 11, 150, 40)  # tokens of the texts, one after the other
_BATCH = 16


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreReport:
    """What the gate found. Differences are the largest of any score; speeds are in tokens per second."""

    texts: int
    tokens: int
    score_difference: float
    batch_difference: float  # from what the graph gives a text alone
    probability_difference: float  # in the mean
    label_agreement: float  # share of the texts
    label_changes_percent: float
    speed_before: float
    speed_after: float

    @property
    def cost(self) -> float:
        """What quantizing costs, in percent."""
        return self.label_changes_percent


class _Found(NamedTuple):
    scores: Logits
    speed: float


def check_scores(
    source: Path, staged: Path, text: ReferenceText, parameters: int, config: ExportConfig
) -> Iterator[Progress | ScoreReport]:
    """Compares the folder that was written with its model. Yields Progress, last a ScoreReport.

    Raises CheckError for the first thing that does not hold.
    """
    from llmcli.operations.label_scores import TorchClassifier
    from llmcli.runtime.onnx_classifier import OnnxClassifier

    tokens = int(min(max(_WORK / (2 * parameters), _TOKENS[0]), _TOKENS[1]))
    texts = list(_texts(text.measured(tokens)))
    yield Progress("check", 0, 3, "passes")
    before = _scored(TorchClassifier(ModelPlace(source), device="cpu", threads=config.threads), texts, _BATCH)
    yield Progress("check", 1, 3, "passes")
    ours = OnnxClassifier(staged, threads=config.threads)
    after = _scored(ours, texts, _BATCH)
    yield Progress("check", 2, 3, "passes")
    alone = _scored(ours, texts, 1)
    yield Progress("check", 3, 3, "passes")
    for whose, found in (("model", before), ("graph", after)):
        if not np.isfinite(found.scores).all():
            raise CheckError(f"the {whose} gives scores that are not finite (NaN or infinite)")
    spread = max(1.0, float(before.scores.std()))
    difference = float(np.abs(after.scores - before.scores).max())
    in_batches = float(np.abs(after.scores - alone.scores).max())
    if config.precision in EQUAL and difference > EQUAL[config.precision] * spread:
        raise CheckError(
            f"the graph does not give what the model gives: scores differ by {difference:.3g}, "
            f"{EQUAL[config.precision] * spread:.3g} is allowed"
        )
    if in_batches > max(2 * float(np.abs(after.scores - before.scores).mean()), EQUAL["fp32"] * spread):
        raise CheckError(f"the graph contradicts itself: rows of unequal length, scores differ by {in_batches:.3g}")
    several = gives_several(read_json(source / "config.json"))
    first, second = (probabilities(found.scores, several=several) for found in (before, after))
    same = ((first > 0.5) == (second > 0.5)).all(1) if several else first.argmax(1) == second.argmax(1)
    changes = 100 * (1 - float(same.mean()))
    allowed = _ALLOWED_CHANGES[config.precision] if config.max_label_changes is None else config.max_label_changes
    if changes > allowed:
        raise CheckError(
            f"{changes:.2f} % of the texts get another label than by float32, {allowed:g} % is allowed "
            "(--max-label-changes)"
        )
    yield ScoreReport(
        texts=len(texts),
        tokens=sum(map(len, texts)),
        score_difference=difference,
        batch_difference=in_batches,
        probability_difference=float(np.abs(first - second).mean()),
        label_agreement=float(same.mean()),
        label_changes_percent=changes,
        speed_before=round(before.speed, 1),
        speed_after=round(after.speed, 1),
    )


def _texts(windows: Sequence[Ids]) -> Iterator[Ids]:
    """The windows in pieces of unequal length."""
    sizes = itertools.cycle(_SIZES)
    for window in windows:
        begin = 0
        while begin < len(window):
            size = next(sizes)
            yield window[begin : begin + size]
            begin += size


def _scored(scorer: Scorer, texts: Sequence[npt.NDArray[np.integer[Any]]], batch: int) -> _Found:
    """Scores of the texts in their order, and tokens per second."""
    began = time.perf_counter()
    found = [scorer.scores(texts[begin : begin + batch]) for begin in range(0, len(texts), batch)]
    return _Found(np.concatenate(found), sum(map(len, texts)) / (time.perf_counter() - began))
