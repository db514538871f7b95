"""`evaluate --task prefer`: whether a model finds the better of two answers more probable, and by how much.

Invariant: scored is what the assistant says and its end token, as fine-tuning sees it; what the prompt holds is given.
Where both are equally probable, the example counts half.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from llmcli.data.chat_template import open_template
from llmcli.data.examples import ChatExample, Example, PreferenceExample
from llmcli.data.task_prompts import transcript
from llmcli.errors import DataError
from llmcli.operations.chat_examples import ChatExampleEncoder
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
        with contextlib.ExitStack() as stack:
            encoder = None
            if model.tokenizer.chat_template is not None:
                opened = ChatExampleEncoder(open_template(model.tokenizer), model.tokenizer)
                encoder = stack.enter_context(opened)
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
            ids, said = _encoded(model, encoder, example, name)
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


def _encoded(
    model: EvaluatedModel, encoder: ChatExampleEncoder | None, example: PreferenceExample, side: str
) -> tuple[list[int], list[bool]]:
    """Ids and which are scored: by the model's template, or as a transcript where it has none."""
    messages = (*example.prompt, *getattr(example, side))
    first = len(example.prompt)
    if encoder is not None:
        return encoder.encode(ChatExample(messages, None, example.where), first)
    ids, said = list(model.begin), [False] * len(model.begin)
    for number, message in enumerate(messages):
        for text, spoken in transcript(message["role"], message["content"] or ""):
            piece = model.tokenizer.encode(text)
            ids += piece
            said += [spoken and number >= first] * len(piece)
    return ids, said
