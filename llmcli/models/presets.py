"""Presets: shapes of decoders from 1 M to 350 M parameters, and the count of their parameters.

Invariant: a preset's name is its count of parameters with its own vocabulary, rounded.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preset:
    """A decoder's shape without its family and vocabulary."""

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
DEFAULT = "4m"


def count_parameters(preset: Preset, vocab_size: int | None = None) -> int:
    """Parameters of the preset as a qwen3 with a tied head."""
    size, head = preset.hidden_size, preset.hidden_size // preset.heads
    attention = 2 * size * size + 2 * size * preset.kv_heads * head + 2 * head
    block = attention + 3 * size * preset.ffn_size + 2 * size
    return (vocab_size or preset.vocab_size) * size + preset.layers * block + size


def preset_table() -> str:
    """The presets as lines of text, for the help."""
    rows = ["preset  parameters  layers  hidden  heads  kv   ffn  context  batch   vocab"]
    for name, preset in PRESETS.items():
        rows.append(
            f"{name:>6}  {count_parameters(preset) / 1e6:8.1f} M  {preset.layers:6}  {preset.hidden_size:6}  "
            f"{preset.heads:5}  {preset.kv_heads:2}  {preset.ffn_size:4}  {preset.context:7}  {preset.batch_size:5}  "
            f"{preset.vocab_size:6}"
        )
    return "\n".join(rows)
