"""Conversations: messages of OpenAI's form and ShareGPT's, Alpaca's instructions, prompts and completions.

Invariant: messages come out in one form, that of a chat template: roles are system, user, assistant and tool, content
is text ("" beside tool calls), tool calls hold objects; a system message stands first if at all, then user and
assistant take turns, and what a tool says stands behind the call.

Sources: OpenAI's chat format (platform.openai.com/docs/api-reference/chat); ShareGPT's and Alpaca's as
hiyouga/LLaMA-Factory's data/README.md describes them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from llmcli.data.examples import ChatExample, CompletionExample, TextExample
from llmcli.data.fields import Fields
from llmcli.data.json_values import kind_of
from llmcli.errors import DataError
from llmcli.settings import nearest

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")

Messages = tuple[dict[str, Any], ...]


def from_messages(fields: Fields) -> ChatExample:
    """A list of messages, with the tools and the system prompt that stand beside it."""
    messages = messages_of(fields, fields.value("messages"), "messages")
    if fields.has("system") and (system := fields.text("system", blank=True)):
        messages = ({"role": "system", "content": system}, *messages)
    check_turns(fields, messages)
    return ChatExample(messages, tools_of(fields), fields.where)


def from_alpaca(fields: Fields) -> ChatExample:
    """Instruction, input and output; `history` holds the pairs of earlier turns."""
    messages: list[dict[str, Any]] = []
    if fields.has("system") and (system := fields.text("system", blank=True)):
        messages.append({"role": "system", "content": system})
    history = fields.value("history") if fields.has("history") else []
    if not isinstance(history, list):
        raise fields.error(f"field {fields.own('history')!r} holds {kind_of(history)}, not a list of pairs")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise fields.error(f"field {fields.own('history')!r} holds a turn that is no pair of texts")
        asked, said = (fields.as_text(text, fields.own("history")) for text in turn)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    asked = fields.text("instruction")
    if fields.has("input") and (given := fields.text("input", blank=True)):
        asked = f"{asked}\n{given}"
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": fields.text("output")}]
    return ChatExample(tuple(messages), None, fields.where)


def from_completion(fields: Fields) -> CompletionExample | ChatExample:
    """A prompt and its completion; a conversation where they are lists of messages."""
    prompt, completion = fields.value("prompt"), fields.value("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return CompletionExample(fields.text("prompt"), fields.text("completion"), fields.where)
    messages = (*messages_of(fields, prompt, "prompt"), *messages_of(fields, completion, "completion"))
    check_turns(fields, messages)
    return ChatExample(messages, tools_of(fields), fields.where)


def from_text(fields: Fields) -> TextExample:
    """A text alone."""
    return TextExample(fields.text("text"), fields.where)


# ----------------------------------------------------------------------------------------------------------------
# Messages


def messages_of(fields: Fields, value: Any, name: str) -> Messages:
    """Messages in one form. A text or a single message stands for a list of one. Raises DataError for anything else."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise fields.error(f"field {fields.own(name)!r} holds {kind_of(value)}, not a list of messages")
    if not value:
        raise fields.error(f"field {fields.own(name)!r} is empty: the conversation has no message")
    return tuple(_message(fields, item, number) for number, item in enumerate(value, start=1))


def _message(fields: Fields, item: Any, number: int) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise fields.error(f"message {number} is {kind_of(item)}, not an object")
    key = "role" if "role" in item else "from"
    if key not in item:
        found = ", ".join(map(repr, list(item)[:12])) or "none"
        raise fields.error(f"message {number} has neither 'role' nor 'from'; found: {found}")
    given = item[key]
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        hint = nearest(given, ROLES) if isinstance(given, str) else ""
        raise fields.error(f"message {number} has the role {given!r:.40}{hint or '; known: ' + ', '.join(ROLES)}")
    text = _content(fields, item, number)
    message: dict[str, Any] = {"role": role, "content": text}
    if isinstance(given, str) and given.strip().lower() == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(fields, _parsed(fields, text, number), number)}
    if item.get("tool_calls"):
        message["tool_calls"] = _calls(fields, item["tool_calls"], number)
    if role == "assistant" and isinstance(item.get("function_call"), dict):  # OpenAI's form before tool_calls
        message["tool_calls"] = _calls(fields, item["function_call"], number)
    for name in _KEPT:
        if isinstance(item.get(name), str):
            message[name] = fields.as_text(item[name], name, blank=True)
    if not message.get("tool_calls") and role != "tool" and (not text or text.isspace()):
        raise fields.error(f"message {number} ({given}) is empty")
    return message


def _content(fields: Fields, item: dict[str, Any], number: int) -> str:
    key = "content" if "content" in item else "value"
    if key not in item and not item.get("tool_calls") and not item.get("function_call"):
        found = ", ".join(map(repr, list(item)[:12]))
        raise fields.error(f"message {number} has neither 'content' nor 'value'; found: {found}")
    value = item.get(key)
    if isinstance(value, list):  # OpenAI's parts
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else kind_of(part)
                raise fields.error(f"message {number} has a part of the type {kind!r:.40}; only text can be learnt")
        value = "".join(fields.as_text(part.get("text"), "text", blank=True) for part in value)
    if isinstance(value, dict) and item.get("role", item.get("from")) in ("tool", "observation", "function"):
        value = json.dumps(value, ensure_ascii=False)
    return fields.as_text(value, f"{key} of message {number}", blank=True)


def _parsed(fields: Fields, text: str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise fields.error(f"message {number} (function_call) is not valid JSON") from None


def _calls(fields: Fields, given: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: templates write those out as JSON themselves."""
    calls = []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise fields.error(f"message {number} has a tool call without a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                raise fields.error(
                    f"message {number} calls {function['name']!r:.60} with arguments that are not valid JSON"
                ) from None
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def tools_of(fields: Fields) -> list[Any] | None:
    """What may be called, a list or JSON of one, in OpenAI's form; None where there is nothing."""
    if not fields.has("tools"):
        return None
    tools = fields.value("tools")
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise fields.error(f"field {fields.own('tools')!r} is not valid JSON") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise fields.error(f"field {fields.own('tools')!r} holds {kind_of(tools)}, not a list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


# ----------------------------------------------------------------------------------------------------------------
# Turns


def check_turns(fields: Fields, messages: Sequence[dict[str, Any]], *, answered: bool = True) -> None:
    """Raises DataError where the roles are out of order, or where the last says nothing to learn.

    `answered`: the assistant speaks last; else (a prompt) it has yet to.
    """
    reason = _disorder(messages)
    if reason is None:
        last = messages[-1]["role"]
        if answered and last != "assistant":
            reason = f"the conversation ends with the {last}; nothing to learn follows"
        elif not answered and last not in ("user", "tool"):
            reason = f"the prompt ends with the {last}, not with the user"
    if reason is not None:
        raise DataError(reason, where=fields.where)


def _disorder(messages: Sequence[dict[str, Any]]) -> str | None:
    """What is out of order, None where nothing is."""
    turns = [message for message in messages if message["role"] != "system"]
    if len(messages) - len(turns) > 1:
        return "the conversation has two system messages"
    if not turns:
        return "the conversation is empty: nobody speaks in it"
    if len(turns) < len(messages) and messages[0]["role"] != "system":
        return "the system message does not stand first"
    if turns[0]["role"] != "user":
        return f"the conversation begins with the {turns[0]['role']}, not with the user"
    offset = len(messages) - len(turns)
    for number, (before, message) in enumerate(itertools.pairwise(turns), start=2 + offset):
        allowed = {
            "user": ("assistant",),
            "tool": ("assistant", "tool"),
            "assistant": ("tool",) if before.get("tool_calls") else ("user",),
        }[before["role"]]
        if message["role"] not in allowed:
            after = f"{before['role']}{', which calls a tool' if before.get('tool_calls') else ''}"
            return f"message {number} is the {message['role']}'s after the {after}: roles out of order"
    return None
