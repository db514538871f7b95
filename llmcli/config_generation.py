"""Settings of chat, answers, summaries, constrained output; `llmcli.config` gives them out with the others."""

from __future__ import annotations

import dataclasses

from llmcli.settings import setting


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How a conversation goes on."""

    max_new_tokens: int = setting(
        1024, "Tokens of an answer at most.", group="Chat", aliases=("--max-tokens",), minimum=1
    )
    keep: str = setting(
        "all",
        "When the context is full: an error (all), or leave the oldest turns out but for the system prompt.",
        group="Chat",
        choices=("all", "system+last"),
    )
    stop: tuple[str, ...] = setting(
        (), "End an answer before this text; may be given again.", group="Chat", metavar="TEXT"
    )
    seed: int | None = setting(
        None,
        "Of what is drawn (default: a new one, named on stderr).",
        group="Chat",
        minimum=0,
        maximum=2**63 - 1,
    )
    fast: bool = setting(
        False, "Let guesses share a run with their text where rounding shows: it may then differ.", group="Machine"
    )
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    quantize: str | None = setting(
        None, "Round the weights as they are read (not of ONNX folders).", group="Machine", choices=("int8", "int4")
    )
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1
    )


@dataclasses.dataclass(frozen=True)
class SpeculationConfig:
    """Whether tokens are guessed, so that one run of the model gives several; at most one of these."""

    lookup: bool = setting(
        False,
        "Guess tokens from what stands in the prompt and the text: the same text, sooner where it quotes.",
        group="Speculation",
    )
    draft_model: str | None = setting(
        None,
        "Guess tokens by a smaller model of the same tokenizer: the same text, sooner.",
        group="Speculation",
        metavar="PATH",
    )


@dataclasses.dataclass(frozen=True)
class ConstraintConfig:
    """What a text must be; at most one of these."""

    json_schema: str | None = setting(
        None, "JSON that fits this schema: a file, or the schema itself.", group="Constraint", metavar="FILE|JSON"
    )
    regex: str | None = setting(
        None, "Text that matches this expression as a whole.", group="Constraint", metavar="PATTERN"
    )
    choice: tuple[str, ...] = setting(
        (), "One of these texts; given again for each.", group="Constraint", metavar="TEXT"
    )
    grammar: str | None = setting(None, "Text that fits a grammar (Lark).", group="Constraint", metavar="FILE")


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """How a question about a text is answered."""

    max_new_tokens: int = setting(
        32, "Tokens of an answer at most.", group="Answer", aliases=("--max-tokens",), minimum=1
    )
    overlap: float = setting(
        0.25,
        "Share of a window that the next one reads again, of a text that is longer than the model's context.",
        group="Answer",
        minimum=0,
        maximum=0.9,
    )
    no_answer_threshold: float | None = setting(
        None,
        "Of an encoder: how far no answer may score above the best span (default: what its fine-tuning found, else 0).",
        group="Answer",
        metavar="NUMBER",
    )
    temperature: float = setting(
        0.0,
        "Above 0 answers are drawn; 0: always the most probable token.",
        group="Answer",
        aliases=("--temp",),
        minimum=0,
        maximum=100,
    )
    seed: int = setting(0, "Of what is drawn.", group="Answer", minimum=0, maximum=2**63 - 1)
    batch_size: int = setting(8, "Windows at once.", group="Machine", minimum=1, maximum=4096)
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )


@dataclasses.dataclass(frozen=True)
class SummarizeConfig:
    """How a text is summarized."""

    max_new_tokens: int = setting(
        128, "Tokens of a summary at most.", group="Summary", aliases=("--max-tokens",), minimum=1
    )
    temperature: float = setting(
        0.0,
        "Above 0 summaries are drawn; 0: always the most probable token.",
        group="Summary",
        aliases=("--temp",),
        minimum=0,
        maximum=100,
    )
    seed: int = setting(0, "Of what is drawn.", group="Summary", minimum=0, maximum=2**63 - 1)
    batch_size: int = setting(8, "Sections at once.", group="Machine", minimum=1, maximum=4096)
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )


@dataclasses.dataclass(frozen=True)
class FillMaskConfig:
    """How a missing word is filled in."""

    top: int = setting(
        5, "How many candidates of each text.", group="Candidates", aliases=("-n",), minimum=1, maximum=1000
    )
    batch_size: int = setting(32, "Texts at once.", group="Machine", minimum=1, maximum=4096)
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )
