"""Vectors on torch: encoders and decoders, texts side by side in one row, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llmcli.data.cores import available_cores
from llmcli.errors import UsageError
from llmcli.files.artefacts import ModelPlace, read_json
from llmcli.models.attentions import attentions
from llmcli.models.decoder import Decoder
from llmcli.models.encoder import Encoder
from llmcli.models.encoder_config import is_encoder
from llmcli.models.encoder_folder import load_encoder
from llmcli.models.pooling import Pooling, pooled, read_pooling
from llmcli.models.segments import segments_of
from llmcli.runtime.torch_session import load_any, working_device
from llmcli.runtime.vectors import LAST, Floats, Ids


class TorchVectors:
    """A `VectorModel` over an Encoder or a Decoder."""

    def __init__(self, model: Encoder | Decoder, own: Pooling | None) -> None:
        self.model, self.own = model, own
        self.hidden_size, self.layers = model.config.hidden_size, model.config.num_hidden_layers
        self.causal = isinstance(model, Decoder)
        self.longest = model.config.longest if isinstance(model, Encoder) else model.config.max_position_embeddings

    @torch.inference_mode()
    def states(self, texts: Sequence[Ids], layers: Sequence[int]) -> list[Floats]:
        """The states of each text's tokens: (layers, tokens, C) each."""
        found = torch.stack([states.float() for states in self._hidden(texts, layers)]).cpu().numpy()
        return np.split(found, np.cumsum([len(text) for text in texts])[:-1], 1)

    @torch.inference_mode()
    def vectors(self, texts: Sequence[Ids], layers: Sequence[int], mode: str, *, normalized: bool) -> Floats:
        """A vector a text and layer, pooled: (texts, layers, C)."""
        lengths = torch.tensor([len(text) for text in texts], device=self.model.embedding.device)
        found = [pooled(states, lengths, mode) for states in self._hidden(texts, layers)]
        vectors: Floats = torch.stack(found, 1).cpu().numpy()
        return vectors

    def attentions(self, text: Ids) -> Floats:
        """How much each token of a text looks at each: (layer, head, query, key)."""
        ids = torch.from_numpy(text.astype(np.int64))[None].to(self.model.embedding.device)
        found: Floats = attentions(self.model, ids).cpu().numpy()
        return found

    def _hidden(self, texts: Sequence[Ids], layers: Sequence[int]) -> list[torch.Tensor]:
        """(N, C) of each layer, the texts one behind the other."""
        device = self.model.embedding.device
        ids = torch.from_numpy(np.concatenate(texts).astype(np.int64))[None].to(device)
        shared = device.type == "cpu" and not self.causal
        segments = segments_of([len(text) for text in texts], shared=shared).to(device)
        if all(layer in (LAST, self.layers) for layer in layers):
            last = self.model.hidden(ids, segments=segments)[0]
            return [last] * len(layers)
        every = self.model.states(ids, segments=segments)
        return [every[layer][0] for layer in layers]

    def close(self) -> None:
        """There is nothing to let go."""


def open_torch(place: ModelPlace, *, device: str, threads: int | None, precision: str) -> TorchVectors:
    """Loads a model folder onto a device; one that does not work is an error, never another."""
    device = working_device(device)
    torch.set_num_threads(threads or available_cores())
    narrow = precision == "bfloat16" or (precision == "auto" and device == "cuda")
    dtype = torch.bfloat16 if narrow else torch.float32
    own = read_pooling(place.texts) or read_pooling(place.folder)
    if not is_encoder(read_json(place.folder / "config.json")):
        return TorchVectors(load_any(place.folder, device, dtype, adapter=place.adapter), own)
    if place.adapter is not None:
        raise UsageError("goes on a decoder, and this is an encoder", where="--adapter")
    return TorchVectors(load_encoder(place.folder, device, dtype), own)
