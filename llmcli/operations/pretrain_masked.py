"""Pretraining by hidden tokens: an encoder, masked windows of a corpus, loss and accuracy of what is hidden.

Invariant: the head is asked of the hidden tokens alone, which are one in seven; a validation hides always the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcli.config import ObjectiveConfig
from llmcli.data.corpus import Corpus
from llmcli.data.tokenizer import TextTokenizer
from llmcli.models.encoder_heads import MaskedLM
from llmcli.operations.pretrain_causal import VALIDATED_TOKENS
from llmcli.operations.pretrain_settings import Settled
from llmcli.operations.pretrain_work import Work
from llmcli.operations.run_folder import WholeModel
from llmcli.training.batches import prefetched
from llmcli.training.loop import Validation
from llmcli.training.losses import IGNORED, found_tokens, head_loss, piece_loss
from llmcli.training.masking import Masked, MaskedWindows, Masking
from llmcli.training.seeding import seeded


def masked_work(
    settled: Settled, model: MaskedLM, corpus: Corpus, tokenizer: TextTokenizer, stopping: Callable[[], bool]
) -> Work:
    """What a run does with an encoder and a corpus. `tokenizer`: framed, see data/frames.py."""
    config, device = settled.config, torch.device(settled.machine.device)
    hidden: Callable[[Tensor], Tensor] = model.hidden
    piece: Callable[..., Any] = piece_loss
    if settled.machine.compile:
        hidden = torch.compile(model.hidden, dynamic=False)
        piece = torch.compile(piece_loss, dynamic=False)
    windows = MaskedWindows(
        corpus.train(),
        tokenizer,
        _masking(settled.objective),
        length=model.config.longest,
        batch_size=config.batch_size // config.grad_accumulation,  # type: ignore[operator]
        seed=config.seed,
    )
    drops = model.config.hidden_dropout > 0 or model.config.attention_dropout > 0

    def loss(inputs: Masked, targets: Tensor, scale: Tensor) -> Tensor:
        if drops:
            seeded(config.seed, inputs.number)
        states = hidden(inputs.ids).flatten(0, 1).index_select(0, inputs.chosen)
        return head_loss(model.transformed(states), model.embedding, targets, scale, piece, model.bias)

    return Work(
        model=model.train(),
        kept=WholeModel(model, tokenizer),
        batches=lambda number: prefetched(windows, number, device),
        loss=loss,
        count_targets=lambda targets: int((targets != IGNORED).sum()),
        count_tokens=lambda inputs: inputs.ids.numel(),
        validate=_validation(model, corpus, windows, config.eval_tokens or 0, stopping),
        validated=bool(corpus.val_tokens),
    )


def _masking(objective: ObjectiveConfig) -> Masking:
    shares = objective.mask_token_share, objective.mask_random_share
    return Masking(objective.mask_fraction, objective.mask_whole_words, *shares)


def _validation(
    model: MaskedLM, corpus: Corpus, windows: MaskedWindows, most: int, stopping: Callable[[], bool]
) -> Callable[[], Validation | None]:
    """Loss in nats per hidden token, and the share of them that is found; None without text, or when asked to stop."""
    shards = [shard for shard in corpus.val() if len(shard) > 1]
    device = model.embedding.device

    def validate() -> Validation | None:
        nats, found, count = 0.0, 0, 0
        batch = max(1, VALIDATED_TOKENS // model.config.longest)
        model.eval()
        try:
            with torch.no_grad():
                for inputs, targets in windows.validation(shards, batch_size=batch, tokens=most) if shards else ():
                    if stopping():
                        return None
                    states = model.hidden(inputs.ids.to(device)).flatten(0, 1)
                    asked = model.transformed(states.index_select(0, inputs.chosen.to(device)))
                    added, hits = found_tokens(asked, model.embedding, model.bias, targets.to(device))
                    nats, found, count = nats + added, found + hits, count + int((targets != IGNORED).sum())
        finally:
            model.train()
        return Validation(nats / count, figures={"accuracy": found / count}) if count else None

    return validate
