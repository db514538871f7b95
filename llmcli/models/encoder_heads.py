"""Heads of encoders: hidden tokens, labels, spans, under the families' own names.

A head is never random in silence: what loads a folder asks for a kind, and `with_head` alone draws a fresh one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcli.models.encoder import ACTIVATIONS, Encoder, square, under
from llmcli.models.encoder_config import EncoderConfig
from llmcli.models.ops import LayerNorm, Linear
from llmcli.models.segments import Segments


class MaskedLM(Encoder):
    """An encoder with its family's masked-language-model head, whose last matrix is the token embedding."""

    kind = "masked"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        dense, norm = square(config), LayerNorm(config.hidden_size, eps=config.norm_eps)
        bias = nn.Parameter(torch.zeros(config.vocab_size))
        self._head = (dense, norm)
        if config.model_type == "bert":
            transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
            self.cls = under("predictions", _Biased(bias, transform=transform))
        elif config.model_type == "roberta":
            self.lm_head = _Biased(bias, dense=dense, layer_norm=norm)
        else:
            self.vocab_transform, self.vocab_layer_norm, self.vocab_projector = dense, norm, _Biased(bias)
        # RoBERTa's head has the exact GELU whatever the blocks have.
        self.activation = ACTIVATIONS["gelu" if config.model_type == "roberta" else config.activation]

    @property
    def bias(self) -> Tensor:
        """What is added to the logits: (V,)."""
        by_family: dict[str, Any] = {"bert": "cls.predictions", "roberta": "lm_head", "distilbert": "vocab_projector"}
        found: Tensor = self.get_submodule(by_family[self.config.model_type]).bias  # type: ignore[assignment]
        return found

    def transformed(self, states: Tensor) -> Tensor:
        """Hidden states as the head's last product takes them: (..., C) -> (..., C)."""
        dense, norm = self._head
        made: Tensor = norm(self.activation(dense(states)))
        return made

    def logits(self, states: Tensor) -> Tensor:
        """Logits of every token of the vocabulary at hidden states: (..., C) -> (..., V)."""
        made = self.transformed(states)
        return F.linear(made, self.embedding.to(made.dtype), self.bias.to(made.dtype))


class _Biased(nn.Module):
    """Modules and a bias, by name."""

    def __init__(self, bias: nn.Parameter, **children: nn.Module) -> None:
        super().__init__()
        self.bias = bias
        for name, child in children.items():
            self.add_module(name, child)


class EncoderClassifier(Encoder):
    """Scores of labels from the first token's last hidden state: transformers' `...ForSequenceClassification`."""

    kind = "classifier"

    def __init__(self, config: EncoderConfig, labels: int) -> None:
        super().__init__(config, pooler=config.model_type == "bert")
        self.labels = labels
        last = Linear(config.hidden_size, labels)
        if config.model_type == "roberta":
            self.classifier: nn.Module = nn.ModuleDict({"dense": square(config), "out_proj": last})
        else:
            self.classifier = last
        if config.model_type == "distilbert":
            self.pre_classifier = square(config)
        rate = config.classifier_dropout
        self.dropout = config.hidden_dropout if rate is None else rate

    def scores(
        self, ids: Tensor, segments: Segments, first: Tensor, types: Tensor | None = None
    ) -> Tensor:  # (1, N) -> (R, labels)
        """Texts side by side (1, N) and the places of their first tokens (R,) -> (R, labels)."""
        return self.judged(self.hidden(ids, segments=segments, types=types)[0].index_select(0, first))

    def judged(self, first: Tensor) -> Tensor:
        """Scores from the last hidden states of the texts' first tokens: (R, C) -> (R, labels)."""
        drop = partial(F.dropout, p=self.dropout, training=self.training)
        if isinstance(self.classifier, nn.ModuleDict):
            return self.classifier["out_proj"](drop(torch.tanh(self.classifier["dense"](drop(first)))))
        distil = self.config.model_type == "distilbert"
        pooled = F.relu(self.pre_classifier(first)) if distil else self.pooled(first)
        return self.classifier(drop(pooled))


class SpanReader(Encoder):
    """Where an answer begins and ends: transformers' `...ForQuestionAnswering`."""

    kind = "span"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.qa_outputs = Linear(config.hidden_size, 2)

    def spans(self, states: Tensor) -> Tensor:
        """Logits of a span's first and last token at hidden states: (..., C) -> (..., 2)."""
        return self.qa_outputs(states)


def build_encoder(config: EncoderConfig, kind: str, *, labels: int = 0, pooler: bool = False) -> Encoder:
    """The module of a kind (see encoder_config.KINDS); `labels` of a classifier, `pooler` of a base."""
    if kind == "classifier":
        return EncoderClassifier(config, labels)
    if kind == "base":
        return Encoder(config, pooler=pooler)
    return {"masked": MaskedLM, "span": SpanReader}[kind](config)


def with_head(base: Encoder, kind: str, generator: torch.Generator, *, labels: int = 0) -> Encoder:
    """The encoder's weights under a head of a kind: its own where it has that head, else a fresh one, normal 0.02.

    The pooler of a BERT's classifier is the base's where it has one.
    """
    with torch.device("meta"):
        model = build_encoder(base.config, kind, labels=labels, pooler=base.body.pooler is not None)
    known = base.state_dict()
    weights = {}
    for name, wanted in model.state_dict().items():
        if name in known and known[name].shape == wanted.shape:
            weights[name] = known[name]
        elif name.endswith("bias"):
            weights[name] = torch.zeros(wanted.shape).to(base.embedding)
        elif wanted.ndim == 1:
            weights[name] = torch.ones(wanted.shape).to(base.embedding)
        else:
            weights[name] = torch.empty(wanted.shape).normal_(0.0, 0.02, generator=generator).to(base.embedding)
    model.load_state_dict(weights, assign=True)
    model.compute_dtype = base.compute_dtype
    return model
