"""Settings of `convert`; `llmcli.config` gives them out with the others."""

from __future__ import annotations

import dataclasses

from llmcli.settings import setting


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """How a file of another program becomes a model folder."""

    format: str = setting(
        "auto", "Whose file it is; auto: told by how it begins.", group="Conversion", choices=("auto", "llama2.c")
    )
    tokenizer: str | None = setting(
        None,
        "The same program's tokenizer (default, beside FILE: tokN.bin for N tokens, or tokenizer.bin).",
        group="Conversion",
        metavar="FILE",
    )
