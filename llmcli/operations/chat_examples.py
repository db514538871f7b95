"""Conversations to learn from: which part of the rendered text is the assistant's, and the ids of both parts.

Invariant: trained on is what the assistant says and the end token behind it, nothing else; and the ids before it are
those that `chat` gives the model when it asks for that answer.

The places are found by rendering: the conversation up to a message must be what the whole begins with. A template for
which that does not hold is refused by name, since any other guess would teach the wrong thing in silence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmcli.data.chat_template import ChatTemplate
from llmcli.data.examples import ChatExample
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError
from llmcli.operations.chat_ids import ChatIds, SpecialTokens

_TAIL = 200  # characters before a cut in which a place is sought whose ids do not depend on what precedes it


@dataclasses.dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and the parts of it (begin, end) that are trained on."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatExampleEncoder:
    """Encodes conversations for one template and tokenizer. Close it: the template has a process of its own."""

    def __init__(self, template: ChatTemplate, tokenizer: TextTokenizer) -> None:
        self.template, self._ids = template, ChatIds(template, tokenizer)

    def encode(self, example: ChatExample, first: int = 0) -> tuple[list[int], list[bool]]:
        """(ids, whether each is trained on), of the assistant's messages from the number `first` on.

        Raises DataError for a template that does not fit.
        """
        rendered = self.rendered(example, first)
        text = rendered.text
        cuts = sorted({0, len(text), *(place for span in rendered.spans for place in span)})
        ids: list[int] = []
        trained: list[bool] = []
        for begin, end in itertools.pairwise(cuts):
            piece = self._continued(text, begin, end)
            ids += piece
            trained += [any(start <= begin < stop for start, stop in rendered.spans)] * len(piece)
        return ids, trained

    def rendered(self, example: ChatExample, first: int = 0) -> Rendered:
        """The text, with placeholders for special tokens in what people wrote (`shown` puts them back)."""
        try:
            return trained_spans(self.template, example.messages, example.tools, self._ids.special, first)
        except DataError as error:
            raise DataError(str(error), where=example.where) from error

    def shown(self, rendered: Rendered) -> Rendered:
        """The text for people to read, without placeholders."""
        show = self._ids.special.shown
        spans = tuple(
            (len(show(rendered.text[:begin])), len(show(rendered.text[:end]))) for begin, end in rendered.spans
        )
        return Rendered(show(rendered.text), spans)

    def close(self) -> None:
        """Ends the template's process."""
        self._ids.close()

    def __enter__(self) -> ChatExampleEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _continued(self, text: str, begin: int, end: int) -> list[int]:
        """The ids of a piece as they follow what stands before it.

        Where the tokens of both would run into each other the piece is encoded alone, as the model sees it: at `begin`
        the prompt ends, and what it says are tokens of its own. Else it is encoded with the words before, because some
        tokenizers (SentencePiece's) put a space before whatever comes first.
        """
        encoded = self._ids.encoded
        if not begin:
            return encoded(text[:end])
        place = self._place_before(text, begin)
        if place is not None:
            before, both = encoded(text[place:begin]), encoded(text[place:end])
            if both[: len(before)] == before:
                return both[len(before) :]
        return encoded(text[begin:end])

    def _place_before(self, text: str, end: int) -> int | None:
        """The last special token of the template's before `end`, else the last newline."""
        begin = max(0, end - _TAIL)
        pattern = self._ids.special.pattern
        places = [match.start() for match in pattern.finditer(text, begin, end)] if pattern is not None else []
        if places:
            return places[-1]
        newline = text.rfind("\n", begin, end - 1)
        return newline if newline >= 0 else None


def trained_spans(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    special: SpecialTokens,
    first: int = 0,
) -> Rendered:
    """The text of a conversation and the parts of it that the assistant says, from message `first` on.

    Raises DataError where the template's renderings do not extend each other, or where it leaves out what was said.
    """
    hidden = [special.hidden(message) for message in messages]
    offered = None if tools is None else special.hidden(list(tools))

    spoken = [place for place, message in enumerate(hidden) if place >= first and message["role"] == "assistant"]
    parts = [(len(hidden), False)] + [part for place in spoken for part in ((place, True), (place + 1, False))]
    made = dict(zip(parts, template.render_parts(hidden, parts, tools=offered), strict=True))
    text = made[parts[0]]
    _refuse_lost(template, text, hidden, offered)
    spans = []
    for number in spoken:
        before = made[number, True]
        if not text.startswith(before):
            raise DataError(
                f"{template.where}: what it makes of the first {number} messages is not how the whole begins, so the "
                "assistant's part cannot be told"
            )
        begin = len(before)
        end = _end_of_turn(template, text, begin, made[number + 1, False], number, hidden, special)
        if not text[begin:end].strip():
            raise DataError(f"{template.where}: leaves out what the assistant says in message {number + 1}")
        spans.append((begin, end))
    return Rendered(text, tuple(spans))


def _end_of_turn(
    template: ChatTemplate,
    text: str,
    begin: int,
    whole: str,
    number: int,
    messages: Sequence[Mapping[str, Any]],
    special: SpecialTokens,
) -> int:
    """Behind the end token of a message, or behind the message where the template has none."""
    pattern = special.pattern
    end = len(whole)
    if not text.startswith(whole):
        # Some templates write the last answer otherwise than the earlier ones (its reasoning is kept). Its end token
        # still ends it, unless tool calls are written with special tokens of their own.
        found = pattern.search(text, begin) if pattern is not None and not messages[number].get("tool_calls") else None
        if found is None:
            raise DataError(
                f"{template.where}: what it makes of the first {number + 1} messages is not how the whole begins, "
                "so the assistant's part cannot be told"
            )
        return found.end()
    ends = [match.end() for match in pattern.finditer(text, begin, end)] if pattern is not None else []
    return ends[-1] if ends and not text[ends[-1] : end].strip() else end


def _refuse_lost(
    template: ChatTemplate, text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> None:
    """Raises DataError where a template passes over a system message, a call of a tool, or the tools."""
    for message in messages:
        if message["role"] == "system" and message["content"].strip() not in text:
            raise DataError(f"{template.where}: leaves out the system message")
        for call in message.get("tool_calls") or ():
            if call["function"]["name"] not in text:
                raise DataError(f"{template.where}: leaves out calls of tools")
    for tool in tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool, dict) else None
        if isinstance(name, str) and name not in text:
            raise DataError(
                f"{template.where}: leaves out the tools; take their field out of the data, or give another"
            )


def completion_ids(tokenizer: TextTokenizer, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """The prompt as `generate` encodes it, the completion as tokens of its own, the end token."""
    before = tokenizer.encode(prompt, special=True) if prompt else []
    if not before:  # something must stand before the first token that is learnt
        before = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    after = tokenizer.encode(completion) + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    return before + after, [False] * len(before) + [True] * len(after)


def token_sizes(tokenizer: TextTokenizer) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The bytes that each token stands for; special ones stand for none."""
    sizes = np.array([len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)], np.int64)
    sizes[sorted(tokenizer.special_ids)] = 0
    return sizes
