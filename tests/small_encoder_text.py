"""A tokenizer of the commonest words of Python's own help, with what an encoder puts around a text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = tuple(word for word, _ in Counter(" ".join(topics.values()).split()).most_common(95))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json: a word a token, [CLS] ... [SEP] around them."""
    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(zip(names, SPECIAL, strict=True))), "utf-8")
