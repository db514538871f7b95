"""Labelled examples: one frozen record for each kind of task, whatever file it came from. Standard library only.

Invariant: a record is sound: its texts hold characters, its conversation has turns in order, its answer stands in its
context at its start. Whoever has a record need not look again. `where` is `file:line` (Parquet: `file:row N`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]  # {"role", "content", perhaps "tool_calls", "name", ...}, as a template takes it


@dataclasses.dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation that ends with the assistant. Content is text, or None beside tool calls."""

    messages: tuple[dict[str, Any], ...]
    tools: list[Any] | None  # what the assistant may call, as JSON Schema
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class CompletionExample:
    """A prompt and what follows it, character for character: no template stands between them."""

    prompt: str
    completion: str
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class TextExample:
    """A text that is learnt whole."""

    text: str
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class LabelExample:
    """A text, or a pair of texts, and its labels: one, or several where the file holds lists of them."""

    text: str
    labels: tuple[str, ...]
    where: str
    text_pair: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerExample:
    """A question about a text. Answers: (text, its start in characters of the context); none: it has no answer."""

    id: str
    context: str
    question: str
    answers: tuple[tuple[str, int], ...]
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class SummaryExample:
    """A text and its summaries, the first being the one that is learnt."""

    source: str
    targets: tuple[str, ...]
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredPairExample:
    """Two texts and how alike they are, in the file's own unit."""

    first: str
    second: str
    score: float
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class TripletExample:
    """A text, one that is like it, and perhaps one that is not."""

    anchor: str
    positive: str
    negative: str | None
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class PreferenceExample:
    """Two ways to go on from a prompt, the better and the worse; each a list of messages that follow the prompt's."""

    prompt: tuple[dict[str, Any], ...]
    chosen: tuple[dict[str, Any], ...]
    rejected: tuple[dict[str, Any], ...]
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class ChoiceExample:
    """A beginning and its possible ends, one of which is right. Minimal pairs have the beginning ""."""

    prompt: str
    choices: tuple[str, ...]
    answer: int  # an index into choices
    where: str


Example: TypeAlias = (
    ChatExample
    | CompletionExample
    | TextExample
    | LabelExample
    | AnswerExample
    | SummaryExample
    | ScoredPairExample
    | TripletExample
    | PreferenceExample
    | ChoiceExample
)
