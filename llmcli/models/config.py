"""The decoder's shape: what of a `config.json` changes the result, checked; what cannot be honoured is refused by name.

Sources: the config classes of Hugging Face transformers for each family (keys and defaults).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmcli.errors import ConfigError
from llmcli.models.encoder_config import is_encoder

FAMILIES = ("qwen3", "llama", "mistral", "qwen2", "gpt2")

# Above these no real model lies; a stranger's config must not have us build a billion layers before the weights say no.
_MOST = {
    "hidden_size": 2**24,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "intermediate_size": 2**24,
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. Names are Hugging Face's; gpt2's own (`n_embd`, ...) are translated on the way in and out."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None  # llama3's rule; None: plain
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None  # tokens that a token attends to, itself among them; None: all before it

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ConfigError(f"is {self.model_type!r}; supported: {', '.join(FAMILIES)}", where="model_type")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                _check_number(field.name, value, _MOST.get(field.name, 2**31 - 1), whole=True)
            elif field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"must be true or false, is {value!r:.80}", where=field.name)
        _check_number("norm_eps", self.norm_eps, 1)
        _check_number("rope_theta", self.rope_theta, 1e15)
        if self.rope_scaling is not None:
            for key in _LLAMA3:
                _check_number(f"rope_scaling.{key}", self.rope_scaling.get(key), 2**31 - 1)
            if self.rope_scaling["low_freq_factor"] >= self.rope_scaling["high_freq_factor"]:
                raise ConfigError("must be above low_freq_factor", where="rope_scaling.high_freq_factor")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key/value heads",
                where="num_key_value_heads",
            )
        if self.model_type == "gpt2" and self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ConfigError(f"gpt2 needs hidden_size = heads x head_dim, got {self.hidden_size}", where="hidden_size")
        if self.model_type != "gpt2" and self.head_dim % 2:
            raise ConfigError(f"rotary positions need an even head size, got {self.head_dim}", where="head_dim")
        window = self.sliding_window
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise ConfigError(f"must be a whole number above 0, is {window!r}", where="sliding_window")

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised for each head (Qwen3)."""
        return self.model_type == "qwen3"

    @property
    def output_bias(self) -> bool:
        """Whether attention's output has a bias: where query, key and value have one, but for Qwen2."""
        return self.attention_bias and self.model_type != "qwen2"


def _check_number(name: str, value: Any, most: float, *, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value <= most:
        kind = "whole number" if whole else "number"
        raise ConfigError(f"must be a {kind} above 0 and at most {most:g}, is {value!r:.80}", where=name)


_ACTIVATIONS = {
    **dict.fromkeys(("qwen3", "llama", "mistral", "qwen2"), ("silu", "swish")),
    "gpt2": ("gelu_new", "gelu_pytorch_tanh"),
}

_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_CONTEXTS = {"qwen3": 32_768, "qwen2": 32_768, "mistral": 131_072, "llama": 2048}  # where a config names none

# gpt2's own names of what has another in the other families.
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
}

# Keys that change the result, with the values that are honoured; anything else is refused by name.
_ONLY: dict[str, tuple[Any, ...]] = {
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "reorder_and_upcast_attn": (False, True, None),
    "scale_attn_weights": (True, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
}


def read_config(values: Mapping[str, Any], where: str) -> DecoderConfig:
    """The decoder's shape from the content of a `config.json`. Raises ConfigError naming the key at fault."""
    family = values.get("model_type")
    if is_encoder(values):
        raise ConfigError(
            f"is a {family}, an encoder: embed and fill-mask use it; a decoder is needed here", where=where
        )
    if family not in FAMILIES:
        raise ConfigError(f"model_type is {family!r:.80}; supported: {', '.join(FAMILIES)}", where=where)
    for key, allowed in _ONLY.items():
        if key in values and values[key] not in allowed:
            raise ConfigError(f"{key} = {values[key]!r:.80} is not supported", where=where)
    activation = values.get("activation_function" if family == "gpt2" else "hidden_act", _ACTIVATIONS[family][0])
    if activation not in _ACTIVATIONS[family]:
        raise ConfigError(f"the activation {activation!r:.80} is not supported for {family}", where=where)
    try:
        return _read_gpt2(values) if family == "gpt2" else _read_llama(values)
    except KeyError as error:
        raise ConfigError(f"the key {error} is missing", where=where) from error
    except ConfigError as error:
        name = error.where or ""
        key = _GPT2_NAMES.get(name, name) if family == "gpt2" else name.replace("norm_eps", "rms_norm_eps")
        raise ConfigError(f"{key}: {error.message}" if key else error.message, where=where) from error


def _whole(values: Mapping[str, Any], key: str) -> int:
    """A number that others are computed from."""
    _check_number(key, values[key], 2**31 - 1, whole=True)
    return int(values[key])


def _given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value; the default where it is missing or null, but not where it is 0."""
    value = values.get(key)
    return default if value is None else value


def _read_gpt2(values: Mapping[str, Any]) -> DecoderConfig:
    hidden, heads = _whole(values, "n_embd"), _whole(values, "n_head")
    return DecoderConfig(
        model_type="gpt2",
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        num_hidden_layers=values["n_layer"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=_given(values, "n_inner", 4 * hidden),
        max_position_embeddings=values.get("n_positions", 1024),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        attention_bias=True,
        mlp_bias=True,
    )


def _read_llama(values: Mapping[str, Any]) -> DecoderConfig:
    family, heads, size = values["model_type"], _whole(values, "num_attention_heads"), _whole(values, "hidden_size")
    kinds = _given(values, "layer_types", [])
    known = ["full_attention"] if family != "mistral" else ["full_attention", "sliding_attention"]
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise ConfigError("only full_attention is supported", where="layer_types")
    if kinds and any(kind != kinds[0] for kind in kinds):
        raise ConfigError("one kind for all layers is supported", where="layer_types")
    # Mistral's window is on unless it is null; Qwen's is off: see _ONLY.
    window = values.get("sliding_window", 4096) if family == "mistral" and "full_attention" not in kinds else None
    rope = _rope(values)
    scaled = rope.get("rope_type", rope.get("type", "default")) == "llama3"
    context = _given(values, "max_position_embeddings", _CONTEXTS[family])
    return DecoderConfig(
        model_type=family,
        vocab_size=values["vocab_size"],
        hidden_size=size,
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=_given(values, "num_key_value_heads", heads),
        head_dim=_given(values, "head_dim", 128 if family == "qwen3" else size // heads),
        intermediate_size=values["intermediate_size"],
        max_position_embeddings=context,
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=_given(rope, "rope_theta", _given(values, "rope_theta", 10_000.0)),
        rope_scaling={"rope_type": "llama3", **{key: rope.get(key) for key in _LLAMA3}} if scaled else None,
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        attention_bias=family == "qwen2" or (family != "mistral" and values.get("attention_bias", False)),
        mlp_bias=family == "llama" and values.get("mlp_bias", False),
        sliding_window=window,
    )


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rule of rotary positions: transformers 5 writes `rope_parameters`, 4 wrote `rope_scaling`, which wins."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    found = _given(values, key, {})
    if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
        raise ConfigError("must be an object with one rule for all layers", where=key)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope_type = {kind!r:.80} is not supported")
    if found.get("partial_rotary_factor") not in _ONLY["partial_rotary_factor"]:
        raise ConfigError(f"partial_rotary_factor = {found['partial_rotary_factor']!r:.80} is not supported")
    trained = _given(found, "original_max_position_embeddings", values.get("max_position_embeddings"))
    return {**found, "original_max_position_embeddings": trained}


def write_config(config: DecoderConfig, special_ids: Mapping[str, int | None], dtype: str) -> dict[str, Any]:
    """The content of `config.json` as transformers writes it. `special_ids`: bos_, eos_ and pad_token_id."""
    head: dict[str, Any] = {"architectures": [_ARCHITECTURES[config.model_type]], "model_type": config.model_type}
    tail = {"tie_word_embeddings": config.tie_word_embeddings, **special_ids, "use_cache": True, "dtype": dtype}
    if config.model_type == "gpt2":
        return (
            head
            | {
                "vocab_size": config.vocab_size,
                "n_embd": config.hidden_size,
                "n_layer": config.num_hidden_layers,
                "n_head": config.num_attention_heads,
                "n_inner": config.intermediate_size,
                "n_positions": config.max_position_embeddings,
                "layer_norm_epsilon": config.norm_eps,
                "activation_function": "gelu_new",
                "attn_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "resid_pdrop": 0.0,
            }
            | tail
        )
    body: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": float(config.rope_theta),
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }
    if config.model_type == "llama":
        body["mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral":
        body["sliding_window"] = config.sliding_window
    return head | body | tail
