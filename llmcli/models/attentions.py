"""Reading out attention: how much each token of a text looks at each, in every layer and head.

Invariant: the probabilities are those that the model's hidden states come from, equal to transformers'
`output_attentions` within 1e-5 in float32. The model itself never makes them where a fused kernel does without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcli.models.cache import causal_window
from llmcli.models.decoder import Attention, Decoder, GPT2Attention
from llmcli.models.encoder import Encoder
from llmcli.models.ops import split_heads


@torch.no_grad()
def attentions(model: Encoder | Decoder, ids: Tensor, types: Tensor | None = None) -> Tensor:
    """Attention probabilities of one text, float32: ids (1, T) -> (layer, head, query, key).

    `types` (1, T): which of two texts a token is of, for an encoder that tells them apart.
    """
    if isinstance(model, Encoder):
        return _of_encoder(model, ids, types)
    return _of_decoder(model, ids)


def _of_encoder(model: Encoder, ids: Tensor, types: Tensor | None) -> Tensor:
    found: list[Tensor] = []

    def attend(parts: Tensor) -> Tensor:  # (1, T, 3 C) -> (1, T, C)
        query, key, value = split_heads(parts, model.config.num_attention_heads)
        found.append(_probabilities(query, key, None))
        return (found[-1].to(value.dtype) @ value).transpose(1, 2).flatten(2)

    for _ in model.steps(ids, attend, types=types):
        pass
    return torch.cat(found)


def _of_decoder(model: Decoder, ids: Tensor) -> Tensor:
    found: list[Tensor] = []
    positions = torch.arange(ids.size(1), device=ids.device)
    seen = causal_window(positions[None], positions, model.config.sliding_window)

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, Attention):
            query, key, _ = module.heads(*given[:3])
        else:
            assert isinstance(module, GPT2Attention)
            query, key, _ = module.heads(given[0])
        found.append(_probabilities(query, key.repeat_interleave(query.size(1) // key.size(1), 1), seen))

    watched = [each for each in model.modules() if isinstance(each, Attention | GPT2Attention)]
    hooks = [each.register_forward_pre_hook(look) for each in watched]
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(found)


def _probabilities(query: Tensor, key: Tensor, seen: Tensor | None) -> Tensor:  # (1, H, T, D) -> (1, H, T, T)
    scores = (query @ key.transpose(-1, -2)).float() * query.size(-1) ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1)
