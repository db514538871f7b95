"""Generation: prompts to text by a model, token by token, one prompt or a file of them.

Invariant: a sample's text depends on the model, its prompt, the settings, and (seed, number of its prompt, number of
the sample): not on the batch that it shared. Pieces of text hold whole characters only.
"""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmcli import config as configs
from llmcli.config import ConstraintConfig, GenerateConfig, SamplingConfig, SpeculationConfig
from llmcli.data.stop_strings import StopStrings
from llmcli.data.token_bytes import DecodeStream
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import ConfigError, DataError, LlmcliError, UsageError
from llmcli.files.artefacts import AdaptedModel, Model, end_ids, find_model, resolve_model
from llmcli.operations.constraints import Constrainer, Constraint, read_constraint
from llmcli.operations.prompt_cache import PromptCache
from llmcli.operations.speculation import check_speculation, open_speculation
from llmcli.runtime.characters import Characters
from llmcli.runtime.constraint import Grammar, Matcher
from llmcli.runtime.decoding import STOP, Finished, Row, Token, decode
from llmcli.runtime.sampling import Choice, Sampler
from llmcli.runtime.session import Logits, Session
from llmcli.runtime.speculation import Speculation

_LOOK_BACK = 16  # tokens of the prompt that the decoding of text begins with
_AHEAD = 8  # batches that may be done, at most, before the sample whose turn it is has ended: they are held until then


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue. `index` numbers it among all, `id` is the caller's; `error`: why there is no text."""

    text: str
    index: int = 0
    id: Any = None
    error: LlmcliError | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Text that a sample gained."""

    index: int
    sample: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural log-probability before any sampling setting, and the most probable ones in its place."""

    id: int
    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Generated:
    """A sample that ended."""

    index: int
    id: Any
    sample: int
    text: str  # what follows the prompt, without the stop string
    prompt_tokens: int
    tokens: int  # that were generated, the end of text not counted
    finish_reason: str  # stop: end of text or a stop string; length: max_new_tokens; cut: the context was full
    seed: int
    truncated_tokens: int  # left out at the prompt's begin
    logprobs: tuple[TokenLogprob, ...] | None = None
    valid: bool | None = None  # whether the text fits the constraint: not where it was cut short; None: there is none
    cached_tokens: int | None = None  # of the prompt's, those that came from a prompt cache; None: there is none
    drafted: int | None = None  # tokens that were guessed, and those of them that held; None: nothing was to be guessed
    accepted: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """A prompt that could not be continued."""

    index: int
    id: Any
    error: LlmcliError


class Generator:
    """A model that is loaded once and continues prompt after prompt; with `speculation` one row at a time."""

    def __init__(
        self,
        session: Session,
        tokenizer: TextTokenizer,
        end_ids: Iterable[int] = (),
        speculation: Speculation | None = None,
    ) -> None:
        if tokenizer.vocab_size > session.vocab_size:
            raise DataError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {session.vocab_size}")
        self.session, self.tokenizer, self.speculation = session, tokenizer, speculation
        self.end_ids = frozenset(end_ids) or frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))
        self.constrainer = Constrainer(tokenizer)

    @functools.cached_property
    def characters(self) -> Characters:
        """What keeps texts whole; where a decoder's steps are not understood, every token passes."""
        table = self.tokenizer.bytes_table
        return Characters(table.table if table.exact else [b""] * self.tokenizer.vocab_size, self.tokenizer.special_ids)

    def generate(
        self,
        prompts: Iterable[str | Prompt],
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 -- frozen
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
        constraint: Constraint | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> Iterator[Piece | Generated | Failed]:
        """Continues prompts, `batch_size` rows at a time; one that ends gives its place to the next.

        What ends comes in the order of the prompts and samples.

        A prompt that does not fit raises UsageError where it is a plain text; as a `Prompt` it yields a `Failed`.
        """
        configs.check(config)
        configs.check(sampling)
        if "" in config.stop:
            raise ConfigError("a stop string must not be empty", where="stop")
        if constraint is not None and (config.stop or config.ignore_eos):
            other = "--stop" if config.stop else "--ignore-eos"
            raise ConfigError(f"the constraint says where a text ends; leave {other} out", where=constraint.where)
        grammar = None if constraint is None else self.constrainer.grammar(constraint, self.end_ids)
        seed = new_seed() if config.seed is None else config.seed
        samples = (
            item
            for index, prompt in enumerate(prompts)
            for item in self._samples(prompt, index, config, sampling, grammar, seed)
        )
        yield from self._run(samples, config.batch_size, prompt_cache)

    def _samples(
        self,
        prompt: str | Prompt,
        index: int,
        config: GenerateConfig,
        sampling: SamplingConfig,
        grammar: Grammar | None,
        seed: int,
    ) -> Iterator[Sample | Failed]:
        """What a prompt asks for: its samples, all of one and the same list of ids, or why there are none."""
        try:
            numbered = prompt if isinstance(prompt, Prompt) else Prompt(prompt, index)
            if numbered.error is not None:
                raise numbered.error
            ids, left_out = self.prompt_ids(numbered.text, config)
        except LlmcliError as error:
            if isinstance(prompt, str):
                raise
            yield Failed(prompt.index, prompt.id, error)
            return
        for number in range(config.num_samples):
            matcher = self.characters.matcher() if grammar is None else grammar.matcher()
            row = Row(
                ids,
                Sampler(sampling, seed=seed, stream=(numbered.index, number), seen=ids, matcher=matcher),
                config.max_new_tokens,
                frozenset() if config.ignore_eos else self.end_ids,
                self.tokenizer.vocab_size,
                config.logprobs,
            )
            yield Sample(self.tokenizer, numbered, number, row, StopStrings(config.stop), seed, left_out)

    def _run(
        self, items: Iterable[Sample | Failed], width: int, cache: PromptCache | None
    ) -> Iterator[Piece | Generated | Failed]:
        """Continues samples, as many at once as `width` says. What ended waits until all before it have."""
        running: dict[int, tuple[int, Sample]] = {}  # by row: the place in the order, and the sample
        ended: dict[int, Generated | Failed] = {}
        due = 0

        def rows() -> Iterator[Row | None]:
            number = 0
            for place, item in enumerate(items):
                while running and place >= due + _AHEAD * width:
                    yield None
                if isinstance(item, Failed):
                    ended[place] = item
                    continue
                running[number] = (place, item)
                number += 1
                yield item.row

        prefill = None if cache is None else functools.partial(cache.prefill, self.session)
        for event in self.decode(rows(), prefill, width=width):
            place, sample = running[event.row]
            text = sample.push(event.choice) if isinstance(event, Token) else sample.finish()
            if text:
                yield Piece(sample.prompt.index, sample.number, text)
            if isinstance(event, Finished):
                del running[event.row]
                cached = None if cache is None else cache.reused
                made = dataclasses.replace(sample.result(), cached_tokens=cached)
                if self.speculation is not None:
                    made = dataclasses.replace(made, drafted=sample.row.drafted, accepted=sample.row.accepted)
                ended[place] = made
            while due in ended:
                yield ended.pop(due)
                due += 1
        for place in sorted(ended):
            yield ended[place]

    def decode(
        self,
        rows: Iterable[Row | None],
        prefill: Callable[[Sequence[int]], Logits] | None = None,
        *,
        width: int | None = None,
    ) -> Iterator[Token | Finished]:
        """Grows rows, see `decoding.decode`; with guesses, where the generator has some, one row after the other."""
        if self.speculation is None:
            yield from decode(self.session, rows, prefill, width=width)
            return
        for number, row in enumerate(row for row in rows if row is not None):
            for event in self.speculation.decode(self.session, row, prefill):
                yield dataclasses.replace(event, row=number)

    def prompt_ids(self, text: str, config: GenerateConfig) -> tuple[list[int], int]:
        """The ids of a prompt, and how many were left out at its begin. Raises UsageError for one that does not fit."""
        tokenizer, context = self.tokenizer, self.session.context
        ids = tokenizer.encode(text, special=True)
        if not ids:
            if tokenizer.begin_id is None:
                raise DataError("the tokenizer has no token that begins a text, so an empty prompt cannot be continued")
            ids = [tokenizer.begin_id]
        if len(ids) <= context:
            return ids, 0
        if not config.truncate:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the model's context is {context}; --truncate keeps its end"
            )
        kept = max(1, context - min(config.max_new_tokens, context // 2))
        return ids[-kept:], len(ids) - kept


class Sample:
    """A row of ids that becomes text."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt: Prompt,
        number: int,
        row: Row,
        stops: StopStrings,
        seed: int,
        left_out: int,
    ) -> None:
        self.prompt, self.number, self.row = prompt, number, row
        self._tokenizer, self._stops, self._seed, self._left_out = tokenizer, stops, seed, left_out
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._stream = tokenizer.stream(skip_special=True)
        # Some of the prompt goes first: a decoder may strip the space that begins a text, which this one is not.
        for identity in row.prompt[-_LOOK_BACK:]:
            self._stream.push(identity)

    def push(self, choice: Choice) -> str:
        """Takes a token; the text that is certain by it. Ends the row where a stop string is met."""
        if self.row.logprobs is not None:
            token = self._tokenizer.token_text
            top = tuple((token(identity), logprob) for identity, logprob in choice.top)
            self._logprobs.append(TokenLogprob(choice.id, token(choice.id), choice.logprob, top))
        text = self._stops.push(self._stream.push(choice.id))
        if self._stops.met is not None:
            self.row.finish_reason = STOP
        self._text.append(text)
        return text

    def finish(self) -> str:
        """The text that was held back, as nothing follows."""
        text = ""
        if self._stops.met is None:
            # A character that the limit of tokens cut in two is left out.
            cut = self.row.finish_reason != STOP and isinstance(self._stream, DecodeStream)
            text = self._stops.push("" if cut else self._stream.flush())
            if self._stops.met is None:
                text += self._stops.flush()
        self._text.append(text)
        return text

    def result(self) -> Generated:
        """The sample as it ended."""
        matcher = self.row.sampler.matcher
        return Generated(
            index=self.prompt.index,
            id=self.prompt.id,
            sample=self.number,
            text="".join(self._text),
            prompt_tokens=len(self.row.prompt),
            tokens=len(self.row.ids),
            finish_reason=STOP if self._stops.met is not None else self.row.finish_reason or STOP,
            seed=self._seed,
            truncated_tokens=self._left_out,
            logprobs=tuple(self._logprobs) if self.row.logprobs is not None else None,
            valid=matcher.complete if isinstance(matcher, Matcher) else None,
        )


def open_generator(
    model: Model,
    *,
    device: str = "auto",
    threads: int | None = None,
    fast: bool = False,
    quantize: str | None = None,
    speculation: SpeculationConfig = SpeculationConfig(),  # noqa: B008 -- frozen
) -> Generator:
    """Loads a model folder, or a run's result. `fast`, `quantize`: see `GenerateConfig`."""
    from llmcli.runtime.open import open_session

    place = find_model(model)
    tokenizer = load_tokenizer(place.texts)
    draft = check_speculation(speculation, tokenizer)
    session = open_session(place, device=device, threads=threads, quantize=quantize)
    guessing = open_speculation(speculation, session, draft, device=device, threads=threads, fast=fast)
    return Generator(session, tokenizer, end_ids(place.texts), guessing)


def generate(
    model: Model,
    prompts: str | Iterable[str | Prompt],
    config: GenerateConfig = GenerateConfig(),  # noqa: B008  (frozen)
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
    constraint: ConstraintConfig = ConstraintConfig(),  # noqa: B008
    speculation: SpeculationConfig = SpeculationConfig(),  # noqa: B008
    *,
    prompt_cache: str | Path | None = None,
) -> Iterator[Piece | Generated | Failed]:
    """Continues a prompt, or many, by a model folder or a run; see `Generator.generate`.

    `prompt_cache`: a file that keeps what the model computed of a prompt; it goes with one prompt.
    """
    asked = read_constraint(constraint)
    if prompt_cache is not None and not isinstance(prompts, str):
        raise UsageError("a prompt cache goes with one prompt", where=str(prompt_cache))
    cache = None if prompt_cache is None else PromptCache(prompt_cache, cached_model(model), config.quantize)
    generator = open_generator(
        model,
        device=config.device,
        threads=config.threads,
        fast=config.fast,
        quantize=config.quantize,
        speculation=speculation,
    )
    try:
        texts = [prompts] if isinstance(prompts, str) else prompts
        yield from generator.generate(texts, config, sampling, asked, cache)
    finally:
        generator.session.close()


def cached_model(model: Model) -> Path:
    """The folder that a prompt cache is kept for. Raises UsageError for a model with an adapter."""
    if isinstance(model, AdaptedModel):
        raise UsageError("a prompt cache does not go with --adapter; llmcli merge makes one model of both")
    return resolve_model(model)


def new_seed() -> int:
    """A seed that was not used before, short enough to be typed again."""
    return secrets.randbits(32)
