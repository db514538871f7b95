"""Layouts of labelled data: which one a file has, and its examples, as a stream.

Invariant: a file has one layout, told from its first record and named; a record that does not fit it is an error with
file:line and the fields found, never an example of another kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from llmcli.config_finetune import LabelledConfig
from llmcli.data.examples import Example
from llmcli.errors import DataError

TASKS = ("chat", "classify", "answer", "summarize", "prefer", "embed", "choice")


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What a file was recognised as."""

    name: str  # "messages", "alpaca", "prompt/completion", "text/label", "squad 2.0", ...
    fields: tuple[str, ...]  # those that are used, by the file's own names; columns without a name by number, from 1
    header: bool  # the file's records have names; False: a table without a first line of names


@dataclasses.dataclass(frozen=True, slots=True)
class Splits:
    """The files of each part."""

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


def find_splits(inputs: Sequence[str]) -> Splits:
    """The parts that inputs have: files are training data, folders are looked through for train, valid and test.

    Raises DataError for an input that does not exist and for a folder whose files tell no part of training.
    """
    raise NotImplementedError


def recognise(path: str, task: str, config: LabelledConfig = LabelledConfig()) -> Layout:  # noqa: B008  (frozen)
    """The layout of a file for a task. Raises DataError with file:line, what is missing and the fields found."""
    raise NotImplementedError


def read_examples(
    paths: Sequence[str],
    task: str,
    config: LabelledConfig = LabelledConfig(),  # noqa: B008  (frozen)
    on_problem: Callable[[DataError], None] | None = None,
) -> Iterator[Example]:
    """The examples of all files in their order.

    Raises DataError at the first bad record (file:line, the missing field, the fields found), or hands it to
    `on_problem` and goes on.
    """
    raise NotImplementedError
