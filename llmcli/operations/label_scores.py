"""Scores of labels by a classifier in torch: texts side by side, each attending to itself alone.

Invariant: what is given back is what the model computes in its own precision, as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmcli.data.cores import available_cores
from llmcli.files.artefacts import ModelPlace
from llmcli.models.classifier import Classifier
from llmcli.runtime.session import Logits
from llmcli.runtime.torch_session import load_any, working_device
from llmcli.training.packing import pack


class TorchClassifier:
    """A classifier of a model folder, perhaps with an adapter. Raises DataError for a model that is none."""

    def __init__(self, place: ModelPlace, *, device: str = "auto", threads: int | None = None) -> None:
        device = working_device(device)
        torch.set_num_threads(threads or available_cores())
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        loaded = load_any(place.folder, device, dtype, adapter=place.adapter, kind="classifier")
        assert isinstance(loaded, Classifier)
        self.model = loaded
        self.context, self.labels = loaded.config.max_position_embeddings, loaded.score.out_features

    @torch.inference_mode()
    def scores(self, texts: Sequence[npt.NDArray[np.integer[Any]]]) -> Logits:
        """Of texts of at least one id and at most `context`: (texts, labels)."""
        packed = pack(texts, [np.array([len(ids) - 1]) for ids in texts]).to(self.model.embedding.device)
        found: Logits = self.model.scores(packed.ids, packed.segments, packed.chosen).float().cpu().numpy()
        return found
