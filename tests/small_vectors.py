"""A tiny encoder with random weights and a WordPiece tokenizer, as transformers or sentence-transformers lay it out."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llmcli.models.encoder import Encoder
from llmcli.models.encoder_config import EncoderConfig
from llmcli.models.encoder_folder import save_encoder
from llmcli.models.pooling import Pooling, write_pooling

_WORDS = [
    "the",
    "old",
    "man",
    "went",
    "to",
    "sea",
    "a",
    "boat",
    "of",
    "his",
    "once",
    "upon",
    "time",
    "there",
    "was",
    "and",
    "he",
    "for",
    "while",
    "dog",
    "ran",
    "home",
    "red",
    "car",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_encoder(
    folder: Path,
    *,
    family: str = "bert",
    pooling: Pooling | None = None,
    positions: int = 24,
    size: int = 16,
    seed: int = 0,
) -> Path:
    """A model folder of an encoder; `pooling` makes it one of sentence-transformers'."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz.,"
    tokens = [*SPECIAL, *dict.fromkeys([*letters, *_WORDS, *(f"##{letter}" for letter in letters)])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(SPECIAL)
    types = 0 if family == "distilbert" else 2
    model = Encoder(EncoderConfig(family, len(tokens), size, 2, 2, 24, positions, types))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    folder.mkdir(parents=True)
    save_encoder(model, folder, special_ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0})
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps({**roles, "tokenizer_class": "BertTokenizer"}))
    if pooling is not None:
        write_pooling(folder, pooling, size)
    return folder
