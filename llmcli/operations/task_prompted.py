"""Fine-tuning on a text and what is to be said about it: what tasks with a prompt of their own have in common.

Invariant: a model is asked as `task_prompts` says, and trained on is what it is to say, with the end token behind it;
cut is the text that is asked about, never the question or what is to be said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llmcli.data.cut_prompts import Parts, cut_prompt
from llmcli.data.examples import Example
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError
from llmcli.operations.chat_examples import token_sizes
from llmcli.operations.task_chat import ChatTask
from llmcli.operations.tasks import Row
from llmcli.training.packing import Packed


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """A prompt in parts, what is to be said, and which characters of the middle part it rests on."""

    parts: Parts
    said: str
    keep: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """Which ids of a row are trained on, and what the row was made from, to be cut."""

    trained: npt.NDArray[np.bool_]
    asked: Asked

    def tobytes(self) -> bytes:
        """What tells rows of the same ids apart."""
        return self.trained.tobytes()


class PromptedTask(ChatTask):
    """Rows: `wanted` is a `Wanted`. The model keeps its kind, its tokenizer and its ends."""

    stop: str  # what ends the model's words where its tokenizer has no end token

    def asked(self, example: Example) -> Asked:
        """What an example asks. Raises DataError for one of another task."""
        raise NotImplementedError

    def tokenizer(self, base: TextTokenizer) -> TextTokenizer:
        """The model's own."""
        self._tokenizer = base
        return base

    def encoded(self, examples: Iterable[Example], tokenizer: TextTokenizer) -> Iterator[Row]:
        """Prompt, what is to be said, end."""
        self._tokenizer, self._sizes = tokenizer, token_sizes(tokenizer)
        for example in examples:
            yield self._row(self.asked(example), example.where)

    def _row(self, asked: Asked, where: str) -> Row:
        tokenizer = self._tokenizer
        prompt = "".join(asked.parts)
        end = tokenizer.eos_id
        said = f" {asked.said}{self.stop if end is None else ''}"
        before = tokenizer.encode(prompt, special=True)
        whole = tokenizer.encode(prompt + said, special=True)
        # Encoded together the words begin as the model would go on; where they run into the prompt's end, they cannot.
        after = whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(said)
        if end is not None and after[-1:] != [end]:
            after = [*after, end]
        ids = np.array([*before, *after], np.int32)
        return Row(ids, Wanted(np.arange(len(ids)) >= len(before), asked), where)

    def cut(self, row: Row, length: int) -> Row | None:
        """A part of the text that is asked about, the one that the words rest on; None where none of it has room."""
        asked = row.wanted.asked
        parts = cut_prompt(self._tokenizer, asked.parts, length - int(row.wanted.trained.sum()), asked.keep)
        shorter = None if parts is None else self._row(dataclasses.replace(asked, parts=parts), row.where)
        return shorter if shorter is not None and len(shorter.ids) <= length else None

    def ends(self, tokenizer: TextTokenizer) -> Sequence[int]:
        """The end token that is trained on."""
        return () if tokenizer.eos_id is None else (tokenizer.eos_id,)

    def batch(self, rows: Sequence[Row]) -> tuple[Packed, Tensor]:
        """As a chat's."""
        return super().batch([dataclasses.replace(row, wanted=row.wanted.trained) for row in rows])


def of_another_task(example: Example, expected: str) -> DataError:
    """Why an example cannot be taken."""
    kind: Any = type(example).__name__
    return DataError(f"is no {expected}, but {kind}", where=example.where)
