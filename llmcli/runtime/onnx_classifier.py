"""A classifier's graph on onnxruntime, as `llmcli/onnx/classifier.py` builds it. Never imports torch.

Invariant: a text's scores do not depend on the texts beside it, but for rounding: where the products of a run share a
scale, each text runs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.errors import DataError
from llmcli.files.artefacts import GRAPH
from llmcli.files.onnx_header import read_onnx
from llmcli.runtime.onnx_device import check_graph
from llmcli.runtime.onnx_session import CONTEXT, LABELS, PRECISION, ROWS, TARGET, open_graph
from llmcli.runtime.session import Logits

_INPUTS, _OUTPUTS = {"input_ids", "attention_mask"}, ("logits",)
_ATTENDED = 1 << 22  # pairs of tokens that one run weighs for each head


class ClassifierFacts:
    """What the graph's file says, checked before the library sees it."""

    def __init__(self, graph: Path) -> None:
        header = read_onnx(graph)
        numbers = [header.metadata.get(name, "") for name in (CONTEXT, LABELS)]
        sound = all(text.isascii() and text.isdigit() and 0 < int(text) < 2**31 for text in numbers)
        if not sound or set(header.inputs) != _INPUTS or header.outputs != _OUTPUTS:
            raise DataError("is not a classifier as llmcli exports it", where=str(graph))
        self.context, self.labels = (int(text) for text in numbers)
        self.independent = header.metadata.get(ROWS) == "independent"
        portable = header.metadata.get(TARGET) == "portable"
        self.precision = "a portable graph" if portable else header.metadata.get(PRECISION, "of another precision")


class OnnxClassifier:
    """Scores of labels by a graph, on the CPU or on CUDA."""

    def __init__(self, folder: Path, *, threads: int | None = None, device: str = "cpu") -> None:
        facts = ClassifierFacts(folder / GRAPH)
        if device == "cuda":
            check_graph(facts.precision, str(folder))
        self.context, self.labels, self._independent = facts.context, facts.labels, facts.independent
        self._engine = open_graph(folder / GRAPH, threads, device)

    def scores(self, texts: Sequence[npt.NDArray[np.integer[Any]]]) -> Logits:
        """Of texts of at least one id and at most `context`: (texts, labels)."""
        found: list[Logits] = []
        while len(found) < len(texts):
            found.extend(self._run(self._next(texts[len(found) :])))
        return np.stack(found) if found else np.empty((0, self.labels), np.float32)

    def _next(self, texts: Sequence[npt.NDArray[np.integer[Any]]]) -> Sequence[npt.NDArray[np.integer[Any]]]:
        """Those that run together: the first one, and as many behind it as memory is there for."""
        if not self._independent:
            return texts[:1]
        count, longest = 1, len(texts[0])
        for text in texts[1:]:
            longest = max(longest, len(text))
            if (count + 1) * longest**2 > _ATTENDED:
                break
            count += 1
        return texts[:count]

    def _run(self, texts: Sequence[npt.NDArray[np.integer[Any]]]) -> Logits:
        sizes = np.array([len(text) for text in texts])
        mask = (np.arange(sizes.max()) < sizes[:, None]).astype(np.int64)
        ids = np.zeros(mask.shape, np.int64)
        ids[mask.astype(bool)] = np.concatenate(texts)
        found: Logits = self._engine.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return found
