"""`summarize`: a summary of a text; of a long one, section by section, and then of the sections' summaries.

Invariant: every character of the text is read, in its order, however long it is; each round has fewer sections,
so it ends: where summaries are as long as what they summarize, the last of them are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from llmcli import settings as configs
from llmcli.config import GenerateConfig, SamplingConfig, SummarizeConfig
from llmcli.data.sections import sections_of
from llmcli.data.task_prompts import SUMMARY_STOP, summary_parts, summary_prompt
from llmcli.errors import DataError, UsageError
from llmcli.files.artefacts import Model
from llmcli.operations.generate import Failed, Generated, Generator, Prompt, open_generator
from llmcli.operations.records import Progress

_FEWEST = 8  # tokens of a section


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """A part of the text (its characters), and its summary."""

    start: int
    end: int
    summary: str


@dataclasses.dataclass(frozen=True, slots=True)
class Summarized:
    """A summary. `sections`: those of the text, where it was longer than the model's context; their summaries were
    summarized, in so many `rounds` in all."""

    summary: str
    tokens: int
    finish_reason: str  # as of `Generated`: length: it was cut by max_new_tokens
    sections: tuple[Section, ...]
    rounds: int


def summarize(
    model: Model,
    text: str,
    config: SummarizeConfig = SummarizeConfig(),  # noqa: B008  (frozen)
) -> Iterator[Progress | Summarized]:
    """Summarizes a text, by a decoder: a model folder, a run, or a base with an adapter. The summary comes last.

    Raises DataError for an empty text, UsageError for a model whose context has no room for one.
    """
    configs.check(config)
    if not text.strip():
        raise DataError("the text is empty, so there is nothing to summarize")
    generator = open_generator(model, device=config.device, threads=config.threads)
    try:
        yield from summarize_by(generator, text, config)
    finally:
        generator.session.close()


def summarize_by(
    generator: Generator,
    text: str,
    config: SummarizeConfig = SummarizeConfig(),  # noqa: B008  (frozen)
) -> Iterator[Progress | Summarized]:
    """As `summarize`, by a model that is loaded."""
    context, tokenizer = generator.session.context, generator.tokenizer
    around = len(tokenizer.encode("".join(summary_parts("")), special=True)) + 1
    room = context - around - max(1, min(config.max_new_tokens, context // 4))
    if room < _FEWEST:
        raise UsageError(f"the model's context of {context:,} tokens has no room for a text")

    def measure(piece: str) -> int:
        return len(tokenizer.encode(piece))

    first: tuple[Section, ...] = ()
    rest, rounds, before = text, 0, 0
    while True:
        rounds += 1
        parts = [part for part in sections_of(rest, measure, room) if part.strip()]
        if before and len(parts) >= before:
            parts = parts[: max(1, before - 1)]
        before = len(parts)
        made: list[Generated] = []
        for summary in _summaries(generator, parts, config, rounds):
            made.append(summary)
            if len(parts) > 1:
                yield Progress(f"round {rounds}", len(made), len(parts), "sections")
        if rounds == 1 and len(parts) > 1:
            first = _placed(text, parts, made)
        if len(made) == 1:
            last = made[0]
            yield Summarized(last.text.strip(), last.tokens, last.finish_reason, first, rounds)
            return
        rest = "\n\n".join(each.text.strip() for each in made if each.text.strip())
        if not rest:
            yield Summarized("", 0, made[-1].finish_reason, first, rounds)
            return


def _placed(text: str, parts: Sequence[str], made: Sequence[Generated]) -> tuple[Section, ...]:
    found: list[Section] = []
    place = 0
    for part, summary in zip(parts, made, strict=True):
        start = text.index(part, place)
        place = start + len(part)
        found.append(Section(start, place, summary.text.strip()))
    return tuple(found)


def _summaries(generator: Generator, parts: Sequence[str], config: SummarizeConfig, rounds: int) -> Iterator[Generated]:
    """A summary of each part, in their order."""
    context = generator.session.context
    settings = GenerateConfig(
        max_new_tokens=max(1, min(config.max_new_tokens, context // 4)),
        stop=(SUMMARY_STOP,),
        batch_size=config.batch_size,
        seed=config.seed + rounds - 1,
    )
    prompts = (Prompt(summary_prompt(part.strip()), number) for number, part in enumerate(parts))
    for record in generator.generate(prompts, settings, SamplingConfig(temperature=config.temperature)):
        if isinstance(record, Failed):
            raise record.error
        if isinstance(record, Generated):
            yield record
