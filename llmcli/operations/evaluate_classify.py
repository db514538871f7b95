"""`evaluate --task classify`: labels by a classifier, or by any decoder that is asked which label it finds probable.

Invariant: accuracy, precision, recall and F1 are scikit-learn's: macro_f1 is the mean over the labels that are there or
were predicted; a label's precision, recall and F1 are 0 where their denominator is.

A text with several labels counts for accuracy where all of them and no other are predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmcli.config import ClassifyConfig
from llmcli.data.examples import Example, LabelExample
from llmcli.data.labels import require_classes
from llmcli.data.task_prompts import label_parts
from llmcli.errors import ConfigError, DataError
from llmcli.files.artefacts import read_json
from llmcli.models.labels import is_classifier
from llmcli.operations.evaluate_figures import Array, Measure, Outcome, Summed
from llmcli.operations.evaluate_model import POOL, EvaluatedModel
from llmcli.settings import nearest


class ClassifyTask:
    """One label a text, or several."""

    names: tuple[str, ...] = ("accuracy", "macro_f1")

    def __init__(self, label_names: str | None = None) -> None:
        self.label_names = _read_names(label_names)

    def measure(self, runs: Sequence[Sequence[Outcome]]) -> Measure:
        """Over the labels that any of the runs has, or should have had."""
        labels = {
            label for run in runs for each in run for what in ("labels", "predicted") for label in each.prediction[what]
        }
        return Confusion(sorted(labels), single=all(len(each.prediction["labels"]) == 1 for each in runs[0]))

    def outcomes(self, model: EvaluatedModel, examples: Sequence[Example]) -> Iterator[Outcome]:
        """One for each example, in order."""
        texts = [example for example in examples if isinstance(example, LabelExample)]
        found = _by_head(model, texts) if _is_classifier(model) else _by_asking(model, texts, self.label_names)
        for example, (labels, probability, cut) in zip(texts, found, strict=True):
            prediction = {"labels": list(example.labels), "predicted": labels, "probability": round(probability, 6)}
            yield Outcome({"accuracy": float(set(labels) == set(example.labels))}, prediction, cut)


class Confusion(Summed):
    """Metrics by what was predicted beside what is right."""

    def __init__(self, labels: Sequence[str], *, single: bool) -> None:
        self.labels, self.single = list(labels), single
        self._place = {label: place for place, label in enumerate(self.labels)}

    def features(self, outcome: Outcome) -> list[float]:
        """Of each label: right, predicted and there; then accuracy and one; then a cell of the matrix."""
        count = len(self.labels)
        counts = np.zeros((3, count))
        there = [self._place[label] for label in outcome.prediction["labels"]]
        guessed = [self._place[label] for label in outcome.prediction["predicted"]]
        counts[0, sorted(set(there) & set(guessed))] = 1
        counts[1, guessed] = 1
        counts[2, there] = 1
        return [*counts.ravel().tolist(), outcome.values["accuracy"], 1.0]

    def figures(self, sums: Array) -> dict[str, Array]:
        """accuracy and macro_f1."""
        count = len(self.labels)
        right, guessed, there = sums[:, :count], sums[:, count : 2 * count], sums[:, 2 * count : 3 * count]
        either = guessed + there
        f1 = np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            macro = f1.sum(1) / (either > 0).sum(1)
            return {"accuracy": sums[:, -2] / sums[:, -1], "macro_f1": macro}

    def details(self, sums: Array) -> dict[str, Any]:
        """Each label's own figures."""
        count = len(self.labels)
        per_class = {}
        for place, label in enumerate(self.labels):
            right, guessed, there = (float(sums[place + part * count]) for part in range(3))
            per_class[label] = {
                "precision": right / guessed if guessed else 0.0,
                "recall": right / there if there else 0.0,
                "f1": 2 * right / (guessed + there) if guessed + there else 0.0,
                "examples": int(there),
            }
        return {"per_class": per_class}


def confusion_matrix(outcomes: Sequence[Outcome], labels: Sequence[str]) -> list[list[int]] | None:
    """Rows: what is right; columns: what was predicted. None where a text has several labels, or none."""
    place = {label: number for number, label in enumerate(labels)}
    matrix = [[0] * len(labels) for _ in labels]
    for outcome in outcomes:
        there, guessed = outcome.prediction["labels"], outcome.prediction["predicted"]
        if len(there) != 1 or len(guessed) != 1:
            return None
        matrix[place[there[0]]][place[guessed[0]]] += 1
    return matrix


def _is_classifier(model: EvaluatedModel) -> bool:
    """Whether the model brings a head and labels of its own."""
    said = model.place.texts / "config.json"
    return said.is_file() and (is_classifier(read_json(said)) or model.is_encoder)  # an encoder cannot be asked


def _by_head(model: EvaluatedModel, examples: Sequence[LabelExample]) -> Iterator[tuple[list[str], float, bool]]:
    """(labels, probability of the most probable one, whether the text was cut) by a classifier's own head.

    Raises DataError for a label that it has not learnt.
    """
    from llmcli.operations.classify import Labeller

    if model.config.quantize is not None:
        raise ConfigError("a classifier's weights are read as they are; leave --quantize out", where=model.name)
    config = ClassifyConfig(
        batch_size=model.config.batch_size or 32, device=model.config.device, threads=model.config.threads
    )
    labeller = Labeller(model.model, config)
    for example in examples:
        for label in example.labels:
            if label not in labeller.labels:
                known = _listed(labeller.labels)
                raise DataError(f"the label {label!r:.60} is none of the model's: {known}", where=example.where)
    texts = (each.text if each.text_pair is None else (each.text, each.text_pair) for each in examples)
    for found in labeller.classify(texts):
        single = [] if found.label is None else [found.label]
        yield single if found.labels is None else list(found.labels), found.probability, found.cut


def _by_asking(
    model: EvaluatedModel, examples: Sequence[LabelExample], names: dict[str, str]
) -> Iterator[tuple[list[str], float, bool]]:
    """The label whose name is the most probable end of the prompt, among all that the examples have."""
    counts: dict[str, int] = {}
    for example in examples:
        if len(example.labels) != 1:
            raise DataError(
                "has several labels or none; a model without labels can be asked for one", where=example.where
            )
        counts[example.labels[0]] = counts.get(example.labels[0], 0) + 1
    for label in names:
        if label not in counts:
            raise ConfigError(
                f"{label!r:.60} is no label of the examples{nearest(label, counts)}; they have {_listed(counts)}",
                where="label_names",
            )
    for label in names and counts:
        if label not in names:
            raise ConfigError(f"the label {label!r:.60} has no text", where="label_names")
    require_classes(counts)
    labels = sorted(counts)
    ends = [" " + names.get(label, label) for label in labels]
    room = model.session.context - max(len(model.tokenizer.encode(end)) for end in ends)
    step = max(1, POOL // len(labels))
    for begin in range(0, len(examples), step):
        sequences: list[list[int]] = []
        given: list[int] = []
        cuts = []
        for example in examples[begin : begin + step]:
            prompt, cut = model.fitted(label_parts(example.text, example.text_pair), room, example.where)
            ids, first = model.ends(prompt, ends)
            sequences += ids
            given += [first] * len(ids)
            cuts.append(cut)
        found = model.log_probabilities(sequences, given)
        scores = np.array([values.sum(dtype=np.float64) for values in found]).reshape(len(cuts), len(labels))
        for row, cut in zip(scores, cuts, strict=True):
            best = int(row.argmax())
            yield [labels[best]], float(1 / np.exp(row - row[best]).sum()), cut


def _listed(labels: Sequence[str] | dict[str, int]) -> str:
    return ", ".join(f"{label!r:.30}" for label in sorted(labels)[:12])


def _read_names(text: str | None) -> dict[str, str]:
    found = {}
    for part in filter(None, (text or "").split(",")):
        label, equals, name = part.partition("=")
        if not equals or not label.strip() or not name.strip():
            raise ConfigError(f"must be LABEL=TEXT,..., is {part!r:.60}", where="label_names")
        found[label.strip()] = name.strip()
    return found
