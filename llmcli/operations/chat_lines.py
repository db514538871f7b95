"""Messages line by line: JSON in, an answer for each line out, errors among them.

Invariant: one record for each line that is not blank, in order; a line that is wrong changes nothing of the
conversation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from llmcli.data import json_values
from llmcli.errors import DataError, LlmcliError
from llmcli.operations.chat import Answer, Chat, as_messages


def answer_lines(chat: Chat, lines: Iterable[bytes], name: str = "<stdin>") -> Iterator[dict[str, Any]]:
    """Answers each line as it comes: a message goes on with the conversation, a list of messages is one of its own."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _answered(chat, line, name, number)
        except LlmcliError as error:
            yield {"error": {"kind": error.kind, "message": error.message, "where": error.where}}


def _answered(chat: Chat, line: bytes, name: str, number: int) -> dict[str, Any]:
    where = f"{name}:{number}"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"is not valid UTF-8 (byte {error.start})", where=where) from error
    value = json_values.parse_line(text, name, number)
    messages = as_messages(value, where)
    before = list(chat.messages)
    if isinstance(value, list):
        chat.begin(messages[:-1])
    try:
        answer = next(record for record in chat.ask(messages[-1]) if isinstance(record, Answer))
    except LlmcliError as error:
        chat.begin(before)
        error.where = error.where or where
        raise
    return as_record(answer)


def as_record(answer: Answer) -> dict[str, Any]:
    """An answer as a message, with what is known of it."""
    made = {"role": "assistant", **dataclasses.asdict(answer)}
    return {name: value for name, value in made.items() if value is not None}
