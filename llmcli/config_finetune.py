"""Settings of fine-tuning and of labelled data; `llmcli.config` gives them out with the others."""

from __future__ import annotations

import dataclasses

from llmcli.settings import setting

TASKS = ("chat", "classify", "answer", "summarize", "prefer", "embed", "choice")  # that labelled data serve


@dataclasses.dataclass(frozen=True)
class LabelledConfig:
    """How labelled examples are read from files."""

    columns: str | None = setting(
        None,
        "Which field is what: text=review,label=stars; by number in a table without names (default: recognised).",
        group="Reading",
        metavar="NAME=FIELD,...",
    )
    encoding: str = setting(
        "auto",
        "Encoding of the input; auto takes the mark, then UTF-8, then detects.",
        group="Reading",
        metavar="auto|NAME",
    )
    errors: str = setting(
        "strict",
        "Bytes that the encoding does not have: stop, or replace them.",
        group="Reading",
        choices=("strict", "replace"),
    )
