"""Scores of spans by an encoder in torch: windows side by side, each attending to itself alone.

Invariant: what is given back is what the model computes in its own precision, as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llmcli.data.cores import available_cores
from llmcli.data.span_windows import Array, SpanWindow
from llmcli.models.encoder_folder import load_encoder
from llmcli.models.text_model import most_tokens
from llmcli.operations.task_span import in_windows
from llmcli.runtime.torch_session import working_device
from llmcli.training.packing import in_turn, pack

_TOKENS = 4096  # of a batch


class TorchSpanScorer:
    """An encoder with a head for spans. Raises DataError for one that has none."""

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        device = working_device(device)
        torch.set_num_threads(threads or available_cores())
        self.model = load_encoder(folder, device, torch.bfloat16 if device == "cuda" else torch.float32, kind="span")
        self.longest = most_tokens(self.model.config)

    @torch.inference_mode()
    def scores(self, windows: Sequence[SpanWindow]) -> list[tuple[Array, Array]]:
        """Of each window (starts, ends), filled up with -inf."""
        batches = in_turn(
            range(len(windows)),
            lambda numbers: (
                pack(
                    [windows[at].ids for at in numbers],
                    [np.array([0]) for _ in numbers],
                    types=[windows[at].types for at in numbers],
                ),
                torch.tensor(numbers),
            ),
            length=lambda at: len(windows[at].ids),
            tokens=_TOKENS,
        )
        found: dict[int, tuple[Array, Array]] = {}
        for packed, numbers in batches:
            logits = in_windows(self.model, packed.to(self.model.embedding.device)).cpu().numpy()
            for at, scores in zip(numbers.tolist(), logits, strict=True):
                found[at] = scores[:, 0], scores[:, 1]
        return [found[at] for at in range(len(windows))]
