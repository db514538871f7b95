"""Labelled files as rows to train and to validate on: read, encoded, bounded in length, split, checked for overlap.

Invariant: which rows are held out depends on their content and the seed alone, and equal rows stay together, so no row
that is trained on is validated on unless that was allowed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

from llmcli.config_finetune import FinetuneConfig, LabelledConfig
from llmcli.data.examples import Example
from llmcli.data.layouts import find_splits, read_examples
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError
from llmcli.operations.records import Progress
from llmcli.operations.tasks import Row, Task

_TOLD = 200  # rows between records of progress


@dataclasses.dataclass(frozen=True)
class TuningData:
    """What is trained on and what is held out, in the files' order."""

    train: list[Row]
    validation: list[Row]
    layouts: tuple[str, ...]
    cut: int
    dropped: int
    hash: str

    @property
    def mean_length(self) -> int:
        """Tokens of a training row."""
        return max(1, round(sum(len(row.ids) for row in self.train) / len(self.train)))

    def described(self) -> dict[str, str]:
        """A line for people."""
        parts = [f"{len(self.train):,} examples ({', '.join(self.layouts)}), {len(self.validation):,} to validate on"]
        parts += [f"{count:,} {what}" for count, what in ((self.cut, "cut"), (self.dropped, "left out")) if count]
        return {"data": f"{'; '.join(parts)}; {self.mean_length:,} tokens in the mean"}


def read_data(
    inputs: Sequence[str],
    task: Task,
    tokenizer: TextTokenizer,
    context: int,
    config: FinetuneConfig,
    labelled: LabelledConfig,
) -> Iterator[Progress | TuningData]:
    """Yields how far it is, and last the data. Raises DataError for what cannot be learnt from."""
    splits = find_splits(inputs)
    held_out = [*splits.validation, *([config.validation] if config.validation else [])]
    layouts: dict[str, None] = {}

    def read(paths: Sequence[str]) -> Iterator[Example]:
        return read_examples(paths, task.name, labelled, on_layout=lambda _, layout: layouts.setdefault(layout.name))

    longest = task.longest(min(context, config.max_length or context))
    parts: list[list[Row]] = []
    for paths in (splits.train, held_out):
        rows: list[Row] = []
        if paths:
            for row in task.encoded(read(paths), tokenizer):
                rows.append(row)
                if len(rows) % _TOLD == 0:
                    yield Progress("encoding", len(rows), None, "examples")
        parts.append(rows)
    train, validation = parts
    if not train:
        raise DataError("holds no example to train on", where=inputs[0])
    train, cut, dropped = _bounded([*train], task, longest, config.on_long)
    validation, cut_too, dropped_too = _bounded(validation, task, longest, config.on_long)
    if held_out:
        _refuse_overlap(train, validation, config)
    elif config.val_split:
        train, validation = _learnable(*_split(train, config), task)
    if not train:
        raise DataError(f"no example is left to train on: none fits in {longest:,} tokens", where=inputs[0])
    task.settle(train, validation)
    digest = hashlib.sha256()
    for rows in (train, validation):
        for row in rows:
            digest.update(_key(row))
        digest.update(b"|")
    found = tuple(layouts)
    yield TuningData(train, validation, found, cut + cut_too, dropped + dropped_too, digest.hexdigest())


def _key(row: Row) -> bytes:
    """What makes rows equal: what is read, and what is wanted of it."""
    wanted = row.wanted.tobytes() if hasattr(row.wanted, "tobytes") else repr(row.wanted).encode("utf-8", "replace")
    return hashlib.sha256(row.ids.tobytes() + b"|" + wanted).digest()


def _bounded(rows: list[Row], task: Task, longest: int, on_long: str) -> tuple[list[Row], int, int]:
    """The rows of at most `longest` ids; how many were cut, how many left out."""
    over = [row for row in rows if row.longest > longest]
    if not over:
        return rows, 0, 0
    if on_long == "error":
        worst = max(over, key=lambda row: row.longest)
        raise DataError(
            f"{len(over):,} of {len(rows):,} examples have more than {longest:,} tokens, the longest, this one, "
            f"{worst.longest:,}; cut them with --on-long cut, or leave them out with --on-long drop",
            where=worst.where,
        )
    kept: list[Row] = []
    cut = 0
    for row in rows:
        if row.longest <= longest:
            kept.append(row)
        elif on_long == "cut" and (shorter := task.cut(row, longest)) is not None:
            kept.append(shorter)
            cut += 1
    return kept, cut, len(rows) - len(kept)


def _split(rows: list[Row], config: FinetuneConfig) -> tuple[list[Row], list[Row]]:
    """Holds out a share of the rows, those whose hashes are the least; what goes together stays together."""
    seed = config.seed.to_bytes(8, "little")
    marks = [hashlib.sha256(seed + row.together).digest() for row in rows]
    wanted = max(1, round(config.val_split * len(rows)))
    if len(rows) < 2 or len(set(marks)) < 2:
        return rows, []
    chosen: set[bytes] = set()
    for count, mark in enumerate(sorted(marks)):  # equal ones stand side by side
        if mark not in chosen and count >= wanted:
            break
        chosen.add(mark)
    train = [row for row, mark in zip(rows, marks, strict=True) if mark not in chosen]
    held = [row for row, mark in zip(rows, marks, strict=True) if mark in chosen]
    return (train, held) if train else (rows, [])


def _learnable(train: list[Row], validation: list[Row], task: Task) -> tuple[list[Row], list[Row]]:
    """Gives training back what only validation would have: a rare label must be learnt before it is measured."""
    known = {each for row in train for each in task.classes(row)}
    back = {row.ids.tobytes() for row in validation if not known.issuperset(task.classes(row))}
    if not back:
        return train, validation
    held = [row for row in validation if row.ids.tobytes() not in back]
    return [*train, *(row for row in validation if row.ids.tobytes() in back)], held


def _refuse_overlap(train: Sequence[Row], validation: Sequence[Row], config: FinetuneConfig) -> None:
    known = {row.together for row in train}
    shared = [row for row in validation if row.together in known]
    if shared and not config.allow_overlap:
        raise DataError(
            f"{len(shared):,} of {len(validation):,} validation examples are trained on too, this one among them, so "
            "the figures would flatter; take them out, or --allow-overlap",
            where=shared[0].where,
        )
