"""A decoder with more tokens than it was trained with: rows for tokens that were added to its tokenizer.

Invariant: the rows that were there keep their values, so what the model says of its old tokens changes only by the new
ones' share; a new row is the mean of the others, which makes a new token as likely as they are on average.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from llmcli.models.decoder import Decoder, GPT2Model


def grown(model: Decoder, tokens: int) -> bool:
    """Grows embedding and head to `tokens` rows, in place; whether it was needed.

    A model whose matrix has rows to spare (many are filled up to a round number) only has those rows set anew where
    they are used; that is the caller's wish, see `refreshed`.
    """
    if tokens <= model.config.vocab_size:
        return False
    body = model.body
    layer = body.wte if isinstance(body, GPT2Model) else body.embed_tokens
    layer.weight = nn.Parameter(_longer(layer.weight, tokens))
    layer.num_embeddings = tokens
    if not model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(_longer(model.lm_head.weight, tokens))
        model.lm_head.out_features = tokens
    model.config = dataclasses.replace(model.config, vocab_size=tokens)
    return True


@torch.no_grad()
def refreshed(model: Decoder, first: int, last: int) -> None:
    """Sets the rows from `first` up to `last`, which no token had so far, to the mean of those before them."""
    for matrix in {id(each): each for each in (model.embedding, model.head)}.values():
        matrix[first:last] = matrix[:first].float().mean(0).to(matrix.dtype)


def _longer(matrix: Tensor, rows: int) -> Tensor:
    mean = matrix.detach().float().mean(0, keepdim=True).to(matrix.dtype)
    return torch.cat((matrix.detach(), mean.expand(rows - matrix.size(0), -1)))
