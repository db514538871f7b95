"""Pretraining by the next token: a decoder, windows of a corpus, loss in nats and in bits per byte."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcli.data.corpus import Corpus
from llmcli.data.tokenizer import TextTokenizer
from llmcli.models.decoder import Decoder
from llmcli.operations.pretrain_settings import Settled
from llmcli.operations.pretrain_work import Work
from llmcli.operations.run_folder import WholeModel
from llmcli.training.batches import TokenWindows, prefetched, validation_windows
from llmcli.training.loop import Validation
from llmcli.training.losses import head_loss, piece_loss, summed_loss

VALIDATED_TOKENS = 16_384  # of a batch in validation


def causal_work(
    settled: Settled, model: Decoder, corpus: Corpus, tokenizer: TextTokenizer, stopping: Callable[[], bool]
) -> Work:
    """What a run does with a decoder and a corpus."""
    config, device = settled.config, torch.device(settled.machine.device)
    hidden: Callable[[Tensor], Tensor] = model.hidden
    piece: Callable[..., Any] = piece_loss
    if settled.machine.compile:
        hidden = torch.compile(model.hidden, dynamic=False)
        piece = torch.compile(piece_loss, dynamic=False)
    windows = TokenWindows(
        corpus.train(),
        context=model.config.max_position_embeddings,
        batch_size=config.batch_size // config.grad_accumulation,  # type: ignore[operator]
        seed=config.seed,
        vocab_size=corpus.vocab_size,
    )

    def loss(inputs: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        return head_loss(hidden(inputs), model.head, targets, scale, piece)

    return Work(
        model=model,
        kept=WholeModel(model, tokenizer),
        batches=lambda number: prefetched(windows, number, device),
        loss=loss,
        count_targets=lambda targets: targets.numel(),
        count_tokens=None,
        validate=_validation(model, corpus, tokenizer, config.eval_tokens or 0, stopping),
        validated=bool(corpus.val_tokens),
    )


def _validation(
    model: Decoder,
    corpus: Corpus,
    tokenizer: TextTokenizer,
    most: int,
    stopping: Callable[[], bool],
) -> Callable[[], Validation | None]:
    """Loss in nats per token and in bits per byte of the held-out text; None without any, or when asked to stop."""
    sizes = np.array([len(tokenizer.token_bytes(index)) for index in range(corpus.vocab_size)], np.int64)
    sizes[[index for index in (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) if index is not None]] = 0
    shards = [shard for shard in corpus.val() if len(shard) > 1]
    context, device = model.config.max_position_embeddings, model.embedding.device

    def validate() -> Validation | None:
        nats, tokens, size = 0.0, 0, 0
        batch = max(1, VALIDATED_TOKENS // context)
        windows = validation_windows(
            shards, context=context, batch_size=batch, tokens=most, vocab_size=corpus.vocab_size
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for inputs, targets in windows if shards else ():
                if stopping():
                    return None
                nats += summed_loss(model.hidden(inputs.to(device)), model.head, targets.to(device))
                tokens += targets.numel()
                size += int(sizes[targets.numpy()].sum())
        return Validation(nats / tokens, nats / math.log(2) / max(size, 1)) if tokens else None

    return validate
