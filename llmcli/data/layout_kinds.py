"""The layouts that are known: for each task the most telling first, with the names that data sets of the field use.

Invariant: a layout is told by its fields' names, and where names do not suffice by what the first record holds there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from llmcli.config_finetune import TASKS as TASKS
from llmcli.data import conversations, labels, pairs, preferences, questions
from llmcli.data.fields import Maker
from llmcli.errors import ConfigError
from llmcli.settings import nearest

_Names: TypeAlias = dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """A layout: what it is called, the fields it needs and may have, by the names they go by, and what reads them."""

    name: str
    make: Maker
    needs: Mapping[str, tuple[str, ...]]
    extras: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    fits: Callable[[Mapping[str, Any], Mapping[str, tuple[str, ...]]], bool] = lambda _record, _names: True


_MESSAGES: _Names = {"messages": ("messages", "conversations", "conversation")}
_SYSTEM: _Names = {"system": ("system", "system_prompt")}
_TOOLS: _Names = {"tools": ("tools", "functions")}
_PROMPT: _Names = {"prompt": ("prompt", "question", "query", "instruction")}
_TEXT: _Names = {"text": ("text", "sentence", "content", "document", "review", "comment", "tweet")}
_SIDES: _Names = {"chosen": ("chosen", "preferred"), "rejected": ("rejected", "dispreferred")}
_FIRST = ("first", "sentence1", "text1", "sentence_a", "premise", "question1")
_SECOND = ("second", "sentence2", "text2", "sentence_b", "hypothesis", "question2")
_LABELS = ("label", "labels", "class", "category", "sentiment")
_LABEL: _Names = {"label": _LABELS}


def _is_sharegpt(record: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> bool:
    value = record[names["messages"][0]]
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "from" in value[0]


KINDS: dict[str, tuple[Kind, ...]] = {
    "chat": (
        Kind("sharegpt", conversations.from_messages, _MESSAGES, _SYSTEM | _TOOLS, _is_sharegpt),
        Kind("messages", conversations.from_messages, _MESSAGES, _SYSTEM | _TOOLS),
        Kind(
            "alpaca",
            conversations.from_alpaca,
            {"instruction": ("instruction",), "output": ("output", "response")},
            {"input": ("input", "context"), "history": ("history",)} | _SYSTEM,
        ),
        Kind(
            "prompt/completion",
            conversations.from_completion,
            {"prompt": ("prompt",), "completion": ("completion", "response")},
            _TOOLS,
        ),
        Kind("text", conversations.from_text, {"text": ("text",)}),
    ),
    "classify": (
        Kind("text pair/label", labels.from_labelled, {"text": _FIRST, "text_pair": _SECOND, "label": _LABELS}),
        Kind("text/label", labels.from_labelled, _TEXT | _LABEL, {"text_pair": ("text_pair",)}),
    ),
    "answer": (
        Kind(
            "squad 2.0",
            questions.from_article,
            {"paragraphs": ("paragraphs",)},
            fits=lambda record, _: questions.has_unanswerable(record),
        ),
        Kind("squad 1.1", questions.from_article, {"paragraphs": ("paragraphs",)}),
        Kind(
            "context/question/answers",
            questions.from_rows,
            {
                "context": ("context", "passage", "document"),
                "question": ("question", "query"),
                "answers": ("answers", "answer"),
            },
            {"answer_start": ("answer_start", "start"), "id": ("id",)},
        ),
    ),
    "summarize": (
        Kind(
            "source/target",
            pairs.from_summary,
            {
                "source": ("source", "document", "article", "dialogue", "text"),
                "target": ("target", "summary", "highlights", "abstract"),
            },
        ),
    ),
    "prefer": (
        Kind(
            "hh-rlhf",
            preferences.from_transcripts,
            _SIDES,
            fits=lambda record, names: preferences.is_transcript(record, names["chosen"][0]),
        ),
        Kind("messages/chosen/rejected", preferences.from_preference, _MESSAGES | _SIDES, _SYSTEM),
        Kind("prompt/chosen/rejected", preferences.from_preference, _PROMPT | _SIDES, _SYSTEM),
        Kind("chosen/rejected", preferences.from_preference, _SIDES, _SYSTEM),
    ),
    "embed": (
        Kind(
            "pairs with scores",
            pairs.from_scored,
            {"first": _FIRST, "second": _SECOND, "score": ("score", "similarity", "similarity_score", "label")},
        ),
        Kind(
            "anchor/positive/negative",
            pairs.from_triplet,
            {"anchor": ("anchor", "query"), "positive": ("positive",)},
            {"negative": ("negative",)},
        ),
    ),
    "choice": (
        Kind(
            "minimal pairs",
            pairs.from_minimal_pair,
            {"good": ("sentence_good", "good"), "bad": ("sentence_bad", "bad")},
        ),
        Kind(
            "multiple choice",
            pairs.from_choices,
            {
                "prompt": ("query", "question", "prompt"),
                "choices": ("choices", "options", "endings"),
                "answer": ("gold", "answer", "answerkey", "label"),
            },
        ),
    ),
}
UNNAMED = {"classify": ("text/label", labels.label_columns), "embed": ("pairs with scores", labels.scored_columns)}


def kinds_of(task: str) -> tuple[Kind, ...]:
    """The layouts of a task. Raises ConfigError for a task that is not known."""
    if task not in KINDS:
        raise ConfigError(f"must be one of {', '.join(TASKS)}; is {task!r}{nearest(task, TASKS)}", where="task")
    return KINDS[task]
