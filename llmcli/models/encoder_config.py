"""The encoder's shape: what of a BERT's, RoBERTa's or DistilBERT's `config.json` changes the result, checked.

Invariant: a key that would change the result and is not honoured is refused by name; `write_encoder_config` gives the
keys that the family has in transformers, so what one writes the other reads.

Sources: the config classes of Hugging Face transformers for each family (keys and defaults).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmcli.errors import ConfigError

ENCODERS = ("bert", "roberta", "distilbert")
KINDS = ("base", "masked", "classifier", "span")

# How transformers calls the families' classes, and the heads' part of their names.
_CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
_SUFFIXES = {
    "base": "Model",
    "masked": "ForMaskedLM",
    "classifier": "ForSequenceClassification",
    "span": "ForQuestionAnswering",
}

# What a config may call an activation, and which it is.
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "relu": "relu",
    "tanh": "tanh",
    "quick_gelu": "quick_gelu",
}
_WRITTEN = {"gelu_tanh": "gelu_new"}  # the others are written as they are called here

# Above these no real model lies; see config.py.
_MOST = {
    "hidden_size": 2**24,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**16,
    "intermediate_size": 2**24,
}

# Keys that change the result, with the values that are honoured.
_ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_word_embeddings": (True, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}

# DistilBERT's own names of what has another in the other families.
_DISTIL_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
    "activation": "activation",
}
_BERT_NAMES = {
    "norm_eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation": "hidden_act",
}
_DISTIL_EPS = 1e-12  # not in its config
CALLED = {  # the heads, in the field's words
    "masked": "masked-language-model head",
    "classifier": "sequence-classification head",
    "span": "question-answering head",
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder. Names are BERT's; DistilBERT's own (`dim`, ...) are translated on the way in and out."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2  # 0: the family tells no first text from a second
    norm_eps: float = 1e-12
    pad_token_id: int = 0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float | None = None  # None: as hidden_dropout
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.model_type not in ENCODERS:
            raise ConfigError(f"is {self.model_type!r:.80}; supported: {', '.join(ENCODERS)}", where="model_type")
        for name in ("vocab_size", "max_position_embeddings", *_MOST):
            _check_whole(name, getattr(self, name), 1, _MOST.get(name, 2**31 - 1))
        _check_whole("type_vocab_size", self.type_vocab_size, 0, 2**16)
        _check_whole("pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)
        if not _is_number(self.norm_eps) or not 0 < self.norm_eps <= 1:
            raise ConfigError(f"must be a number above 0 and at most 1, is {self.norm_eps!r:.80}", where="norm_eps")
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            rate = getattr(self, name)
            if not (rate is None and name == "classifier_dropout") and (not _is_number(rate) or not 0 <= rate < 1):
                raise ConfigError(f"must be a number from 0 to below 1, is {rate!r:.80}", where=name)
        if self.model_type == "distilbert" and self.type_vocab_size:
            raise ConfigError("must be 0: distilbert tells no first text from a second", where="type_vocab_size")
        if self.activation not in ACTIVATIONS.values():
            raise ConfigError(f"the activation {self.activation!r:.80} is not supported", where="activation")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"{self.num_attention_heads} heads cannot share a hidden size of {self.hidden_size}",
                where="num_attention_heads",
            )
        if self.longest < 1:
            raise ConfigError(
                f"{self.max_position_embeddings} leaves no position after pad_token_id {self.pad_token_id}",
                where="max_position_embeddings",
            )

    @property
    def first_position(self) -> int:
        """The position of a text's first token: RoBERTa counts from behind that of padding."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def longest(self) -> int:
        """Most tokens of a text."""
        return self.max_position_embeddings - self.first_position


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"must be a whole number from {least} to {most}, is {value!r:.80}", where=name)


def is_encoder(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an encoder family."""
    return values.get("model_type") in ENCODERS


def kind_of_head(values: Mapping[str, Any]) -> str:
    """The kind of head that a config.json's `architectures` name: one of KINDS, "base" where it is none of ours."""
    names = values.get("architectures")
    for name in names if isinstance(names, list) else []:
        for kind, suffix in {**_SUFFIXES, "pretraining": "ForPreTraining"}.items():
            if isinstance(name, str) and name.endswith(suffix):
                return "masked" if kind == "pretraining" else kind
    return "base"


def read_encoder_config(values: Mapping[str, Any], where: str) -> EncoderConfig:
    """The encoder's shape from the content of a `config.json`. Raises ConfigError naming the key at fault."""
    family = values.get("model_type")
    if family not in ENCODERS:
        raise ConfigError(f"model_type is {family!r:.80}; supported: {', '.join(ENCODERS)}", where=where)
    for key, allowed in _ONLY.items():
        if key in values and values[key] not in allowed:
            raise ConfigError(f"{key} = {values[key]!r:.80} is not supported", where=where)
    names = _DISTIL_NAMES if family == "distilbert" else _BERT_NAMES
    given = {
        field.name: values[names.get(field.name, field.name)]
        for field in dataclasses.fields(EncoderConfig)
        if values.get(names.get(field.name, field.name)) is not None
    }
    defaults = {"max_position_embeddings": 512, "pad_token_id": 1 if family == "roberta" else 0}
    fixed: dict[str, Any] = {}
    if family == "distilbert":
        defaults["classifier_dropout"] = 0.2  # type: ignore[assignment]
        fixed = {"type_vocab_size": 0, "norm_eps": _DISTIL_EPS}
    called = given.pop("activation", "gelu")
    if not isinstance(called, str) or called not in ACTIVATIONS:
        raise ConfigError(f"the activation {called!r:.80} is not supported", where=where)
    missing = [name for name in ("vocab_size", *_MOST) if name not in given]
    if missing:
        raise ConfigError(f"the key {names.get(missing[0], missing[0])!r} is missing", where=where)
    try:
        return EncoderConfig(**{**defaults, **given, **fixed, "activation": ACTIVATIONS[called]})
    except ConfigError as error:
        key = names.get(error.where or "", error.where or "")
        raise ConfigError(f"{key}: {error.message}" if key else error.message, where=where) from error


def write_encoder_config(
    config: EncoderConfig, kind: str, special_ids: Mapping[str, int | None], dtype: str
) -> dict[str, Any]:
    """The content of `config.json` as transformers writes it. `special_ids`: bos_, eos_ and pad_token_id."""
    distil = config.model_type == "distilbert"
    names = _DISTIL_NAMES if distil else _BERT_NAMES
    left_out = ("type_vocab_size", "norm_eps") if distil else ()
    body = {
        names.get(field.name, field.name): getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in left_out
    }
    body[names["activation"]] = _WRITTEN.get(config.activation, config.activation)
    if distil:
        rate = config.classifier_dropout
        body |= {"seq_classif_dropout": config.hidden_dropout if rate is None else rate, "sinusoidal_pos_embds": False}
    # The positions of RoBERTa hang on the id of padding, so the model's own counts, whatever the tokenizer says.
    ids = {**special_ids, "pad_token_id": config.pad_token_id}
    architecture = _CLASSES[config.model_type] + _SUFFIXES[kind]
    return {"architectures": [architecture], **body, **ids, "initializer_range": 0.02, "dtype": dtype}
