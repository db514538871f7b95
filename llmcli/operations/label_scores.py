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
from llmcli.data.framed import FramedEncoding
from llmcli.files.artefacts import ModelPlace, refuse_adapter
from llmcli.models.classifier import Classifier
from llmcli.models.encoder_folder import encoder_labels, load_encoder
from llmcli.operations.task_encoder_classify import pack_framed
from llmcli.runtime.session import Logits
from llmcli.runtime.torch_session import load_any, working_device
from llmcli.training.packing import pack


class EncoderScorer:
    """An encoder with a head for labels. Raises DataError for one that has none."""

    def __init__(self, place: ModelPlace, *, device: str = "auto", threads: int | None = None) -> None:
        refuse_adapter(place)
        device = working_device(device)
        torch.set_num_threads(threads or available_cores())
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = load_encoder(place.folder, device, dtype, kind="classifier")
        self.context, self.labels = self.model.config.longest, self.model.labels
        self.names = encoder_labels(place.folder)

    @torch.inference_mode()
    def framed_scores(self, texts: Sequence[FramedEncoding]) -> Logits:
        """Of texts of at most `context` tokens: (texts, labels)."""
        packed = pack_framed(texts).to(self.model.embedding.device)
        scores = self.model.scores(packed.ids, packed.segments, packed.chosen, packed.types)
        found: Logits = scores.float().cpu().numpy()
        return found


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
