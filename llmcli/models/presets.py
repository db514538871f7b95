"""Presets: shapes of decoders from 1 M to 350 M parameters, of encoders from 1 M to 110 M, and their parameters.

Invariant: a preset's name is its count of parameters with its own vocabulary, rounded.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model's shape without its family and vocabulary."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    ffn_size: int
    context: int
    batch_size: int  # rows of a step, the whole accumulated one
    vocab_size: int  # of a tokenizer that is made for it


PRESETS: dict[str, Preset] = {
    "1m": Preset(4, 128, 4, 2, 352, 256, 16, 2048),
    "4m": Preset(5, 224, 4, 2, 608, 256, 16, 4096),
    "8m": Preset(6, 288, 6, 3, 768, 512, 16, 8192),
    "14m": Preset(6, 384, 6, 6, 1024, 512, 16, 8192),
    "30m": Preset(8, 512, 8, 4, 1536, 512, 32, 8192),
    "65m": Preset(12, 640, 10, 5, 1728, 1024, 32, 16384),
    "125m": Preset(18, 768, 12, 4, 2048, 1024, 64, 16384),
    "350m": Preset(25, 1024, 16, 8, 3072, 1024, 128, 32768),
}
# Encoders have as many key/value heads as heads, and BERT's proportions: 4 times the width in the feed-forward part.
# 33m is the shape of MiniLM (arXiv:2002.10957), 67m of DistilBERT, 110m of BERT base.
ENCODER_PRESETS: dict[str, Preset] = {
    "1m": Preset(3, 128, 4, 4, 512, 128, 64, 4096),
    "4m": Preset(5, 192, 6, 6, 768, 128, 64, 8192),
    "8m": Preset(7, 256, 8, 8, 1024, 128, 64, 8192),
    "14m": Preset(6, 384, 12, 12, 1536, 128, 64, 8192),
    "33m": Preset(12, 384, 12, 12, 1536, 256, 64, 30528),
    "67m": Preset(6, 768, 12, 12, 3072, 512, 64, 30528),
    "110m": Preset(12, 768, 12, 12, 3072, 512, 128, 30528),
}
DEFAULT = "4m"


def count_parameters(preset: Preset, vocab_size: int | None = None) -> int:
    """Parameters of the preset as a qwen3 with a tied head."""
    size, head = preset.hidden_size, preset.hidden_size // preset.heads
    attention = 2 * size * size + 2 * size * preset.kv_heads * head + 2 * head
    block = attention + 3 * size * preset.ffn_size + 2 * size
    return (vocab_size or preset.vocab_size) * size + preset.layers * block + size


def count_encoder_parameters(preset: Preset, vocab_size: int | None = None) -> int:
    """Parameters of the preset as a bert with its masked-language-model head."""
    size, vocabulary = preset.hidden_size, vocab_size or preset.vocab_size
    block = 4 * (size * size + size) + 2 * size * preset.ffn_size + preset.ffn_size + 5 * size
    embeddings = (vocabulary + preset.context + 2) * size + 2 * size
    return embeddings + preset.layers * block + size * size + 3 * size + vocabulary


def preset_table() -> str:
    """The presets as lines of text, for the help."""
    rows = ["preset  parameters  layers  hidden  heads  kv   ffn  context  batch   vocab"]
    rows += [_row(name, preset, count_parameters(preset)) for name, preset in PRESETS.items()]
    rows += ["--objective masked"]
    rows += [_row(name, preset, count_encoder_parameters(preset)) for name, preset in ENCODER_PRESETS.items()]
    return "\n".join(rows)


def _row(name: str, preset: Preset, parameters: int) -> str:
    return (
        f"{name:>6}  {parameters / 1e6:8.1f} M  {preset.layers:6}  {preset.hidden_size:6}  "
        f"{preset.heads:5}  {preset.kv_heads:2}  {preset.ffn_size:4}  {preset.context:7}  {preset.batch_size:5}  "
        f"{preset.vocab_size:6}"
    )
