"""What an example says as text: what is given and what is to be said; for lengths, and to tell equal examples.

Invariant: two examples are equal where both texts are, whatever files and layouts they come from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmcli.data.dedup import digest_of
from llmcli.data.examples import (
    AnswerExample,
    ChatExample,
    ChoiceExample,
    CompletionExample,
    Example,
    LabelExample,
    PreferenceExample,
    ScoredPairExample,
    SummaryExample,
    TextExample,
)


def texts_of(example: Example) -> tuple[str, str]:
    """(what is given, what is to be said). Of a preference the second is the better answer."""
    match example:
        case ChatExample():
            last = max(place for place, message in enumerate(example.messages) if message["role"] == "assistant")
            return _said(example.messages[:last]), _said(example.messages[last:])
        case CompletionExample():
            return example.prompt, example.completion
        case TextExample():
            return "", example.text
        case LabelExample():
            return "\n".join(filter(None, (example.text, example.text_pair))), ", ".join(example.labels)
        case AnswerExample():
            return f"{example.context}\n{example.question}", example.answers[0][0] if example.answers else ""
        case SummaryExample():
            return example.source, example.targets[0]
        case ScoredPairExample():
            return f"{example.first}\n{example.second}", f"{example.score:g}"
        case PreferenceExample():
            return _said(example.prompt), _said(example.chosen)
        case ChoiceExample():
            return example.prompt, example.choices[example.answer]
    return "\n".join(filter(None, (example.anchor, example.negative))), example.positive


def key_of(example: Example) -> bytes:
    """16 bytes that are equal for equal examples."""
    given, said = texts_of(example)
    if isinstance(example, ChatExample) and example.tools:
        said += f"\0{json.dumps(example.tools, sort_keys=True)}"
    if isinstance(example, PreferenceExample):
        said += f"\0{_said(example.rejected)}"
    if isinstance(example, ChoiceExample):
        said += "\0".join(example.choices)
    return digest_of(f"{given}\0{said}".encode())


def _said(messages: Sequence[dict[str, Any]]) -> str:
    """The texts of messages, with who says them, and calls of tools as JSON."""
    return "\n".join(
        f"{message['role']}: {message['content']}"
        + (json.dumps(message["tool_calls"], sort_keys=True) if message.get("tool_calls") else "")
        for message in messages
    )
