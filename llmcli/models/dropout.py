"""Dropout in training: a share of the embeddings and of each block's outputs is left out (arXiv:1207.0580).

Invariant: nothing is dropped outside training, and no weight, name or config.json changes. What is dropped is drawn
from torch's own random state; who trains sets that for each batch (training/seeding.py).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from llmcli.models.decoder import Decoder
from llmcli.models.encoder import Encoder, Layer
from llmcli.models.text_model import TextModel

_WRITERS = ("o_proj", "down_proj", "c_proj")  # the maps whose outputs a decoder's blocks add to the residual


def set_dropout(model: TextModel, rate: float) -> None:
    """Has a model leave out that share while it trains. Call it once; a decoder has no dropout of its own."""
    if isinstance(model, Encoder):
        model.body.embeddings.dropout = rate
        for layer in model.layers:
            assert isinstance(layer, Layer)
            layer.dropout = rate
    elif rate:
        assert isinstance(model, Decoder)

        def after(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            return F.dropout(output, rate, module.training)

        def before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return F.dropout(given[0], rate, module.training), *given[1:]

        model.layers[0].register_forward_pre_hook(before)
        for name, module in model.layers.named_modules():
            if name.endswith(_WRITERS):
                module.register_forward_hook(after)


def dropout_of(model: TextModel) -> float:
    """What a model's config.json says of it: 0 of a decoder."""
    return model.config.hidden_dropout if isinstance(model, Encoder) else 0.0
