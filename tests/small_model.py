"""Tiny decoders with random weights, saved as model folders, and a tokenizer of seven tokens to count paths with."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.folder import save_model

TOKENS = ("<|endoftext|>", "a", "b", "Ġ", "ab", "Ġa", "Ċ")


def make_model(folder: Path, tokenizer: Path, *, context: int = 32, scale: float = 0.4, seed: int = 0) -> Path:
    """A model folder with the tokenizer's files; every weight is drawn, `scale` 0 gives equal probabilities."""
    opened: TextTokenizer = load_tokenizer(tokenizer)
    config = DecoderConfig(
        model_type="llama",
        vocab_size=opened.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=context,
    )
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 1.0, generator=generator).mul_(scale)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, special_ids={"bos_token_id": None, "eos_token_id": opened.eos_id, "pad_token_id": None})
    opened.save(folder)
    return folder


def make_seven(folder: Path) -> Path:
    """A byte-level BPE tokenizer of seven tokens, two of them merged."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(TOKENS[0], special=True)])
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": TOKENS[0]}))
    return folder
