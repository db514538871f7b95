"""Frames: the special tokens of an encoder, and what its tokenizer puts around a text ([CLS] ... [SEP]).

Invariant: a framed tokenizer gives a text the ids that it had before, in a frame; tokens that it lacked come after all
others, so ids that were written to the disk stay what they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from llmcli.data.tokenizer import TextTokenizer
from llmcli.data.tokenizer_files import added_token

# The roles of a frame with the tokens that play them where a tokenizer has none: BERT's (arXiv:1810.04805).
ENCODER_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def frame(first: tuple[str, int], last: tuple[str, int]) -> dict[str, Any]:
    """The post-processor that frames a text, and a pair of texts, by a first and a last token (text, id)."""

    def token(name: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": segment}}

    def text(name: str, segment: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": segment}}

    single = [token(first[0], 0), text("A", 0), token(last[0], 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), token(last[0], 1)],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in (first, last)},
    }


def is_framed(tokenizer: TextTokenizer) -> bool:
    """Whether it has what an encoder is trained with: a frame, a mask and something to fill up with."""
    whole = None not in (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id)
    return whole and tokenizer.encode("", special=True) == [tokenizer.cls_id, tokenizer.sep_id]


def framed(tokenizer: TextTokenizer) -> TextTokenizer:
    """The tokenizer with what `is_framed` asks for; itself where it has that. What ends a document stays what it is."""
    if is_framed(tokenizer):
        return tokenizer
    files = tokenizer.files
    known = {"pad": tokenizer.pad_id, "cls": tokenizer.cls_id, "sep": tokenizer.sep_id, "mask": tokenizer.mask_id}
    if known["pad"] == tokenizer.eos_id:
        known["pad"] = None  # what ends a document is learnt from, what is filled up with is not
    added = [dict(token) for token in files.content.get("added_tokens") or []]
    size, ids = tokenizer.vocab_size, {}
    for role, identity in known.items():
        name = ENCODER_TOKENS[role]
        if identity is None:
            identity = tokenizer.id_of(name)
        if identity is None:
            identity, size = size, size + 1
            added.append(added_token(identity, name))
        else:
            name = tokenizer.token(identity)
        ids[role] = (name, identity)
    content = {**files.content, "added_tokens": added, "post_processor": frame(ids["cls"], ids["sep"])}
    known_class = {"tokenizer_class": "PreTrainedTokenizerFast"}  # else that of the model's family would be taken
    settings = {**known_class, **files.config, **{f"{role}_token": name for role, (name, _) in ids.items()}}
    if tokenizer.eos_id is not None:
        settings.setdefault("eos_token", tokenizer.token(tokenizer.eos_id))
    settings["added_tokens_decoder"] = decoder_of(content)
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    return TextTokenizer(dataclasses.replace(files, text=text, content=content, config=settings))


def decoder_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The added tokens of a tokenizer.json as tokenizer_config.json lists them."""
    return {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in content["added_tokens"]
    }
