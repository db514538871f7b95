"""Checking labelled data: what was recognised, how long it is, and what fine-tuning would stop at, with file and line.

Invariant: every example is looked at; a bad one is reported and passed over, so that one run shows all that must be
mended. Memory grows by some 30 bytes an example, for equal ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmcli import config as configs
from llmcli.config import LabelledConfig
from llmcli.data import chatml
from llmcli.data.chat_template import ChatTemplate, open_template
from llmcli.data.dedup import DigestSet
from llmcli.data.example_text import key_of, texts_of
from llmcli.data.examples import (
    ChatExample,
    CompletionExample,
    Example,
    LabelExample,
    PreferenceExample,
    TextExample,
)
from llmcli.data.formats import find_inputs
from llmcli.data.layouts import Layout, find_splits, read_examples
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import ConfigError, DataError
from llmcli.files.artefacts import read_json, resolve_model
from llmcli.operations.chat_examples import ChatExampleEncoder, Rendered, trained_spans
from llmcli.operations.chat_ids import SpecialTokens
from llmcli.operations.check_data import Place, median_of, rounded
from llmcli.operations.records import Progress

_SHOWN = 20  # places of each kind that are named
_STEP = 1 << 20  # bytes between two records of progress


@dataclasses.dataclass(frozen=True)
class LabelledFile:
    """One file and what it was recognised as."""

    name: str
    part: str  # train, validation, test
    layout: str
    fields: tuple[str, ...]
    header: bool
    examples: int


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of one text in each example."""

    shortest: int
    median: int
    longest: int


@dataclasses.dataclass(frozen=True)
class LabelledReport:
    """What the files hold. `problems` stop fine-tuning with its defaults; `warnings` do not."""

    task: str
    files: tuple[LabelledFile, ...]
    examples: dict[str, int]  # by part
    unit: str  # of the lengths: tokens or characters
    lengths: dict[str, Lengths]  # input, output, whole
    context: int | None
    over_context: int  # examples that are longer
    duplicates: int  # equal to an earlier one of the same part
    overlap: dict[str, int]  # by part: examples equal to one of training
    labels: dict[str, dict[str, int]]  # by part: label and how many
    places: tuple[Place, ...]
    template: str
    rendered: Rendered | None  # the first conversation; spans are trained on
    warnings: tuple[str, ...]
    problem_count: int
    problems: tuple[str, ...]  # the first of them

    @property
    def ok(self) -> bool:
        """Whether fine-tuning would take it as it is."""
        return not self.problem_count


def check_labelled(
    inputs: Sequence[str],
    task: str,
    config: LabelledConfig = LabelledConfig(),  # noqa: B008  (frozen)
    *,
    model: str | Path | None = None,
    tokenizer: str | Path | None = None,
    context: int | None = None,
) -> Iterator[Progress | LabelledReport]:
    """Reads everything. Yields Progress, last a LabelledReport.

    With a model (or a tokenizer) lengths are tokens, and conversations are rendered by its template. Raises DataError
    for an input that is not there.
    """
    configs.check(config)
    if model is not None and tokenizer is not None:
        raise ConfigError("give a model or a tokenizer, not both", where="tokenizer")
    opened = None
    if model is not None:
        folder = resolve_model(model)
        opened = load_tokenizer(folder)
        if context is None:
            values = read_json(folder / "config.json")
            found = values.get("max_position_embeddings", values.get("n_positions"))
            context = found if isinstance(found, int) else None
    elif tokenizer is not None:
        opened = load_tokenizer(tokenizer)
    splits = find_splits(inputs)
    with contextlib.ExitStack() as stack:
        tally = _Tally(task, opened, context, stack)
        for part, paths in dataclasses.asdict(splits).items():
            for path in paths:
                yield from tally.read(part, path, config)
        yield tally.report()


class _Tally:
    def __init__(
        self, task: str, tokenizer: TextTokenizer | None, context: int | None, stack: contextlib.ExitStack
    ) -> None:
        self.task, self.context = task, context
        self.template = ""
        self.encoder: ChatExampleEncoder | None = None
        self.plain: ChatTemplate | None = None  # a template without a tokenizer
        if task in ("chat", "prefer"):
            if tokenizer is None:
                self.template = "ChatML, as a preview"
                self.plain = stack.enter_context(ChatTemplate(chatml.TEMPLATE, where="ChatML"))
            else:
                self.template = "the model's own"
                if tokenizer.chat_template is None:
                    self.template, tokenizer = "ChatML, since the model has none", chatml.with_chatml(tokenizer)
                self.encoder = stack.enter_context(ChatExampleEncoder(open_template(tokenizer), tokenizer))
        self.tokenizer = tokenizer
        self.files: list[LabelledFile] = []
        self.examples: Counter[str] = Counter()
        self.lengths: dict[str, Counter[int]] = {}
        self.extremes: dict[str, tuple[int, int]] = {}
        self.seen: dict[str, DigestSet] = {}
        self.labels: dict[str, Counter[str]] = {}
        self.first_of: dict[str, str] = {}  # a label of validation or test, and where it is first seen
        self.counts: Counter[str] = Counter()
        self.overlap: Counter[str] = Counter()
        self.places: dict[str, list[Place]] = {}
        self.rendered: Rendered | None = None
        self.problems: list[str] = []
        self.problem_count = 0

    def problem(self, error: DataError) -> None:
        """Notes what would stop fine-tuning."""
        self.problem_count += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(str(error))

    def read(self, part: str, path: str, config: LabelledConfig) -> Iterator[Progress]:
        """Looks at the examples of a file."""
        layouts: list[Layout] = []
        source = find_inputs([path])[0]
        done = told = count = 0

        def read(size: int) -> None:
            nonlocal done
            done += size

        for example in read_examples(
            [path], self.task, config, self.problem, on_layout=lambda _, found: layouts.append(found), on_bytes=read
        ):
            count += 1
            try:
                self._take(part, example)
            except DataError as error:
                self.problem(error)
            if done - told >= _STEP:
                told = done
                yield Progress("check", done, source.size, "bytes")
        if layouts:
            self.files.append(LabelledFile(path, part, layouts[0].name, layouts[0].fields, layouts[0].header, count))

    def _take(self, part: str, example: Example) -> None:
        self.examples[part] += 1
        key = key_of(example)
        if not self.seen.setdefault(part, DigestSet()).add(key):
            self._note("duplicate", example.where, "is equal to an earlier example")
        if part != "train" and key in self.seen.get("train", ()):
            self.overlap[part] += 1
            self._note("overlap", example.where, "is in the training data too")
        if isinstance(example, LabelExample):
            self.labels.setdefault(part, Counter()).update(example.labels)
            if part != "train":
                for label in example.labels:
                    self.first_of.setdefault(label, example.where)
        given, said = self._lengths(example)
        for name, length in (("input", given), ("output", said), ("whole", given + said)):
            self.lengths.setdefault(name, Counter())[rounded(length)] += 1
            low, high = self.extremes.get(name, (length, length))
            self.extremes[name] = (min(low, length), max(high, length))
        if self.context is not None and self.tokenizer is not None and given + said > self.context:
            self._note("long", example.where, f"has {given + said:,} tokens, more than the context of {self.context:,}")

    def _lengths(self, example: Example) -> tuple[int, int]:
        chat = None
        first = 0
        if isinstance(example, ChatExample):
            chat = example
        elif isinstance(example, PreferenceExample):
            first = len(example.prompt)
            chat = ChatExample((*example.prompt, *example.chosen), None, example.where)
        if chat is not None and self.encoder is not None:
            if self.rendered is None:
                self.rendered = self.encoder.shown(self.encoder.rendered(chat, first))
            _, trained = self.encoder.encode(chat, first)
            return len(trained) - sum(trained), sum(trained)
        if chat is not None and self.rendered is None and self.plain is not None:
            special = SpecialTokens({token: place for place, token in enumerate(chatml.TOKENS)})
            self.rendered = trained_spans(self.plain, chat.messages, chat.tools, special, first)
        given, said = texts_of(example)
        if self.rendered is None and isinstance(example, CompletionExample | TextExample):
            self.template = "no template"
            self.rendered = Rendered(given + said, ((len(given), len(given + said)),))
        if self.tokenizer is None:
            return len(given), len(said)
        return len(self.tokenizer.encode(given)), len(self.tokenizer.encode(said))

    def _note(self, kind: str, where: str, what: str) -> None:
        self.counts[kind] += 1
        places = self.places.setdefault(kind, [])
        if len(places) < _SHOWN:
            places.append(Place(where, what))

    def report(self) -> LabelledReport:
        """The last record."""
        warnings = []
        if self.counts["duplicate"]:
            warnings.append(f"{self.counts['duplicate']:,} examples are equal to an earlier one")
        train = self.labels.get("train", Counter())
        if len(train) == 1:
            warnings.append(f"every example has the label {next(iter(train))!r:.60}; two at least are needed to learn")
        for label, where in self.first_of.items():
            if train and label not in train:
                self.problem(DataError(f"the label {label!r:.60} is not in the training data", where=where))
        if shared := self.overlap["test"]:
            warnings.append(f"test shares {shared:,} examples with training: its figures will flatter")
        if shared := self.overlap["validation"]:
            self.problem(DataError(f"validation shares {shared:,} examples with training"))
        if self.counts["long"]:
            self.problem(DataError(f"{self.counts['long']:,} examples are longer than the context of {self.context:,}"))
        if not self.examples.total() and not self.problem_count:
            self.problem(DataError("there is no example"))
        return LabelledReport(
            task=self.task,
            files=tuple(self.files),
            examples=dict(self.examples),
            unit="characters" if self.tokenizer is None else "tokens",
            lengths={
                name: Lengths(self.extremes[name][0], median_of(counts), self.extremes[name][1])
                for name, counts in self.lengths.items()
            },
            context=self.context,
            over_context=self.counts["long"],
            duplicates=self.counts["duplicate"],
            overlap={part: self.overlap[part] for part in self.examples if part != "train"},
            labels={part: dict(sorted(counts.items())) for part, counts in self.labels.items()},
            places=tuple(place for places in self.places.values() for place in places),
            template=self.template,
            rendered=self.rendered,
            warnings=tuple(warnings),
            problem_count=self.problem_count,
            problems=tuple(self.problems),
        )
