"""Scores of the tokens for a mask by an encoder in torch: texts side by side, each attending to itself alone.

Invariant: what is given back is what the model computes in its own precision, as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmcli.data.cores import available_cores
from llmcli.models.encoder_folder import load_encoder
from llmcli.runtime.session import Logits
from llmcli.runtime.torch_session import working_device
from llmcli.training.packing import pack


class TorchMaskScorer:
    """An encoder with a masked-language-model head. Raises DataError for one that has none."""

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        device = working_device(device)
        torch.set_num_threads(threads or available_cores())
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = load_encoder(folder, device, dtype, kind="masked")
        self.longest = self.model.config.longest

    @torch.inference_mode()
    def scores(self, texts: Sequence[npt.NDArray[np.integer[Any]]], places: Sequence[int]) -> Logits:
        """Of the token at a place of each text: (texts, vocabulary)."""
        packed = pack(texts, [np.array([place]) for place in places]).to(self.model.embedding.device)
        states = self.model.hidden(packed.ids, segments=packed.segments)[0].index_select(0, packed.chosen)
        found: Logits = self.model.logits(states).float().cpu().numpy()
        return found
