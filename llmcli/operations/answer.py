"""`answer`: a question about a text, answered in words, with the place in the text that says it.

Below stands what a decoder does; encoders, which point at the place, are the business of `answer_span`.

Invariant: a text that is longer than the context is read in windows that overlap, each with the whole question; of the
windows that answer, the one whose answer is the most probable is believed, and there is no answer where none does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from llmcli import settings as configs
from llmcli.config import AnswerConfig, SamplingConfig
from llmcli.data.cut_prompts import cut_prompt
from llmcli.data.spans import find_span
from llmcli.data.stop_strings import StopStrings
from llmcli.data.task_prompts import ANSWER_STOP, NO_ANSWER, answer_parts, said_answer
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError, UsageError
from llmcli.files.artefacts import Model, find_model, read_json
from llmcli.models.encoder_config import is_encoder
from llmcli.operations.generate import Generator, Prompt, Sample, open_generator
from llmcli.runtime.decoding import STOP, Row, Token
from llmcli.runtime.sampling import Sampler

_FEWEST = 8  # tokens of a window


@dataclasses.dataclass(frozen=True, slots=True)
class Answered:
    """An answer; None: the text does not answer the question."""

    answer: str | None
    start: int | None  # the characters of the text that say it; None: it is in the model's own words
    end: int | None
    probability: float  # of these words and their end, by the window that was believed
    windows: int  # that the text was read in


@dataclasses.dataclass(frozen=True, slots=True)
class _Said:
    text: str  # "": no answer
    logprob: float


def answer(
    model: Model,
    context: str,
    question: str,
    config: AnswerConfig = AnswerConfig(),  # noqa: B008  (frozen)
) -> Answered:
    """Answers a question about a text, by a decoder or an encoder: a model folder, a run, or a base with an adapter.

    Raises DataError for an empty text and an encoder that finds no spans, UsageError for an empty question and one that
    leaves the text no room.
    """
    configs.check(config)
    _refuse_empty(context, question)
    place = find_model(model)
    if is_encoder(read_json(place.folder / "config.json")):
        from llmcli.operations.answer_span import SpanAnswerer

        (found,) = SpanAnswerer(place, config).answers([(context, question, None)])
        return Answered(found.answer, found.start, found.end, found.probability, found.windows)
    generator = open_generator(model, device=config.device, threads=config.threads)
    try:
        return answer_by(generator, context, question, config)
    finally:
        generator.session.close()


def answer_by(
    generator: Generator,
    context: str,
    question: str,
    config: AnswerConfig = AnswerConfig(),  # noqa: B008  (frozen)
) -> Answered:
    """As `answer`, by a model that is loaded."""
    _refuse_empty(context, question)
    question = " ".join(question.split())
    tokenizer = generator.tokenizer
    least = len(tokenizer.encode(f" {NO_ANSWER}{ANSWER_STOP}"))  # less would cut it short, and it would be an answer
    limit = max(least, min(config.max_new_tokens, generator.session.context // 4))
    asked = len(tokenizer.encode("".join(answer_parts("", question)), special=True))
    room = generator.session.context - limit - asked
    if room < _FEWEST:
        raise UsageError(
            f"the question takes {asked:,} tokens; with {limit:,} for an answer, the model's context of "
            f"{generator.session.context:,} has no room for the text"
        )
    spans = windows_of(tokenizer, context, room, config.overlap)
    prompts = []
    for begin, end in spans:
        parts = answer_parts(context[begin:end], question)
        fitting = cut_prompt(tokenizer, parts, generator.session.context - limit)  # where a cut makes more tokens
        prompts.append("".join(fitting or parts))
    said = _said(generator, prompts, limit, config)
    answers = [place for place, each in enumerate(said) if each.text]
    if not answers:
        doubtful = min(each.logprob for each in said)
        return Answered(None, None, None, math.exp(doubtful), len(spans))
    best = max(answers, key=lambda place: said[place].logprob)
    begin, end = spans[best]
    found = find_span(context[begin:end], said[best].text)
    start, stop = (None, None) if found is None else (begin + found[0], begin + found[1])
    return Answered(said[best].text, start, stop, math.exp(said[best].logprob), len(spans))


def _refuse_empty(context: str, question: str) -> None:
    if not context.strip():
        raise DataError("the text is empty, so nothing can be answered from it", where="context")
    if not question.strip():
        raise UsageError("the question is empty")


def windows_of(tokenizer: TextTokenizer, text: str, room: int, overlap: float) -> list[tuple[int, int]]:
    """The characters of each window: at most `room` tokens, a share of them those of the window before."""
    offsets = tokenizer.encode_in_detail(text).offsets
    step = max(1, room - round(room * overlap))
    found: list[tuple[int, int]] = []
    for first in range(0, max(1, len(offsets) - room + step), step):
        last = min(first + room, len(offsets))
        begin = offsets[first][0] if first else 0
        found.append((begin, offsets[last - 1][1] if last < len(offsets) else len(text)))
    return found


def _said(generator: Generator, prompts: Sequence[str], limit: int, config: AnswerConfig) -> list[_Said]:
    """What the model says to each prompt, with the log-probability of the words and of what ends them."""
    sampling = SamplingConfig(temperature=config.temperature, top_p=1.0)
    samples: list[Sample] = []

    def rows() -> Iterator[Row]:
        for number, prompt in enumerate(prompts):
            ids = generator.tokenizer.encode(prompt, special=True)
            sampler = Sampler(
                sampling, seed=config.seed, stream=(number,), seen=ids, matcher=generator.characters.matcher()
            )
            row = Row(ids, sampler, limit, frozenset(), generator.tokenizer.vocab_size, logprobs=0)
            stops = StopStrings((ANSWER_STOP,))
            samples.append(Sample(generator.tokenizer, Prompt(prompt), number, row, stops, config.seed, 0))
            yield row

    texts, logprobs = [""] * len(prompts), [0.0] * len(prompts)
    for event in generator.decode(rows(), width=config.batch_size):
        sample = samples[event.row]
        if not isinstance(event, Token):
            texts[event.row] += sample.finish()
            continue
        logprobs[event.row] += event.choice.logprob
        if event.choice.id in generator.end_ids:  # not one of the row's ends, as those have no probability
            sample.row.finish_reason = STOP
        else:
            texts[event.row] += sample.push(event.choice)
    return [_Said(said_answer(text), logprob) for text, logprob in zip(texts, logprobs, strict=True)]
