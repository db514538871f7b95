"""The decoder's shape: what of a `config.json` changes the result, checked; what cannot be honoured is refused by name.

Sources: the config classes of Hugging Face transformers for llama, qwen3 and gpt2 (keys and defaults).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmcli.errors import ConfigError

FAMILIES = ("qwen3", "llama", "gpt2")


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

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ConfigError(f"is {self.model_type!r}; supported: {', '.join(FAMILIES)}", where="model_type")
        for field in dataclasses.fields(self):
            if field.type == "int":
                value = getattr(self, field.name)
                if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                    raise ConfigError(f"must be a whole number above 0, is {value!r}", where=field.name)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key/value heads",
                where="num_key_value_heads",
            )
        if self.model_type == "gpt2" and self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ConfigError(f"gpt2 needs hidden_size = heads x head_dim, got {self.hidden_size}", where="hidden_size")
        if self.model_type != "gpt2" and self.head_dim % 2:
            raise ConfigError(f"rotary positions need an even head size, got {self.head_dim}", where="head_dim")

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised for each head (Qwen3)."""
        return self.model_type == "qwen3"


_ACTIVATIONS = {"qwen3": ("silu", "swish"), "llama": ("silu", "swish"), "gpt2": ("gelu_new", "gelu_pytorch_tanh")}

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
    if family not in FAMILIES:
        raise ConfigError(f"model_type is {family!r}; supported: {', '.join(FAMILIES)}", where=where)
    for key, allowed in _ONLY.items():
        if key in values and values[key] not in allowed:
            raise ConfigError(f"{key} = {values[key]!r} is not supported", where=where)
    activation = values.get("activation_function" if family == "gpt2" else "hidden_act", _ACTIVATIONS[family][0])
    if activation not in _ACTIVATIONS[family]:
        raise ConfigError(f"the activation {activation!r} is not supported for {family}", where=where)
    try:
        return _read_gpt2(values) if family == "gpt2" else _read_llama(values, where)
    except KeyError as error:
        raise ConfigError(f"the key {error} is missing", where=where) from error
    except TypeError as error:
        raise ConfigError(f"holds a value of a wrong type: {error}", where=where) from error
    except ConfigError as error:
        raise ConfigError(str(error), where=where) from error


def _read_gpt2(values: Mapping[str, Any]) -> DecoderConfig:
    hidden, heads = values["n_embd"], values["n_head"]
    return DecoderConfig(
        model_type="gpt2",
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        num_hidden_layers=values["n_layer"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=values.get("n_inner") or 4 * hidden,
        max_position_embeddings=values.get("n_positions", 1024),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        attention_bias=True,
        mlp_bias=True,
    )


def _read_llama(values: Mapping[str, Any], where: str) -> DecoderConfig:
    # transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`.
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope_type = {kind!r} is not supported", where=where)
    heads = values["num_attention_heads"]
    return DecoderConfig(
        model_type=values["model_type"],
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or (128 if values["model_type"] == "qwen3" else values["hidden_size"] // heads),
        intermediate_size=values["intermediate_size"],
        max_position_embeddings=values.get("max_position_embeddings", 2048),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0),
        rope_scaling=rope if kind == "llama3" else None,
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        attention_bias=values.get("attention_bias", False),
        mlp_bias=values.get("mlp_bias", False),
    )


def write_config(config: DecoderConfig, special_ids: Mapping[str, int | None], dtype: str) -> dict[str, Any]:
    """The content of `config.json` as transformers writes it. `special_ids`: bos_, eos_ and pad_token_id."""
    architecture = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
    head: dict[str, Any] = {"architectures": [architecture[config.model_type]], "model_type": config.model_type}
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
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }
    if config.model_type == "llama":
        body["mlp_bias"] = config.mlp_bias
    return head | body | tail
