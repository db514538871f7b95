"""Prompts of tasks: what a decoder is given where a task is more than going on with a text. Standard library only.

Invariant: fine-tuning and evaluation take a task's prompt from here, so that a model is asked as it was taught. What is
to be said follows the prompt with a space before it and ends with a newline or the end of the text.
"""

from __future__ import annotations

NO_ANSWER = "no answer"  # what is said where the context does not answer
ANSWER_STOP = "\n"  # answers are one line
SUMMARY_STOP = "\n\n"  # summaries are one paragraph


def answer_prompt(context: str, question: str) -> str:
    """Asks a question about a text."""
    return "".join(answer_parts(context, question))


def answer_parts(context: str, question: str) -> tuple[str, str, str]:
    """The prompt in parts: what may be cut where there is no room for it stands in the middle."""
    return "", context, f"\n\nquestion: {question}\nanswer:"


def said_answer(text: str) -> str:
    """The answer that a model's words mean; "": there is none."""
    answer = text.strip()
    return "" if answer.casefold().rstrip(".") == NO_ANSWER else answer


def summary_prompt(source: str) -> str:
    """Asks for a summary of a text."""
    return "".join(summary_parts(source))


def summary_parts(source: str) -> tuple[str, str, str]:
    """The prompt in parts, as those of `answer_parts`."""
    return "", source, "\n\nsummary:"


def label_prompt(text: str, text_pair: str | None = None) -> str:
    """Asks a model that was not taught labels for one of them."""
    return "".join(label_parts(text, text_pair))


def label_parts(text: str, text_pair: str | None = None) -> tuple[str, str, str]:
    """The prompt in parts, as those of `answer_parts`."""
    second = "" if text_pair is None else f"\n{text_pair}"
    return "", f"{text}{second}", "\n\nlabel:"


def transcript(role: str, text: str) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """A message for a model without a template: pieces of text, and whether the assistant says them.

    The form is that of the transcripts of hh-rlhf.
    """
    name = {"user": "Human", "assistant": "Assistant"}.get(role, role.capitalize())
    return (f"\n\n{name}:", False), (f" {text}", role == "assistant")
