"""Settings of what a pretraining run learns by: the objective, the model that it begins from."""

from __future__ import annotations

import dataclasses

from llmcli.settings import setting


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is learnt from text. Each objective has settings of its own; the others take no notice of them."""

    objective: str = setting(
        "causal",
        "causal: the next token, a decoder. masked: hidden tokens, an encoder. contrastive: which texts belong "
        "together, an encoder of sentences.",
        group="Objective",
        choices=("causal", "masked", "contrastive"),
    )
    init: str | None = setting(
        None,
        "Model to begin from, of either kind: what fits is taken over and told. Its shape and tokenizer are the "
        "defaults.",
        group="Objective",
        metavar="MODEL",
    )
    mask_fraction: float = setting(
        0.15, "masked: share of the tokens that are to be found.", group="Objective", above=0, maximum=0.9
    )
    mask_whole_words: bool = setting(True, "masked: hide all tokens of a word together.", group="Objective")
    mask_token_share: float = setting(
        0.8, "masked: share of these that is replaced by the mask ...", group="Objective", minimum=0, maximum=1
    )
    mask_random_share: float = setting(
        0.1, "... and share replaced by random tokens; the rest stays.", group="Objective", minimum=0, maximum=1
    )
    dropout: float | None = setting(
        None,
        "Of an encoder in training (default: masked 0; contrastive 0.1, which makes the two views of a text).",
        group="Objective",
        minimum=0,
        maximum=0.9,
    )
    temperature: float = setting(
        0.05, "contrastive: what cosines are divided by.", group="Objective", above=0, maximum=100
    )
    pooling: str = setting(
        "mean", "contrastive: how token states become a text's vector.", group="Objective", choices=("mean", "cls")
    )
    views: str = setting(
        "dropout",
        "contrastive: what belongs together in text: a sentence and itself under another dropout, or it and the next "
        "one of its document.",
        group="Objective",
        choices=("dropout", "next"),
    )
    cut_sentences: bool = setting(
        True, "contrastive: cut documents into sentences; else a document is one text.", group="Objective"
    )
    scored: str | None = setting(
        None,
        "contrastive: file of scored pairs; validation is then by Spearman's correlation on it.",
        group="Objective",
        metavar="FILE",
    )
