"""`evaluate --task choice`: of several ends of a text, which one a model finds the most probable.

Invariant: where several are equally probable, the right one among them, the example counts as that share: who finds all
equal has the accuracy of guessing.

accuracy takes the sum of the log-probabilities, accuracy_norm that by byte of the end: the acc and acc_norm of
lm-evaluation-harness (it counts characters). Of minimal pairs the first is BLiMP's (arXiv:1912.00582, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmcli.data.examples import ChoiceExample, Example
from llmcli.operations.evaluate_figures import Means, Measure, Outcome
from llmcli.operations.evaluate_model import POOL, EvaluatedModel


class ChoiceTask:
    """Multiple choice and minimal pairs."""

    names: tuple[str, ...] = ("accuracy", "accuracy_norm")

    def measure(self, runs: Sequence[Sequence[Outcome]]) -> Measure:
        """Shares of examples."""
        return Means(self.names)

    def outcomes(self, model: EvaluatedModel, examples: Sequence[Example]) -> Iterator[Outcome]:
        """One for each example, in order."""
        held: list[ChoiceExample] = []
        for example in examples:
            assert isinstance(example, ChoiceExample)
            held.append(example)
            if sum(len(each.choices) for each in held) >= POOL:
                yield from _scored(model, held)
                held = []
        yield from _scored(model, held)


def _scored(model: EvaluatedModel, examples: Sequence[ChoiceExample]) -> Iterator[Outcome]:
    sequences: list[list[int]] = []
    given: list[int] = []
    for example in examples:
        ids, begin = model.ends(example.prompt, example.choices)
        sequences += ids
        given += [begin] * len(ids)
    sums = [float(values.sum(dtype=float)) for values in model.log_probabilities(sequences, given)]
    place = 0
    for example in examples:
        scores = sums[place : place + len(example.choices)]
        place += len(scores)
        # The space that joins an end to its prompt is no part of its length.
        sizes = [len((text.lstrip() if example.prompt else text).encode()) or 1 for text in example.choices]
        by_byte = [score / size for score, size in zip(scores, sizes, strict=True)]
        yield Outcome(
            {"accuracy": share_of(scores, example.answer), "accuracy_norm": share_of(by_byte, example.answer)},
            {
                "answer": example.answer,
                "predicted": scores.index(max(scores)),
                "predicted_norm": by_byte.index(max(by_byte)),
                "log_probabilities": [round(score, 6) for score in scores],
            },
        )


def share_of(scores: Sequence[float], right: int) -> float:
    """1 where the right one scores best, a share of it where others score the same, else 0."""
    best = max(scores)
    return 1 / scores.count(best) if scores[right] == best else 0.0
