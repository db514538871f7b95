"""Settings of vectors of texts: how they are made, how they are indexed and searched. Standard library only."""

from __future__ import annotations

import dataclasses

from llmcli.settings import setting


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """How texts become vectors."""

    pooling: str | None = setting(
        None,
        "How a text's tokens become one vector; none: a vector a token (default: the model's own, else mean).",
        group="Vectors",
        choices=("none", "cls", "mean", "last", "max"),
    )
    layer: str = setting(
        "last",
        "Whose states are taken: a number from 0, the embedding's output, on; -1 is the last one; all: each.",
        group="Vectors",
        metavar="N|last|all",
    )
    normalize: bool | None = setting(
        None,
        "Vectors of length 1 (default: as the model has it; hidden states of tokens as they are).",
        group="Vectors",
    )
    dimensions: int | None = setting(
        None, "Keep the first so many, for models that are trained for it.", group="Vectors", metavar="N", minimum=1
    )
    prompt_name: str | None = setting(
        None, "Which of the model's prompts stands before each text.", group="Vectors", metavar="NAME"
    )
    truncate: bool = setting(False, "Read the begin of a text that is longer than the model reads.", group="Long texts")
    chunk: str | None = setting(
        None, "Read a longer text in pieces and take their mean.", group="Long texts", choices=("mean",)
    )
    batch_tokens: int = setting(
        4096, "Tokens at once, where a single text has no more.", group="Machine", minimum=1, maximum=1 << 24
    )
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = setting(
        "auto",
        "Of the computation; auto: float32 on the CPU, bfloat16 on CUDA.",
        group="Machine",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """How files become an index that is searched by meaning."""

    chunk_tokens: int = setting(
        128, "Files are cut into pieces of so many tokens at most.", group="Index", minimum=4, maximum=1 << 20
    )
    vectors: str = setting(
        "float32",
        "How vectors are kept; int8: a fifth of the size, scores within about 0.003.",
        group="Index",
        choices=("float32", "int8"),
    )
    search: str = setting(
        "auto",
        "How it will be searched; approximate: by lists of near pieces, with the extra [search]; "
        "auto: that from 250,000 pieces on.",
        group="Index",
        choices=("auto", "exact", "approximate"),
    )
    pooling: str | None = setting(
        None, "Of a model that names none (mean).", group="Index", choices=("cls", "mean", "last", "max")
    )
    dimensions: int | None = setting(
        None, "Keep the first so many, for models that are trained for it.", group="Index", metavar="N", minimum=1
    )
    batch_tokens: int = setting(4096, "Tokens at once.", group="Machine", minimum=1, maximum=1 << 24)
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = setting(
        "auto",
        "Of the computation; auto: float32 on the CPU, bfloat16 on CUDA.",
        group="Machine",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How an index is searched."""

    count: int = setting(5, "How many pieces.", group="Search", aliases=("-n",), minimum=1, maximum=100_000)
    search: str = setting(
        "auto",
        "exact: every piece is looked at; approximate: the lists of an index that has them; auto: those where it has.",
        group="Search",
        choices=("auto", "exact", "approximate"),
    )
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )
