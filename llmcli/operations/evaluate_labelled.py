"""Evaluation on labelled examples, whatever the task: reading them, one model or two, figures, what is written down.

Invariant: all examples are read and sound before a model is loaded; two models see the same ones in the same order.
They are held in memory, with what a model made of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llmcli.config import EvaluateConfig, LabelledConfig
from llmcli.data.examples import Example
from llmcli.data.formats import find_inputs
from llmcli.data.layouts import Layout, find_splits, read_examples, recognise
from llmcli.errors import ConfigError, DataError
from llmcli.files.artefacts import Model
from llmcli.files.atomic import refuse_existing, write_file
from llmcli.operations.evaluate_figures import (
    Array,
    Difference,
    Interval,
    Measure,
    Missed,
    Outcome,
    check_names,
    differences_of,
    features_of,
    figures_of,
    intervals_of,
    missed,
    read_thresholds,
)
from llmcli.operations.evaluate_model import EvaluatedModel
from llmcli.operations.records import Progress

_ORDER = ("choice", "prefer", "answer", "summarize", "classify", "embed", "chat")  # in which a layout is looked for
_STEP = 32  # examples between two records of progress


class Task(Protocol):
    """What is measured: a model and examples become outcomes, and those metrics."""

    names: tuple[str, ...]  # of the metrics

    def outcomes(self, model: EvaluatedModel, examples: Sequence[Example]) -> Iterator[Outcome]:
        """One for each example, in order."""
        ...

    def measure(self, runs: Sequence[Sequence[Outcome]]) -> Measure:
        """What makes metrics of the outcomes of one or two models."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskFile:
    """A file, and the (first) model's figures on it."""

    file: str
    layout: str
    examples: int
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ModelFigures:
    """How one model fares."""

    model: str
    metrics: dict[str, float]
    intervals: dict[str, Interval]  # 95 %; None: one example
    details: dict[str, Any]  # classify: per_class and, where each text has one label, confusion (labels, matrix)
    cut: int  # examples that did not fit the context and were not read whole
    seconds: float


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """Figures of a model on labelled examples; with a second one also its figures and the differences."""

    model: str
    task: str
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    examples: int
    details: dict[str, Any]
    cut: int
    seconds: float
    files: tuple[TaskFile, ...]
    other: ModelFigures | None
    differences: dict[str, Difference] | None  # the other one's figures less the model's
    missed: tuple[Missed, ...]  # thresholds
    predictions: str | None  # the file that was written


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    name: str
    layout: str
    examples: list[Example]


def evaluate_labelled(
    models: Sequence[Model],
    inputs: Sequence[str],
    config: EvaluateConfig,
    labelled: LabelledConfig,
    *,
    predictions: str | Path | None = None,
    overwrite: bool = False,
) -> Iterator[Progress | TaskReport]:
    """Measures one model or two. Yields Progress, last a TaskReport."""
    task = open_task(config)
    thresholds = read_thresholds(config.fail_under)
    check_names(thresholds, task.names)
    if predictions is not None:
        refuse_existing(predictions, overwrite=overwrite)
    files = list(_read(inputs, str(config.task), labelled, config.limit))
    examples = [example for file in files for example in file.examples]
    runs: list[list[Outcome]] = []
    seconds = []
    names = []
    for model in models:
        opened = EvaluatedModel(model, config)
        names.append(opened.name)
        began = time.perf_counter()
        run: list[Outcome] = []
        with contextlib.closing(opened):
            for outcome in task.outcomes(opened, examples):
                run.append(outcome)
                if len(run) % _STEP == 0 or len(run) == len(examples):
                    stage = "score" if len(models) == 1 else f"model {len(names)}"
                    yield Progress(stage, len(run), len(examples), "examples")
        runs.append(run)
        seconds.append(time.perf_counter() - began)
    measure = task.measure(runs)
    features = [features_of(measure, run) for run in runs]
    found = [
        _figures(name, measure, table, run, config.seed, spent)
        for name, table, run, spent in zip(names, features, runs, seconds, strict=True)
    ]
    differences = None
    if len(found) > 1:
        shared = [name for name in found[0].metrics if name in found[1].metrics]
        differences = differences_of(measure, features[0], features[1], shared, config.seed)
    if predictions is not None:
        _write(Path(predictions), names, files, runs)
    yield TaskReport(
        **{field.name: getattr(found[0], field.name) for field in dataclasses.fields(ModelFigures)},
        task=str(config.task),
        examples=len(examples),
        files=tuple(_of_files(files, measure, features[0])),
        other=found[1] if len(found) > 1 else None,
        differences=differences,
        missed=tuple(each for one in found for each in missed(thresholds, one.metrics, one.model)),
        predictions=None if predictions is None else str(predictions),
    )


def open_task(config: EvaluateConfig) -> Task:
    """The task of a config. Raises ConfigError for one that cannot be measured."""
    match config.task:
        case "chat":
            from llmcli.operations.evaluate_chat import ChatTask

            return ChatTask()
        case "choice":
            from llmcli.operations.evaluate_choice import ChoiceTask

            return ChoiceTask()
        case "classify":
            from llmcli.operations.evaluate_classify import ClassifyTask

            return ClassifyTask(config.label_names)
        case "answer":
            from llmcli.operations.evaluate_answer import AnswerTask

            return AnswerTask()
        case "summarize":
            from llmcli.operations.evaluate_summarize import SummarizeTask

            return SummarizeTask()
        case "prefer":
            from llmcli.operations.evaluate_prefer import PreferTask

            return PreferTask()
        case "embed":
            from llmcli.operations.evaluate_embed import EmbedTask

            return EmbedTask()
    raise ConfigError(f"{config.task!r:.40} is measured on text, not on labelled examples", where="task")


def fitting_task(
    inputs: Sequence[str], labelled: LabelledConfig, text_field: str
) -> tuple[str, str, tuple[str, ...]] | None:
    """(task, layout, its fields) of the first file, where it holds labelled examples and no plain text.

    Conversations and completions are plain text where the field that is to be read as such is there.
    """
    source = next((found for found in find_inputs(inputs) if found.path is not None), None)
    if source is None or source.format == "text":
        return None
    for task in _ORDER:
        layout = _layout(source.name, task, labelled)
        if layout is None:
            continue
        if task == "chat":
            with contextlib.suppress(ConfigError):  # a name that cannot be written as a column
                if _layout(source.name, task, dataclasses.replace(labelled, columns=f"text={text_field}")):
                    return None
        return task, layout.name, layout.fields
    return None


def _layout(path: str, task: str, labelled: LabelledConfig) -> Layout | None:
    try:
        return recognise(path, task, labelled)
    except DataError:
        return None


def _read(inputs: Sequence[str], task: str, config: LabelledConfig, limit: int | None) -> Iterator[_File]:
    """The files, each with its examples; of a folder with parts those of test, else of validation."""
    for given in inputs:
        splits = find_splits([given])
        chosen = (splits.test or splits.validation or splits.train) if Path(given).is_dir() else splits.train
        for path in chosen:
            layouts: dict[str, Layout] = {}
            found = read_examples([path], task, config, on_layout=layouts.__setitem__)
            examples = list(itertools.islice(found, limit))
            if not examples:
                raise DataError("holds no example", where=path)
            yield _File(path, next(iter(layouts.values())).name, examples)


def _figures(
    name: str, measure: Measure, features: Array, run: Sequence[Outcome], seed: int, seconds: float
) -> ModelFigures:
    from llmcli.operations.evaluate_classify import Confusion, confusion_matrix

    metrics = figures_of(measure, features)
    details = measure.details(features.sum(0))
    if isinstance(measure, Confusion):
        matrix = confusion_matrix(run, measure.labels)
        details |= {} if matrix is None else {"confusion": {"labels": measure.labels, "matrix": matrix}}
    intervals = intervals_of(measure, features, list(metrics), seed)
    return ModelFigures(name, metrics, intervals, details, sum(each.cut for each in run), seconds)


def _of_files(files: Sequence[_File], measure: Measure, features: Array) -> Iterator[TaskFile]:
    begin = 0
    for file in files:
        end = begin + len(file.examples)
        yield TaskFile(file.name, file.layout, end - begin, figures_of(measure, features[begin:end]))
        begin = end


def _write(
    place: Path, names: Sequence[str], files: Sequence[_File], runs: Sequence[Sequence[Mapping[str, Any] | Outcome]]
) -> None:
    """A line for each model and example: where it stands, and what the model made of it."""
    lines = []
    for name, run in zip(names, runs, strict=True):
        outcomes = iter(run)
        for file in files:
            for example in file.examples:
                outcome = next(outcomes)
                assert isinstance(outcome, Outcome)
                record = {"model": name, "where": example.where, **outcome.prediction}
                lines.append(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    write_file(place, b"\n".join(lines) + b"\n")
