"""`evaluate --task chat`: how well a model predicts what the assistant says, of conversations and of completions.

Invariant: scored is what fine-tuning trains on: the assistant's messages, or the completion, each with the end token
behind it. Nats are counted over those tokens, bytes over the text that they stand for; special tokens have none. What
is longer than the context is scored in windows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmcli.data.chat_template import open_template
from llmcli.data.examples import ChatExample, CompletionExample, Example, TextExample
from llmcli.data.task_prompts import transcript
from llmcli.errors import DataError
from llmcli.operations.chat_examples import ChatExampleEncoder, completion_ids, token_sizes
from llmcli.operations.evaluate_figures import Array, Measure, Outcome, Summed
from llmcli.operations.evaluate_model import POOL, EvaluatedModel

_NUMBERS = ("nats", "tokens", "bytes")


class ChatFigures(Summed):
    """Loss in nats per token, perplexity and bits per byte, over all that is said."""

    def features(self, outcome: Outcome) -> list[float]:
        """Nats, tokens and bytes."""
        return [outcome.values[name] for name in _NUMBERS]

    def figures(self, sums: Array) -> dict[str, Array]:
        """The metrics; without a token none is defined."""
        nats, tokens, size = sums[:, 0], sums[:, 1], sums[:, 2]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            loss = nats / tokens
            return {"loss": loss, "perplexity": np.exp(loss), "bits_per_byte": nats / size / math.log(2)}

    def details(self, sums: Array) -> dict[str, Any]:
        """How much was said."""
        return {"tokens": int(sums[1]), "bytes": int(sums[2])}


class ChatTask:
    """Conversations, prompts with completions, and texts."""

    names: tuple[str, ...] = ("loss", "perplexity", "bits_per_byte")

    def measure(self, runs: Sequence[Sequence[Outcome]]) -> Measure:
        """Over all tokens."""
        return ChatFigures()

    def outcomes(self, model: EvaluatedModel, examples: Sequence[Example]) -> Iterator[Outcome]:
        """One for each example, in order."""
        sizes = token_sizes(model.tokenizer)
        with opened_encoder(model) as encoder:
            for begin in range(0, len(examples), POOL):
                yield from _scored(model, encoder, sizes, examples[begin : begin + POOL])


@contextlib.contextmanager
def opened_encoder(model: EvaluatedModel) -> Iterator[ChatExampleEncoder | None]:
    """By the model's template; None where it has none."""
    if model.tokenizer.chat_template is None:
        yield None
        return
    with ChatExampleEncoder(open_template(model.tokenizer), model.tokenizer) as encoder:
        yield encoder


def spoken_ids(
    model: EvaluatedModel, encoder: ChatExampleEncoder | None, example: ChatExample, first: int = 0
) -> tuple[list[int], list[bool]]:
    """(ids, which of them the assistant says), from message `first` on: by the template, else as a transcript."""
    if encoder is not None:
        return encoder.encode(example, first)
    ids, said = list(model.begin), [False] * len(model.begin)
    for number, message in enumerate(example.messages):
        for text, spoken in transcript(message["role"], message["content"] or ""):
            piece = model.tokenizer.encode(text)
            ids += piece
            said += [spoken and number >= first] * len(piece)
    return ids, said


def _encoded(
    model: EvaluatedModel, encoder: ChatExampleEncoder | None, example: Example
) -> tuple[list[int], list[bool]]:
    match example:
        case ChatExample():
            return spoken_ids(model, encoder, example)
        case CompletionExample():
            return completion_ids(model.tokenizer, example.prompt, example.completion)
        case TextExample():
            return completion_ids(model.tokenizer, "", example.text)
    raise DataError(f"is no conversation, but {type(example).__name__}", where=example.where)


def _scored(
    model: EvaluatedModel,
    encoder: ChatExampleEncoder | None,
    sizes: np.ndarray[Any, np.dtype[np.int64]],
    examples: Sequence[Example],
) -> Iterator[Outcome]:
    sequences: list[list[int]] = []
    masks: list[np.ndarray[tuple[int], np.dtype[np.bool_]]] = []
    for example in examples:
        ids, said = _encoded(model, encoder, example)
        sequences.append(ids)
        masks.append(np.array(said, np.bool_))
        masks[-1][:1] = False  # nothing stands before it
        if not masks[-1].any():
            raise DataError("the assistant says nothing that could be scored", where=example.where)
    given = [int(mask.argmax()) for mask in masks]
    found = model.log_probabilities(sequences, given)
    for ids, mask, begin, values in zip(sequences, masks, given, found, strict=True):
        nats = -float(values[mask[begin:]].sum(dtype=float))
        tokens, size = int(mask.sum()), int(sizes[np.asarray(ids)[mask]].sum())
        yield Outcome(
            {"nats": nats, "tokens": tokens, "bytes": size},
            {"log_probability": round(-nats, 6), "tokens": tokens, "bytes": size},
        )
