"""Texts to tell apart: sentences, whole texts, or pairs that belong together, as ids, split, without doubles.

Invariant: which texts are held out depends on their content and the seed alone; the order is that of the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.config import ObjectiveConfig, PretrainConfig, TextConfig
from llmcli.config_finetune import LabelledConfig
from llmcli.data.examples import ScoredPairExample, TripletExample
from llmcli.data.formats import Source, find_inputs
from llmcli.data.layouts import read_examples, recognise
from llmcli.data.readers import read_documents
from llmcli.data.sentences import sentences_of
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError
from llmcli.operations.records import Progress

Ids = npt.NDArray[np.integer[Any]]
Group = tuple[Ids, ...]  # a text alone, a pair, or a pair and what does not belong to it

_AT_ONCE = 1000  # texts that are encoded together
_HELD_OUT = 2048  # groups at most
_FEW = 4  # fewer are all trained on
_PAIRS = "anchor/positive/negative"


@dataclasses.dataclass(frozen=True)
class ContrastData:
    """What is trained on and what is held out."""

    train: list[Group]
    validation: list[Group]
    hash: str
    doubles: int  # that were left out
    cut: int  # texts of which the end is not read

    @property
    def mean_length(self) -> int:
        """Tokens of the texts of a training group, one view of each."""
        return max(1, round(sum(len(group[0]) for group in self.train) / len(self.train)))

    def described(self) -> str:
        """A line for people."""
        what = {1: "texts", 2: "pairs", 3: "triplets"}[len(self.train[0])]
        parts = [f"{len(self.train):,} {what}, {len(self.validation):,} to validate on"]
        parts += [
            f"{count:,} {told}" for count, told in ((self.doubles, "doubles left out"), (self.cut, "cut")) if count
        ]
        return f"{'; '.join(parts)}; {self.mean_length:,} tokens in the mean"


@dataclasses.dataclass(frozen=True)
class ScoredPairs:
    """Pairs of texts with the score that people gave them."""

    first: list[Ids]
    second: list[Ids]
    scores: npt.NDArray[np.float64]


def read_groups(
    inputs: Sequence[str],
    tokenizer: TextTokenizer,
    longest: int,
    config: PretrainConfig,
    text: TextConfig,
    objective: ObjectiveConfig,
) -> Iterator[Progress | ContrastData]:
    """Yields how far it is, and last the data. Raises DataError for what cannot be learnt from."""
    known: set[bytes] = set()
    groups: list[Group] = []
    keys: list[bytes] = []
    cut = seen = 0
    for texts in _batched(_texts(find_inputs(inputs), text, objective)):
        encoded = iter(tokenizer.encode_batch([each for group in texts for each in group], special=True))
        for group in texts:
            ids = [np.asarray(next(encoded), np.int32) for _ in group]
            cut += sum(len(each) > longest for each in ids)
            row = tuple(shortened(each, longest) for each in ids)
            key = hashlib.sha256(b"|".join(each.tobytes() for each in row)).digest()
            seen += 1
            if key not in known:
                known.add(key)
                groups.append(row)
                keys.append(key)
        yield Progress("encoding", seen, None, "texts")
    widths = {len(group) for group in groups}
    if len(widths) > 1:
        raise DataError("holds texts alone and pairs, or pairs with and without a third text; give one kind")
    if len(groups) < 2:
        raise DataError(f"holds {len(groups)} texts; two at least are needed to tell apart", where=", ".join(inputs))
    seed = config.seed.to_bytes(8, "little")
    order = sorted(range(len(groups)), key=lambda place: hashlib.sha256(seed + keys[place]).digest())
    wanted = max(2, int(config.val_fraction * len(groups))) if config.val_fraction and len(groups) >= _FEW else 0
    held = set(order[: min(_HELD_OUT, wanted)])
    digest = hashlib.sha256(b"".join(keys) + seed + str(config.val_fraction).encode())
    yield ContrastData(
        [group for place, group in enumerate(groups) if place not in held],
        [group for place, group in enumerate(groups) if place in held],
        digest.hexdigest(),
        seen - len(groups),
        cut,
    )


def read_scored(path: str, tokenizer: TextTokenizer, longest: int) -> ScoredPairs:
    """The scored pairs of a file. Raises DataError where it holds none."""
    first: list[Ids] = []
    second: list[Ids] = []
    scores = []
    for example in read_examples([path], "embed"):
        if not isinstance(example, ScoredPairExample):
            raise DataError("has no score", where=example.where)
        for side, each in ((first, example.first), (second, example.second)):
            side.append(shortened(np.asarray(tokenizer.encode(each, special=True), np.int32), longest))
        scores.append(example.score)
    if len(set(scores)) < 2:
        raise DataError("its scores are all equal; nothing can be measured by them", where=path)
    return ScoredPairs(first, second, np.array(scores))


def shortened(ids: Ids, longest: int) -> Ids:
    """At most so many ids, of which the last stays: it closes the frame."""
    return ids if len(ids) <= longest else np.concatenate([ids[: longest - 1], ids[-1:]])


def _texts(sources: Sequence[Source], text: TextConfig, objective: ObjectiveConfig) -> Iterator[tuple[str, ...]]:
    for source in sources:
        if _holds_pairs(source):
            yield from _pairs(source)
            continue
        for document in read_documents([source], text):
            found = sentences_of(document.text) if objective.cut_sentences else [document.text.strip()]
            if objective.views == "next":  # the last one has none: it goes with itself
                yield from zip(found, [*found[1:], *found[-1:]], strict=True)
            else:
                yield from ((each,) for each in found if each)


def _holds_pairs(source: Source) -> bool:
    """Whether a file's fields are those of texts that belong together. Raises DataError for scored pairs."""
    if source.format == "text" or source.path is None:
        return False
    try:
        layout = recognise(source.path, "embed")
    except DataError:
        return False  # told by whoever reads it as text, if it is none
    if layout.name != _PAIRS and layout.header:
        raise DataError(
            "holds scored pairs: finetune embed learns from them, --scored validates on them", where=source.name
        )
    return layout.name == _PAIRS


def _pairs(source: Source) -> Iterator[tuple[str, ...]]:
    for example in read_examples([str(source.path)], "embed", LabelledConfig()):
        if not isinstance(example, TripletExample):
            raise DataError("is no pair of texts that belong together", where=example.where)
        pair = (example.anchor, example.positive)
        yield pair if example.negative is None else (*pair, example.negative)


def _batched(texts: Iterator[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    held: list[tuple[str, ...]] = []
    for group in texts:
        held.append(group)
        if len(held) == _AT_ONCE:
            yield held
            held = []
    if held:
        yield held
