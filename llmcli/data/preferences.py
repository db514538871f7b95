"""Preferences: a prompt with a better and a worse answer, as texts, as messages, and as the transcripts of hh-rlhf.

Invariant: what both answers share at their beginning belongs to the prompt, so that they differ from their first
message on; the prompt ends with the user (or a tool).

Source of the transcripts: anthropics/hh-rlhf, README.md.
"""

from __future__ import annotations

import re
from typing import Any

from llmcli.data.conversations import Messages, check_turns, messages_of
from llmcli.data.examples import PreferenceExample
from llmcli.data.fields import Fields

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def from_preference(fields: Fields) -> PreferenceExample:
    """Prompt, chosen and rejected: texts, or messages."""
    if fields.has("messages"):
        prompt = messages_of(fields, fields.value("messages"), "messages")
    elif fields.has("prompt"):
        prompt = _of_side(fields, "prompt", "user")
    else:
        prompt = ()
    if fields.has("system") and (system := fields.text("system", blank=True)):
        prompt = ({"role": "system", "content": system}, *prompt)
    return _example(fields, prompt, _of_side(fields, "chosen", "assistant"), _of_side(fields, "rejected", "assistant"))


def from_transcripts(fields: Fields) -> PreferenceExample:
    """chosen and rejected hold whole conversations as one text each."""
    return _example(fields, (), _transcript(fields, "chosen"), _transcript(fields, "rejected"))


def is_transcript(record: Any, own: str) -> bool:
    """Whether a field holds a transcript of hh-rlhf's form."""
    value = record.get(own)
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _of_side(fields: Fields, name: str, role: str) -> Messages:
    value = fields.value(name)
    if isinstance(value, list | dict):
        return messages_of(fields, value, name)
    return ({"role": role, "content": fields.text(name, blank=role == "assistant")},)


def _transcript(fields: Fields, name: str) -> Messages:
    pieces = _SPEAKER.split(fields.text(name))
    if pieces[0].strip() or len(pieces) < 3:
        raise fields.error(f"field {fields.own(name)!r} is no transcript: it does not begin with '\\n\\nHuman:'")
    said = [
        {"role": _ROLE[speaker], "content": text.strip()}
        for speaker, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    for number, message in enumerate(said[:-1], start=1):  # the last may be empty: an answer is silence then
        if not message["content"]:
            raise fields.error(f"message {number} of {fields.own(name)!r} is empty")
    return tuple(said)


def _example(fields: Fields, prompt: Messages, chosen: Messages, rejected: Messages) -> PreferenceExample:
    if prompt and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and shared == len(chosen) == len(rejected):
        raise fields.error("chosen and rejected are the same")
    prompt, chosen, rejected = (*prompt, *chosen[:shared]), chosen[shared:], rejected[shared:]
    if not chosen or not rejected:
        raise fields.error("one of chosen and rejected is only the beginning of the other")
    if not prompt:
        raise fields.error("chosen and rejected share no prompt, and there is no other")
    check_turns(fields, prompt, answered=False)
    for side in (chosen, rejected):
        check_turns(fields, (*prompt, *side))
    return PreferenceExample(prompt, chosen, rejected, fields.where)
