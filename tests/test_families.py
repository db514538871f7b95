"""Mistral and Qwen2 beside transformers: logits, prefill and cached, and which keys of their configs are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from llmcli.errors import ConfigError
from llmcli.models.config import read_config
from llmcli.models.folder import load_model

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
FAMILIES = {
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 7}),
    "mistral-head": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": False}),
}


def save_theirs(name: str, folder: Path) -> Any:
    """A model of transformers with every weight drawn, biases too, saved as a folder."""
    import transformers

    config_name, model_name, more = FAMILIES[name]
    config = getattr(transformers, config_name)(**SHAPE, **more)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_name)(config).eval().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers_prefilled_and_cached(name: str, tmp_path: Path) -> None:
    theirs = save_theirs(name, tmp_path)
    ours = load_model(tmp_path)
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() < 1e-4
        cache = ours.cache(rows=3, capacity=4)
        pieces = [ours(ids[:, first:last], cache) for first, last in ((0, 12), (12, 13), (13, 14), (14, 30), (30, 40))]
        assert (torch.cat(pieces, 1) - expected).abs().max() < 1e-4


def test_a_window_holds_for_rows_of_unequal_length(tmp_path: Path) -> None:
    theirs = save_theirs("mistral-window", tmp_path)
    ours = load_model(tmp_path)
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = ours.cache(rows=2)
        ours(ids[:, :15], cache)
        cache.rewind([15, 11])
        fed = torch.stack((ids[0, 15:17], ids[1, 11:13]))
        found = ours(fed, cache)
        assert (found[0] - theirs(ids[:1, :17]).logits[0, 15:]).abs().max() < 1e-4
        assert (found[1] - theirs(ids[1:, :13]).logits[0, 11:]).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_comes_back_as_it_was_read(name: str, tmp_path: Path) -> None:
    from llmcli.models.config import write_config

    save_theirs(name, tmp_path)
    config = read_config(json.loads((tmp_path / "config.json").read_text()), "config.json")
    assert read_config(write_config(config, {"eos_token_id": 0}, "float32"), "again") == config


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen2", "use_sliding_window", True),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
        ("mistral", "layer_types", ["full_attention", "sliding_attention"]),
        ("mistral", "sliding_window", -1),
        ("mistral", "hidden_act", "gelu"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(family: str, key: str, value: object) -> None:
    values = {**SHAPE, "model_type": family, "sliding_window": None, key: value}
    with pytest.raises(ConfigError, match=key if key != "hidden_act" else "activation"):
        read_config(values, "config.json")
