"""Pairs: texts with summaries, pairs with scores, triplets, and choices among ends.

Invariant: of a choice the text is the prompt and the end joined as they stand; the space between them belongs to the
end.
"""

from __future__ import annotations

from typing import Any

from llmcli.data.examples import ChoiceExample, ScoredPairExample, SummaryExample, TripletExample
from llmcli.data.fields import Fields
from llmcli.data.json_values import kind_of


def from_summary(fields: Fields) -> SummaryExample:
    """A source (a list is one of sentences) and its summaries (a list is one of several summaries)."""
    return SummaryExample(" ".join(fields.texts("source")), tuple(fields.texts("target")), fields.where)


def from_scored(fields: Fields) -> ScoredPairExample:
    """Two texts and a number."""
    return ScoredPairExample(fields.text("first"), fields.text("second"), fields.number("score"), fields.where)


def from_triplet(fields: Fields) -> TripletExample:
    """An anchor, what is like it, and where there is one what is not."""
    negative = fields.text("negative") if fields.has("negative") else None
    return TripletExample(fields.text("anchor"), fields.text("positive"), negative, fields.where)


def from_minimal_pair(fields: Fields) -> ChoiceExample:
    """A good sentence and a bad one."""
    return ChoiceExample("", (fields.text("good"), fields.text("bad")), 0, fields.where)


def from_choices(fields: Fields) -> ChoiceExample:
    """A query, a list of ends and the right one: its number from 0, its letter, its label or its text."""
    prompt = fields.text("prompt")
    given = fields.value("choices")
    labels: list[Any] | None = None
    if isinstance(given, dict):  # {"text": [...], "label": [...]}, as Hugging Face has ARC
        labels, given = given.get("label"), given.get("text")
        if labels is not None and (not isinstance(labels, list) or not isinstance(given, list)):
            raise fields.error(f"field {fields.own('choices')!r} holds no lists")
    if not isinstance(given, list) or len(given) < 2:
        found = f"a list of {len(given)}" if isinstance(given, list) else kind_of(given)
        raise fields.error(f"field {fields.own('choices')!r} holds {found}, not a list of two or more")
    texts = [fields.as_text(text, fields.own("choices")) for text in given]
    answer = _right(fields, fields.value("answer"), texts, labels)
    space = "" if prompt[-1].isspace() else " "
    return ChoiceExample(
        prompt, tuple(text if text[0].isspace() else space + text for text in texts), answer, fields.where
    )


def _right(fields: Fields, value: Any, texts: list[str], labels: list[Any] | None) -> int:
    if labels is not None and len(labels) == len(texts) and value in labels:
        return labels.index(value)
    if isinstance(value, str) and value in texts:
        return texts.index(value)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, str) and len(value.strip()) == 1 and "A" <= value.strip().upper() <= "Z":
        value = ord(value.strip().upper()) - ord("A")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(texts):
        return value
    raise fields.error(f"field {fields.own('answer')!r} holds {value!r:.40}, which is none of the {len(texts)} choices")
