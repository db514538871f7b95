"""Questions: SQuAD 1.1 and 2.0 as they are published, and rows of context, question and answers.

Invariant: each answer stands in its context, at its start, counted in characters; nothing is searched for where the
file says a place.

Source: Rajpurkar et al., arXiv:1606.05250 and arXiv:1806.03822, and the files of rajpurkar.github.io/SQuAD-explorer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmcli.data.examples import AnswerExample
from llmcli.data.fields import Fields, missing
from llmcli.data.json_values import kind_of
from llmcli.errors import DataError


def is_article(record: Any) -> bool:
    """Whether a record is one of SQuAD's articles."""
    paragraphs = record.get("paragraphs")
    return isinstance(paragraphs, list) and all(isinstance(each, dict) for each in paragraphs)


def has_unanswerable(record: Any) -> bool:
    """Whether an article says of its questions if they have an answer, as those of SQuAD 2.0 do."""
    return is_article(record) and any(
        isinstance(question, dict) and "is_impossible" in question
        for paragraph in record["paragraphs"]
        for question in paragraph.get("qas") or []
    )


def from_article(fields: Fields) -> Iterator[AnswerExample | DataError]:
    """The questions of an article, each with its own errors."""
    paragraphs = fields.value("paragraphs")
    if not is_article(fields.record):
        raise fields.error("field 'paragraphs' holds no list of objects")
    for number, paragraph in enumerate(paragraphs, start=1):
        where = f"{fields.where} (paragraph {number})"
        try:
            inner = Fields(paragraph, {"context": ("context",), "qas": ("qas",)}, where)
            context, questions = inner.text("context"), inner.value("qas")
            if not isinstance(questions, list):
                raise inner.error(f"field 'qas' holds {kind_of(questions)}, not a list")
        except DataError as error:
            yield error
            continue
        for place, question in enumerate(questions, start=1):
            try:
                yield _of_article(question, context, place, fields.where, where)
            except DataError as error:
                yield error


def _of_article(question: Any, context: str, number: int, outer: str, where: str) -> AnswerExample:
    if not isinstance(question, dict):
        raise DataError(f"question {number} is {kind_of(question)}, not an object", where=where)
    identity = question.get("id")
    where = f"{outer} (question {identity})" if identity is not None else f"{where[:-1]}, question {number})"
    fields = Fields(question, {"question": ("question",), "answers": ("answers",)}, where)
    asked = fields.text("question").strip()
    if question.get("is_impossible") is True:
        return AnswerExample(str(identity or where), context, asked, (), where)
    given = fields.value("answers")
    if not isinstance(given, list):
        raise fields.error(f"field 'answers' holds {kind_of(given)}, not a list")
    answers = []
    for answer in given:
        if not isinstance(answer, dict):
            raise fields.error(f"an answer is {kind_of(answer)}, not an object")
        for name in ("text", "answer_start"):
            if name not in answer:
                raise fields.error(missing(name, answer))
        answers.append(_answer(fields, answer["text"], answer["answer_start"], context))
    if not answers and "is_impossible" in question:
        raise fields.error("the question has no answer, yet is_impossible is false")
    return AnswerExample(str(identity or where), context, asked, tuple(dict.fromkeys(answers)), where)


def _answer(fields: Fields, text: Any, start: Any, context: str) -> tuple[str, int]:
    answer = fields.as_text(text, "text")
    if isinstance(start, bool) or not isinstance(start, int):
        raise fields.error(f"field 'answer_start' holds {kind_of(start)}, not a whole number")
    if start < 0 or context[start : start + len(answer)] != answer:
        found = context.find(answer)
        hint = f"; it stands at {found}" if found >= 0 else ", nor elsewhere in it"
        raise fields.error(f"the answer {answer!r:.60} is not in its context at {start}{hint}")
    return answer, start


def from_rows(fields: Fields) -> AnswerExample:
    """A row of context, question and answers.

    Answers are a text, a list of texts, or Hugging Face's {"text": [...], "answer_start": [...]}; none: no answer. A
    text without its place is taken where it stands first.
    """
    context, asked = fields.text("context"), fields.text("question").strip()
    identity = str(fields.value("id")) if fields.has("id") else fields.where
    given = fields.value("answers")
    starts: Any = fields.value("answer_start") if fields.has("answer_start") else None
    if isinstance(given, dict):
        for name in ("text", "answer_start"):
            if name not in given:
                raise fields.error(missing(name, given))
        given, starts = given["text"], given["answer_start"]
    texts = given if isinstance(given, list) else [] if given in (None, "") else [given]
    places = starts if isinstance(starts, list) else [starts] * len(texts)
    if len(places) != len(texts):
        raise fields.error(f"has {len(texts)} answers and {len(places)} places")
    answers = []
    for text, start in zip(texts, places, strict=True):
        if start is None:
            start = context.find(fields.as_text(text, fields.own("answers")))
            if start < 0:
                raise fields.error(f"the answer {text!r:.60} is not in its context")
        elif isinstance(start, str) and start.strip().isdecimal():  # tables hold texts alone
            start = int(start)
        answers.append(_answer(fields, text, start, context))
    return AnswerExample(identity, context, asked, tuple(dict.fromkeys(answers)), fields.where)
