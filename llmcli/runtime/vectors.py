"""Models that make vectors: token ids go in, states of tokens or one vector a text come out; nothing of text in here.

Invariant: what a text gives does not depend on the texts beside it, but for rounding. Encoders and decoders on torch,
and encoders on onnxruntime, stand behind this one interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmcli.files.artefacts import ModelPlace, is_onnx
from llmcli.models.pooling import Pooling

Ids = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]
LAST = -1


class VectorModel(Protocol):
    """Hidden states of texts. C: hidden_size. Layers: 0 is the embedding's output, `layers` (or -1) the last one's."""

    hidden_size: int
    layers: int  # blocks; 0: only the last states can be had
    longest: int  # tokens of a text at most, those around it included
    causal: bool  # a token has seen only those before it
    own: Pooling | None  # what the model's folder says

    def states(self, texts: Sequence[Ids], layers: Sequence[int]) -> list[Floats]:
        """The states of each text's tokens: (layers, tokens, C) each."""
        ...

    def vectors(self, texts: Sequence[Ids], layers: Sequence[int], mode: str, *, normalized: bool) -> Floats:
        """A vector a text and layer, pooled: (texts, layers, C). `normalized`: they may be of length 1 already."""
        ...

    def attentions(self, text: Ids) -> Floats:
        """How much each token of a text looks at each: (layer, head, query, key). UsageError where it cannot be had."""
        ...

    def close(self) -> None:
        """Lets memory go."""
        ...


def open_vectors(
    place: ModelPlace, *, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> VectorModel:
    """Loads a model folder: an encoder or a decoder, of safetensors or, encoders alone, of ONNX.

    `precision`: auto (float32 on the CPU, bfloat16 on CUDA), float32 or bfloat16.
    """
    if is_onnx(place.folder):
        from llmcli.runtime.onnx_vectors import open_onnx

        return open_onnx(place.folder, device=device, threads=threads, precision=precision)
    from llmcli.runtime.torch_vectors import open_torch

    return open_torch(place, device=device, threads=threads, precision=precision)
