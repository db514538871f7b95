"""`evaluate --task prefer`: whether a model finds the better of two answers more probable, and by how much.

Invariant: scored is what the assistant says and its end token, as fine-tuning sees it; what the prompt holds is given.
Where both are equally probable, the example counts half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llmcli.data.examples import ChatExample, Example, PreferenceExample
from llmcli.errors import DataError
from llmcli.operations.chat_examples import ChatExampleEncoder
from llmcli.operations.evaluate_chat import opened_encoder, spoken_ids
from llmcli.operations.evaluate_choice import share_of
from llmcli.operations.evaluate_figures import Means, Measure, Outcome
from llmcli.operations.evaluate_model import POOL, EvaluatedModel

_SIDES = ("chosen", "rejected")


class PreferTask:
    """Log-probabilities in nats: of the whole answer, and by token, since longer ones have less."""

    names: tuple[str, ...] = ("accuracy", "margin", "accuracy_per_token", "margin_per_token")

    def measure(self, runs: Sequence[Sequence[Outcome]]) -> Measure:
        """Means over pairs."""
        return Means(self.names)

    def outcomes(self, model: EvaluatedModel, examples: Sequence[Example]) -> Iterator[Outcome]:
        """One for each example, in order."""
        with opened_encoder(model) as encoder:
            for begin in range(0, len(examples), POOL // 4):
                yield from _scored(model, encoder, examples[begin : begin + POOL // 4])


def _scored(
    model: EvaluatedModel, encoder: ChatExampleEncoder | None, examples: Sequence[Example]
) -> Iterator[Outcome]:
    sequences: list[list[int]] = []
    masks: list[np.ndarray[tuple[int], np.dtype[np.bool_]]] = []
    for example in examples:
        assert isinstance(example, PreferenceExample)
        for name in _SIDES:
            messages = (*example.prompt, *getattr(example, name))
            spoken = ChatExample(messages, None, example.where)
            ids, said = spoken_ids(model, encoder, spoken, len(example.prompt))
            sequences.append(ids)
            masks.append(np.array(said, np.bool_))
            if not masks[-1][1:].any():
                raise DataError(f"what is {name} has no token to score", where=example.where)
    given = [max(1, int(mask.argmax())) for mask in masks]
    found = model.log_probabilities(sequences, given)
    sides = [values[mask[begin:]] for values, mask, begin in zip(found, masks, given, strict=True)]
    for number in range(len(examples)):
        pair = sides[2 * number : 2 * number + 2]
        sums = [float(values.sum(dtype=float)) for values in pair]
        means = [total / len(values) for total, values in zip(sums, pair, strict=True)]
        yield Outcome(
            {
                "accuracy": share_of(sums, 0),
                "margin": sums[0] - sums[1],
                "accuracy_per_token": share_of(means, 0),
                "margin_per_token": means[0] - means[1],
            },
            {
                f"{name}_{what}": value
                for name, total, values in zip(_SIDES, sums, pair, strict=True)
                for what, value in (("log_probability", round(total, 6)), ("tokens", len(values)))
            },
        )
