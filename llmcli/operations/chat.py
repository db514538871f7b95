"""Chat: a conversation with a model, turn by turn; what the session holds of it is not computed again.

Invariant: the history holds whole messages alone. A question that could not be answered is not in it; an answer that
was stopped is, as far as it was shown.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcli import config as configs
from llmcli.config import ChatConfig, ConstraintConfig, SamplingConfig, SpeculationConfig
from llmcli.data.chat_template import ChatTemplate, open_template
from llmcli.data.rows import read_rows
from llmcli.data.stop_strings import StopStrings
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import ConfigError, DataError, UsageError
from llmcli.files.artefacts import Model, find_model
from llmcli.files.atomic import write_file
from llmcli.operations.chat_ids import ChatIds
from llmcli.operations.constraints import Constraint, read_constraint
from llmcli.operations.generate import Generator, Piece, Prompt, Sample, cached_model, new_seed, open_generator
from llmcli.operations.prompt_cache import PromptCache
from llmcli.runtime.decoding import Row, Token
from llmcli.runtime.prefix import Prefix, StoppedPrefill
from llmcli.runtime.sampling import Sampler
from llmcli.runtime.session import Logits

STOPPED = "stopped"
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """An answer that ended."""

    content: str
    prompt_tokens: int
    cached_tokens: int  # of them, those that the session held already
    tokens: int
    finish_reason: str  # stop, length, cut: as of `Generated`; stopped: by the reader
    seed: int
    left_out: int  # messages of the history that the model did not see, as the context was full
    valid: bool | None = None  # as of `Generated`
    drafted: int | None = None  # as of `Generated`
    accepted: int | None = None


class Chat:
    """A conversation. `messages` is its history, `system` first where there is one."""

    def __init__(
        self,
        generator: Generator,
        template: ChatTemplate,
        config: ChatConfig = ChatConfig(),  # noqa: B008 -- frozen
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
        *,
        system: str | None = None,
        constraint: Constraint | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        configs.check(config)
        configs.check(sampling)
        if "" in config.stop:
            raise ConfigError("a stop string must not be empty", where="stop")
        if constraint is not None and config.stop:
            raise ConfigError("the constraint says where a text ends; leave --stop out", where=constraint.where)
        self.generator, self.config, self.sampling = generator, config, sampling
        self.seed = new_seed() if config.seed is None else config.seed
        self.messages: list[Message] = []
        self._ids = ChatIds(template, generator.tokenizer)
        self._ends = generator.end_ids | self._ids.ends
        self._grammar = None if constraint is None else generator.constrainer.grammar(constraint, self._ends)
        self._prefix = Prefix(generator.session, go_on=lambda: not self._stop)
        self._cache = prompt_cache
        self._stop = False
        self._attempt = self._first = 0  # answers to the last question; the first message that the model sees
        self.set_system(system)

    # ------------------------------------------------------------------------------------------------------------
    # The history

    @property
    def system(self) -> str | None:
        """The system prompt."""
        first = self.messages[0] if self.messages else {}
        return str(first["content"]) if first.get("role") == "system" else None

    def set_system(self, text: str | None) -> None:
        """Puts another system prompt in the place of the one there is; none for None or an empty one."""
        rest = self.messages[1:] if self.system is not None else self.messages
        self._given: list[Message] = [{"role": "system", "content": text}] if text else []
        self._replace([*self._given, *rest])

    def reset(self) -> None:
        """Forgets everything but the system prompt."""
        self._replace(self.messages[:1] if self.system is not None else [])

    def begin(self, messages: Sequence[Message]) -> None:
        """Takes a history in place of the one there is; one without a system prompt gets that of `set_system`."""
        brings = bool(messages) and messages[0].get("role") == "system"
        self._replace([*([] if brings else self._given), *messages])

    def _replace(self, messages: Sequence[Message]) -> None:
        self.messages, self._first, self._attempt = list(messages), 0, 0

    def save(self, path: str | Path) -> None:
        """Writes the history as JSON Lines, a message each."""
        write_file(path, "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in self.messages))

    def load(self, path: str | Path) -> None:
        """Takes the history of a file that `save` wrote. Raises DataError for what is none; the old one then stays."""
        found: list[Message] = []
        for row in read_rows(str(path)):
            if row.error is not None:
                raise row.error
            found += as_messages(row.content, row.where)
        self._replace(found)

    # ------------------------------------------------------------------------------------------------------------
    # Turns

    def ask(self, question: str | Message) -> Iterator[Piece | Answer]:
        """Answers a message. Raises UsageError when the context is full; the message is then not in the history."""
        message = {"role": "user", "content": question} if isinstance(question, str) else question
        yield from self.answer([*self.messages, message])

    def regenerate(self) -> Iterator[Piece | Answer]:
        """Answers the last question anew, by other random numbers; the answer there was stays where that fails."""
        kept = self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else self.messages
        if not kept or kept[-1]["role"] == "system":
            raise UsageError("there is no question to answer again")
        yield from self.answer(list(kept), self._attempt + 1)

    def stop(self) -> None:
        """Ends the answer under way at its next token; for a signal handler."""
        self._stop = True

    def answer(self, messages: Sequence[Message], attempt: int = 0) -> Iterator[Piece | Answer]:
        """Answers a history, which becomes the chat's with the answer. Nothing is kept of a question stopped unread."""
        if not messages or messages[-1]["role"] in ("assistant", "system"):
            raise UsageError("there is no question: a history must end with what is to be answered")
        self._stop = False
        first, ids = self._fitting(messages)
        turn = sum(message["role"] == "user" for message in messages)
        matcher = self.generator.characters.matcher() if self._grammar is None else self._grammar.matcher()
        sampler = Sampler(self.sampling, seed=self.seed, stream=(turn, attempt), seen=ids, matcher=matcher)
        vocab_size = self.generator.tokenizer.vocab_size
        row = Row(ids, sampler, self.config.max_new_tokens, self._ends, vocab_size)
        stops = StopStrings(self.config.stop)
        sample = Sample(self.generator.tokenizer, Prompt(""), 0, row, stops, self.seed, 0)
        try:
            for event in self.generator.decode([row], self._prefill):
                text = sample.push(event.choice) if isinstance(event, Token) else sample.finish()
                if self._stop and row.finish_reason is None:
                    row.finish_reason = STOPPED
                if text:
                    yield Piece(turn, 0, text)
        except StoppedPrefill:
            return
        except BaseException:
            self._prefix.forget()
            raise
        self._prefix.settle([*ids, *row.ids])
        made = sample.result()
        if stops.met is None:
            self._ids.said(made.text, row.ids)
        left_out = len(messages) - len(self._shown(messages, first))
        self.messages = [*messages, {"role": "assistant", "content": made.text}]
        self._first, self._attempt = first, attempt
        known = (self._prefix.reused, made.tokens, made.finish_reason, self.seed, left_out, made.valid)
        guesses = (None, None) if self.generator.speculation is None else (row.drafted, row.accepted)
        yield Answer(made.text, len(ids), *known, *guesses)

    def _prefill(self, ids: Sequence[int]) -> Logits:
        """Reads a prompt from where it differs from what the session, or at first the prompt cache, holds."""
        if self._cache is not None and not self._prefix.held:
            self._cache.fill(self._prefix, ids)
        logits = self._prefix.prefill(ids)
        if self._cache is not None:
            self._cache.keep(self.generator.session, ids)
        return logits

    def _fitting(self, messages: Sequence[Message]) -> tuple[int, list[int]]:
        """(the first message that is shown beside the system prompt, the ids). Raises UsageError where it is too long.

        Under `--keep system+last` turns are left out until half of the context is free, so that not every turn after
        has to be read anew from its begin.
        """
        context, first = self.generator.session.context, self._first
        ids = self._ids.encode(self._shown(messages, first))
        hint = "begin anew, or let the oldest turns be left out: --keep system+last"
        if self.config.keep != "all":
            hint = "even the last message alone does not fit"
            if len(ids) + min(self.config.max_new_tokens, context // 4) > context:
                turns = [place for place, message in enumerate(messages) if message["role"] == "user"]
                for first in (turn for turn in turns if turn > self._first):
                    ids = self._ids.encode(self._shown(messages, first))
                    if len(ids) <= context // 2:
                        break
        if len(ids) > context:
            raise UsageError(f"the conversation has {len(ids):,} tokens, the model's context is {context:,}; {hint}")
        return first, ids

    @staticmethod
    def _shown(messages: Sequence[Message], first: int) -> list[Message]:
        head = list(messages[:1]) if first and messages[0]["role"] == "system" else []
        return [*head, *messages[first:]]

    def close(self) -> None:
        """Lets the model and the template's process go."""
        self._ids.close()
        self.generator.session.close()


def as_messages(value: Any, where: str) -> list[Message]:
    """A message, or a list of them, from JSON. Raises DataError for anything else."""
    found = value if isinstance(value, list) else [value]
    for message in found:
        if not isinstance(message, dict):
            raise DataError("a message is a JSON object with role and content", where=where)
        for name, kinds in (("role", str), ("content", str | list)):
            if not isinstance(message.get(name), kinds):
                what = "is no text" if name in message else "is missing"
                raise DataError(f"the message's field {name!r} {what}", where=where)
    if not found:
        raise DataError("there is no message in the list", where=where)
    return list(found)


def open_chat(
    model: Model,
    config: ChatConfig = ChatConfig(),  # noqa: B008 -- frozen
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
    *,
    system: str | None = None,
    template: str | Path | None = None,
    constraint: ConstraintConfig = ConstraintConfig(),  # noqa: B008
    speculation: SpeculationConfig = SpeculationConfig(),  # noqa: B008
    prompt_cache: str | Path | None = None,
) -> Chat:
    """Loads a model folder, or a run's result, for a conversation.

    `template`: a Jinja file in place of its own; `prompt_cache`: a file that keeps the first prompt, once read.
    """
    asked = read_constraint(constraint)
    opened = open_template(load_tokenizer(find_model(model).texts), template)  # before the weights: it may be missing
    try:
        cache = None if prompt_cache is None else PromptCache(prompt_cache, cached_model(model))
        generator = open_generator(
            model,
            device=config.device,
            threads=config.threads,
            fast=config.fast,
            quantize=config.quantize,
            speculation=speculation,
        )
        return Chat(generator, opened, config, sampling, system=system, constraint=asked, prompt_cache=cache)
    except BaseException:
        opened.close()
        raise
