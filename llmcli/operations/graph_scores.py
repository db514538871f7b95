"""Scores of labels by an encoder's graph on onnxruntime. Never imports torch.

Invariant: a text is framed as the model in torch has it framed, so the scores are those of the model that was exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmcli.data.framed import FramedEncoding
from llmcli.errors import DataError
from llmcli.files.artefacts import read_json
from llmcli.models.labels import labels_of
from llmcli.runtime.encoder_session import EncoderSession
from llmcli.runtime.session import Logits


class GraphEncoderScorer:
    """An exported encoder with a head for labels. Raises DataError for one that has none."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self._session = EncoderSession(folder, threads=threads)
        if self._session.facts.kind != "classifier":
            raise DataError("is an encoder without labels", where=str(folder))
        said = folder / "config.json"
        values = read_json(said)
        self.context, self.labels = self._session.facts.context, self._session.size_of("logits")
        known = values.get("id2label") is not None
        self.names = labels_of(values, str(said)) if known else [f"LABEL_{index}" for index in range(self.labels)]

    def framed_scores(self, texts: Sequence[FramedEncoding]) -> Logits:
        """Of texts of at most `context` tokens: (texts, labels)."""
        found: Logits = np.stack(self._session.run([t.ids for t in texts], "logits", [t.types for t in texts]))
        return found
