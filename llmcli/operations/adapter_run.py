"""A run that trains adapters: what it keeps is PEFT's folder, with the tokenizer.

Invariant: the base is recorded by its path and, in the manifest's lineage, by its hash; it is not copied.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from llmcli.config_finetune import LoraConfig
from llmcli.data.tokenizer import TextTokenizer
from llmcli.models.adapter_folder import restore_adapter, save_adapter
from llmcli.models.classifier import Classifier
from llmcli.models.decoder import Decoder, GPT2Model
from llmcli.models.lora import AdapterShape, Dropout, attach
from llmcli.operations.run_folder import special_ids


@dataclasses.dataclass
class AdapterModel:
    """The adapters of a model, and the modules that are trained whole."""

    model: Decoder
    tokenizer: TextTokenizer
    base: str
    shape: AdapterShape
    kept: Mapping[str, nn.Module]
    dropout: Dropout
    facts: Mapping[str, Any]
    ends: Sequence[int] = ()
    also: Callable[[Path], None] | None = None

    def write(self, folder: Path, *, result: bool = False) -> None:
        """PEFT's folder."""
        save_adapter(
            self.model,
            folder,
            self.shape,
            self.kept,
            base=self.base,
            special_ids=special_ids(self.tokenizer),
            facts=self.facts,
            ends=self.ends,
        )
        self.tokenizer.save(folder)
        if self.also is not None:
            self.also(folder)

    def read(self, folder: Path) -> None:
        """The adapters' weights."""
        restore_adapter(self.model, folder, self.kept)


def adapted(
    model: Decoder,
    tokenizer: TextTokenizer,
    base: Path,
    lora: LoraConfig,
    *,
    seed: int,
    new_tokens: bool,
    facts: Mapping[str, Any],
    ends: Sequence[int],
) -> AdapterModel:
    """Freezes a model under adapters. `new_tokens`: it has some, so embedding and head are trained and kept whole."""
    targets = () if lora.lora_targets == "all" else tuple(filter(None, map(str.strip, lora.lora_targets.split(","))))
    shape = AdapterShape(lora.lora_rank, lora.lora_alpha, lora.lora_dropout, targets, lora.lora_kind == "dora")
    kept: dict[str, nn.Module] = {}
    if new_tokens:
        body = model.body
        layer = body.wte if isinstance(body, GPT2Model) else body.embed_tokens
        kept[next(name for name, module in model.named_modules() if module is layer)] = layer
        if not model.config.tie_word_embeddings:
            kept["lm_head"] = model.lm_head
    if isinstance(model, Classifier):
        kept["score"] = model.score
    dropout = attach(model, shape, seed=seed, kept=list(kept.values()))
    return AdapterModel(model, tokenizer, os.path.abspath(base), shape, kept, dropout, facts, ends)
