"""Fine-tuning on conversations, prompts with completions, and plain texts: the loss is the next token's.

Invariant: trained on is what the assistant says, or the completion, with the end token behind it; a text is trained on
whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcli.data.chat_template import open_template
from llmcli.data.chatml import with_chatml
from llmcli.data.examples import ChatExample, CompletionExample, Example, TextExample
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError
from llmcli.models.decoder import Decoder
from llmcli.models.text_model import TextModel
from llmcli.operations.chat_examples import ChatExampleEncoder, completion_ids, token_sizes
from llmcli.operations.chat_ids import ChatIds
from llmcli.operations.tasks import Row
from llmcli.training.loop import Validation
from llmcli.training.losses import head_loss, summed_loss
from llmcli.training.packing import Packed, pack


class ChatTask:
    """Rows: `wanted` says for each id whether it is trained on."""

    name = "chat"
    keeps: Sequence[str] = ()

    def __init__(self) -> None:
        self._sizes: np.ndarray[Any, np.dtype[np.int64]] = np.zeros(0, np.int64)  # bytes of each token

    def tokenizer(self, base: TextTokenizer) -> TextTokenizer:
        """With ChatML where the model has no template of its own."""
        return base if base.chat_template is not None else with_chatml(base)

    def encoded(self, examples: Iterable[Example], tokenizer: TextTokenizer) -> Iterator[Row]:
        """Conversations through the template, the rest as it stands."""
        self._sizes = token_sizes(tokenizer)
        with contextlib.closing(ChatExampleEncoder(open_template(tokenizer), tokenizer)) as conversations:
            for example in examples:
                match example:
                    case ChatExample():
                        ids, trained = conversations.encode(example)
                    case CompletionExample():
                        ids, trained = completion_ids(tokenizer, example.prompt, example.completion)
                    case TextExample():
                        ids, trained = completion_ids(tokenizer, "", example.text)
                    case _:
                        raise DataError(f"is no conversation, but {type(example).__name__}", where=example.where)
                row = Row(np.asarray(ids, np.int32), np.asarray(trained, bool), example.where)
                if not row.wanted[1:].any():
                    raise DataError("holds nothing to learn: what the assistant says is empty", where=example.where)
                yield row

    def longest(self, context: int) -> int:
        """The last token is predicted, not read."""
        return context + 1

    def cut(self, row: Row, length: int) -> Row | None:
        """The begin; None where the assistant's part lies behind it."""
        kept = Row(row.ids[:length], row.wanted[:length], row.where)
        return kept if kept.wanted[1:].any() else None

    def classes(self, row: Row) -> Sequence[str]:
        """None: any text can be measured."""
        return ()

    def settle(self, train: Sequence[Row], validation: Sequence[Row]) -> None:
        """Any rows will do."""

    def model(self, base: TextModel, generator: torch.Generator) -> TextModel:
        """The base itself."""
        return base

    def facts(self, tokenizer: TextTokenizer) -> Mapping[str, Any]:
        """None: the model is of the base's kind."""
        return {}

    def ends(self, tokenizer: TextTokenizer) -> Sequence[int]:
        """The token that the template puts behind an answer."""
        with contextlib.closing(ChatIds(open_template(tokenizer), tokenizer)) as conversation:
            return sorted(conversation.ends)

    def batch(self, rows: Sequence[Row]) -> tuple[Packed, Tensor]:
        """Targets are the ids that are trained on; chosen are the places before them."""
        packed = pack([row.ids[:-1] for row in rows], [np.flatnonzero(row.wanted[1:]) for row in rows])
        targets = np.concatenate([row.ids[1:][row.wanted[1:]] for row in rows]).astype(np.int64)
        return packed, torch.from_numpy(targets)

    def loss(self, model: TextModel, packed: Packed, targets: Tensor, scale: Tensor) -> Tensor:
        """Cross-entropy at the chosen places alone: logits of prompts are never made."""
        assert isinstance(model, Decoder)
        states = model.hidden(packed.ids, segments=packed.segments)[0].index_select(0, packed.chosen)
        return head_loss(states, model.head, targets, scale)

    def validate(self, model: TextModel, batches: Iterable[tuple[Packed, Tensor]]) -> Validation:
        """Nats per token and bits per byte of what the assistant says."""
        assert isinstance(model, Decoder)
        nats, tokens, size = 0.0, 0, 0
        for packed, targets in batches:
            states = model.hidden(packed.ids, segments=packed.segments)[0].index_select(0, packed.chosen)
            nats += summed_loss(states, model.head, targets)
            tokens += targets.numel()
            size += int(self._sizes[targets.cpu().numpy()].sum())
        return Validation(nats / max(tokens, 1), nats / math.log(2) / size if size else None)
