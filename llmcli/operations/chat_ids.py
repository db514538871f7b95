"""A conversation as token ids: rendered by its template, what people wrote kept apart from what the template wrote.

Invariant: a special token that stands in a message's text is encoded as text; only the template's own are special. What
the model said keeps the ids that it said it with, so the next prompt begins with what the session holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmcli.data.chat_template import ChatTemplate
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError, LlmcliError

# Two noncharacters of Unicode, which no text may hold (section 23.7), around the number of a special token.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_HELD = re.compile(f"{_BEGIN}([0-9]+){_END}")
_MARK = "llmcli-answer"


class SpecialTokens:
    """Puts placeholders where special tokens stand in what people wrote."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self.special = {token: identity for token, identity in special.items() if token}
        names = sorted(self.special, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self._names = {identity: token for token, identity in self.special.items()}

    def hidden(self, value: Any, name: str = "") -> Any:
        """A message, or what it holds, with placeholders; roles are the template's business."""
        if isinstance(value, Mapping):
            return {key: self.hidden(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hidden(item) for item in value]
        if not isinstance(value, str) or name == "role":
            return value
        if _BEGIN in value:
            raise DataError("a message holds U+FDD0, which is no character")
        if self.pattern is None:
            return value
        return self.pattern.sub(lambda found: f"{_BEGIN}{self.special[found[0]]}{_END}", value)

    def shown(self, text: str) -> str:
        """The text with what stood in the placeholders' places."""
        return _HELD.sub(lambda found: self._names[int(found[1])], text)


class ChatIds:
    """Encodes conversations for one template and tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: TextTokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.special = SpecialTokens(
            {tokenizer.token(identity): identity for identity in sorted(tokenizer.special_ids)}
        )
        self._prompt: tuple[str, list[int]] = ("", [])  # the last that was encoded
        self._known: tuple[str, list[int]] = ("", [])  # a prompt, what was said after it, and the ids of both
        self._ends: frozenset[int] | None = None

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids up to where the answer begins. Raises DataError where the template does not take the messages."""
        text = self.template.render([self.special.hidden(message) for message in messages])
        known, ids = self._known
        # What follows the model's words begins with a token of the template's, or at least nothing was cut in two that
        # the model did not cut itself.
        begin = len(known) if known and text.startswith(known) else 0
        self._prompt = (text, [*(ids if begin else []), *self.encoded(text[begin:])])
        if not self._prompt[1]:
            raise DataError("makes no text of this conversation", where=self.template.where)
        return list(self._prompt[1])

    def said(self, text: str, ids: Sequence[int]) -> None:
        """What the model answered to the prompt that was encoded last: its text and the ids that it is made of."""
        if text and not self.tokenizer.special_ids.intersection(ids):  # those are not in the text
            self._known = (self._prompt[0] + self.special.hidden(text), [*self._prompt[1], *ids])

    @property
    def ends(self) -> frozenset[int]:
        """The special token that the template puts behind an answer, where it puts one."""
        if self._ends is None:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
            try:
                text = self.template.render(turns, add_generation_prompt=False)
            except LlmcliError:
                text = ""
            _, _, tail = text.rpartition(_MARK)
            first = self.tokenizer.encode(tail.lstrip(), parse_special=True)[:1] if tail != text else []
            self._ends = frozenset(first) & self.tokenizer.special_ids
        return self._ends

    def close(self) -> None:
        """Ends the template's process."""
        self.template.close()

    def encoded(self, text: str) -> list[int]:
        """Template's text, special tokens read, and in the placeholders' places plain text."""
        encode: Callable[..., list[int]] = self.tokenizer.encode
        ids: list[int] = []
        for place, piece in enumerate(_HELD.split(text)):
            if place % 2:
                ids += encode(self.tokenizer.token(int(piece)))
            elif piece:
                ids += encode(piece, parse_special=True)
        return ids
