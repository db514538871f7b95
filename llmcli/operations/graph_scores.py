"""Scores of labels, spans and words by an encoder's graph on onnxruntime. Never imports torch.

Invariant: a text is framed as the model in torch has it framed, so the scores are those of the model that was exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.data.framed import FramedEncoding
from llmcli.data.span_windows import Array, SpanWindow
from llmcli.errors import DataError, UsageError
from llmcli.files.artefacts import read_json
from llmcli.models.encoder_config import CALLED
from llmcli.models.labels import labels_of
from llmcli.runtime.encoder_session import EncoderSession
from llmcli.runtime.session import Logits


class GraphEncoderScorer:
    """An exported encoder with a head for labels. Raises DataError for one that has none."""

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        self._session = _opened(folder, "classifier", device, threads)
        said = folder / "config.json"
        values = read_json(said)
        self.context, self.labels = self._session.facts.context, self._session.size_of("logits")
        known = values.get("id2label") is not None
        self.names = labels_of(values, str(said)) if known else [f"LABEL_{index}" for index in range(self.labels)]

    def framed_scores(self, texts: Sequence[FramedEncoding]) -> Logits:
        """Of texts of at most `context` tokens: (texts, labels)."""
        found: Logits = np.stack(self._session.run([t.ids for t in texts], "logits", [t.types for t in texts]))
        return found


class GraphSpanScorer:
    """An exported encoder with a head for spans. Raises DataError for one that has none."""

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        self._session = _opened(folder, "span", device, threads)
        self.longest = self._session.facts.context

    def scores(self, windows: Sequence[SpanWindow]) -> list[tuple[Array, Array]]:
        """Of each window (starts, ends)."""
        ids, types = [window.ids.tolist() for window in windows], [window.types.tolist() for window in windows]
        found = self._session.run_all(ids, ("start_logits", "end_logits"), types)
        return [(each["start_logits"], each["end_logits"]) for each in found]


class GraphMaskScorer:
    """An exported encoder with a masked-language-model head. Raises DataError for one that has none."""

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        self._session = _opened(folder, "masked", device, threads)
        self.longest = self._session.facts.context

    def scores(self, texts: Sequence[npt.NDArray[np.integer[Any]]], places: Sequence[int]) -> Logits:
        """Of the token at a place of each text: (texts, vocabulary)."""
        rows = self._session.run([text.tolist() for text in texts], "logits")
        found: Logits = np.stack([row[place] for row, place in zip(rows, places, strict=True)])
        return found


def _opened(folder: Path, kind: str, device: str, threads: int | None) -> EncoderSession:
    if device in ("cuda", "mps"):
        raise UsageError("exported encoders run on the CPU; give the model that was exported", where="--device")
    session = EncoderSession(folder, threads=threads)
    if session.facts.kind != kind:
        session.close()
        raise DataError(f"has no {CALLED[kind]}", where=str(folder))
    return session
