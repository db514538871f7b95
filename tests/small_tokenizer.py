"""A small byte-level BPE tokenizer, trained in a moment on text that every Python brings."""

from __future__ import annotations

import functools
import json
from pathlib import Path


@functools.cache
def _content() -> str:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text[:5000] for text in list(topics.values())[:40]], trainer)
    content: str = tokenizer.to_str()
    return content


def make_tokenizer(folder: Path) -> Path:
    """Writes the tokenizer into a new folder."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(_content(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder
