"""A decoder with a classification head: transformers' `...ForSequenceClassification`, name for name.

Invariant: the scores of a text are `score` of the hidden state of its last token, as transformers computes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.labels import SUFFIX, is_classifier, labels_of
from llmcli.models.ops import Linear
from llmcli.models.segments import Segments

_PREFIXES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "gpt2": "GPT2"}


class Classifier(Decoder):
    """Scores of labels from the last hidden state of each text. There is no language model head."""

    def __init__(self, config: DecoderConfig, labels: int) -> None:
        super().__init__(dataclasses.replace(config, tie_word_embeddings=True))
        self.score = Linear(config.hidden_size, labels, bias=False)

    def scores(self, ids: Tensor, segments: Segments, last: Tensor) -> Tensor:
        """Texts side by side (1, N) and the places of their last tokens (R,) -> (R, labels)."""
        states = self.hidden(ids, segments=segments)[0].index_select(0, last)
        return self.score(states)


def classifier_from(base: Decoder, labels: int, generator: torch.Generator) -> Classifier:
    """The decoder's weights under a fresh head: normal, std 0.02."""
    with torch.device("meta"):
        model = Classifier(base.config, labels)
    weights = {name: value for name, value in base.state_dict().items() if name != "lm_head.weight"}
    head = torch.empty(labels, base.config.hidden_size).normal_(0.0, 0.02, generator=generator)
    model.load_state_dict({**weights, "score.weight": head.to(base.embedding)}, assign=True)
    for name, buffer in base.body.named_buffers():
        setattr(model.body, name, buffer)
    return model


def classifier_facts(
    family: str | None, labels: list[str], *, several: bool, pad_id: int | None = None
) -> dict[str, Any]:
    """What config.json says of a classifier, as transformers writes it. `family`: a decoder's; None: of an encoder."""
    of_decoder = {} if family is None else {"architectures": [_PREFIXES[family] + SUFFIX], "pad_token_id": pad_id}
    return of_decoder | {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "multi_label_classification" if several else "single_label_classification",
    }


def builder_for(values: Mapping[str, Any], where: str) -> Callable[[DecoderConfig], Decoder]:
    """What makes the module that a config.json describes."""
    if not is_classifier(values):
        return Decoder
    count = len(labels_of(values, where))
    return lambda config: Classifier(config, count)
