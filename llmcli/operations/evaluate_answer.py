"""`evaluate --task answer`: questions about texts, by the rules of the official script of SQuAD 2.0.

Invariant: exact match and F1 of an answer are the script's: case, punctuation, articles and runs of white space do not
count, of several right answers the best fitting one does, and "no answer" is right where there is none and only there.

Source: evaluate-v2.0.py of rajpurkar.github.io/SQuAD-explorer; its percentages are shares here.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence

from llmcli.config import AnswerConfig
from llmcli.data.examples import AnswerExample, Example
from llmcli.data.task_prompts import ANSWER_STOP, answer_parts, said_answer
from llmcli.errors import ConfigError
from llmcli.operations.evaluate_figures import Means, Measure, Outcome
from llmcli.operations.evaluate_model import EvaluatedModel

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TOKENS = 32


class AnswerTask:
    """Answers in words, written greedily, or those that an encoder finds in the text."""

    names: tuple[str, ...] = (
        "exact_match",
        "f1",
        "has_answer_exact_match",
        "has_answer_f1",
        "no_answer_exact_match",
        "no_answer_f1",
    )

    def measure(self, runs: Sequence[Sequence[Outcome]]) -> Measure:
        """Means over questions: all, those that have an answer, and those that have none."""
        return Means(self.names)

    def outcomes(self, model: EvaluatedModel, examples: Sequence[Example]) -> Iterator[Outcome]:
        """One for each example, in order."""
        questions = [example for example in examples if isinstance(example, AnswerExample)]
        answers = _found(model, questions) if model.is_encoder else _written(model, questions)
        for example, (answer, cut) in zip(questions, answers, strict=True):
            exact, f1 = answer_scores([text for text, _ in example.answers], answer)
            part = "has_answer" if example.answers else "no_answer"
            values = {"exact_match": exact, "f1": f1, f"{part}_exact_match": exact, f"{part}_f1": f1}
            yield Outcome(
                values,
                {
                    "id": example.id,
                    "question": example.question,
                    "answers": [text for text, _ in example.answers],
                    "predicted": answer,
                    "exact_match": exact,
                    "f1": f1,
                },
                cut,
            )


def _written(model: EvaluatedModel, questions: Sequence[AnswerExample]) -> Iterator[tuple[str, bool]]:
    prompts = (answer_parts(each.context, each.question) for each in questions)
    tokens = model.config.max_new_tokens or _TOKENS
    for text, cut in model.written(prompts, ANSWER_STOP, tokens, [each.where for each in questions]):
        yield said_answer(text), cut


def _found(model: EvaluatedModel, questions: Sequence[AnswerExample]) -> Iterator[tuple[str, bool]]:
    from llmcli.operations.answer_span import SpanAnswerer

    if model.config.quantize is not None:
        raise ConfigError("an encoder's weights are read as they are; leave --quantize out", where=model.name)
    config = AnswerConfig(
        max_new_tokens=model.config.max_new_tokens or _TOKENS, device=model.config.device, threads=model.config.threads
    )
    asked = ((each.context, each.question, each.where) for each in questions)
    for found in SpanAnswerer(model.place, config).answers(asked):
        yield found.answer or "", False


def normalized(text: str) -> str:
    """An answer as it is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def answer_scores(right: Sequence[str], answer: str) -> tuple[float, float]:
    """(exact match, F1) of an answer, the best by each of the right ones; none of them, and "": there is no answer."""
    known = [text for text in right if normalized(text)] or [""]
    return max(_exact(text, answer) for text in known), max(_f1(text, answer) for text in known)


def _exact(right: str, answer: str) -> float:
    return float(normalized(right) == normalized(answer))


def _f1(right: str, answer: str) -> float:
    wanted, said = normalized(right).split(), normalized(answer).split()
    if not wanted or not said:
        return float(wanted == said)
    shared = (Counter(wanted) & Counter(said)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)
