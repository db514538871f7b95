"""Fine-tuning on labels: one a text, or any number of them.

Invariant: the labels are those of the training examples, in order of their names; a label that only validation has is
an error, since nothing could learn it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from llmcli.config_finetune import ClassifyTuneConfig
from llmcli.data.examples import Example, LabelExample
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError
from llmcli.models.classifier import Classifier, classifier_facts, classifier_from
from llmcli.models.decoder import Decoder
from llmcli.models.text_model import TextModel
from llmcli.operations.classify import text_ids
from llmcli.operations.tasks import Row
from llmcli.training.loop import Validation
from llmcli.training.packing import Packed, pack


class ClassifyTask:
    """Rows: `wanted` is the tuple of labels."""

    name = "classify"
    keeps: Sequence[str] = ()

    def __init__(self, config: ClassifyTuneConfig = ClassifyTuneConfig()) -> None:  # noqa: B008  (frozen)
        self.config = config
        self.labels: list[str] = []
        self._weights: Tensor = torch.zeros(0)
        self._family = ""

    def tokenizer(self, base: TextTokenizer) -> TextTokenizer:
        """The model's own."""
        return base

    def encoded(self, examples: Iterable[Example], tokenizer: TextTokenizer) -> Iterator[Row]:
        """Texts as `classify` encodes them."""
        for example in examples:
            if not isinstance(example, LabelExample):
                raise DataError("has no label", where=example.where)
            if len(example.labels) != 1 and not self.config.multi_label:
                raise DataError(
                    f"has {len(example.labels)} labels; --multi-label learns any number of them", where=example.where
                )
            yield self.row(example, tokenizer)

    def row(self, example: LabelExample, tokenizer: TextTokenizer) -> Row:
        """The row of a text, or of a pair."""
        ids = text_ids(tokenizer, example.text, example.text_pair)
        if not ids:
            raise DataError("the text is empty", where=example.where)
        return Row(np.asarray(ids, np.int32), example.labels, example.where)

    def longest(self, context: int) -> int:
        """All tokens are read."""
        return context

    def cut(self, row: Row, length: int) -> Row | None:
        """The begin of the text."""
        return Row(row.ids[:length], row.wanted, row.where)

    def classes(self, row: Row) -> Sequence[str]:
        """Its labels."""
        return row.wanted  # type: ignore[no-any-return]

    def settle(self, train: Sequence[Row], validation: Sequence[Row]) -> None:
        """The labels and their weights."""
        counts: dict[str, int] = {}
        for row in train:
            for label in row.wanted:
                counts[label] = counts.get(label, 0) + 1
        if len(counts) < (1 if self.config.multi_label else 2):
            only = f"the label {next(iter(counts))!r}" if counts else "no label"
            where = train[0].where.rpartition(":")[0] or None
            raise DataError(f"every example has {only}; two at least are needed to tell apart", where=where)
        for row in validation:
            for label in row.wanted:
                if label not in counts:
                    raise DataError(f"the label {label!r:.80} is not among those trained on", where=row.where)
        self.labels = sorted(
            counts, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label)
        )
        self._weights = torch.ones(len(self.labels))
        if self.config.class_weights == "balanced":
            found = torch.tensor([float(counts[label]) for label in self.labels])
            self._weights = found.sum() / (len(found) * found)

    def model(self, base: TextModel, generator: torch.Generator) -> TextModel:
        """The base under a head of its own."""
        assert isinstance(base, Decoder)
        self._family = base.config.model_type
        return classifier_from(base, len(self.labels), generator)

    def facts(self, tokenizer: TextTokenizer) -> Mapping[str, Any]:
        """The labels, and what transformers needs to find the last token of a text."""
        pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
        return classifier_facts(self._family, self.labels, several=self.config.multi_label, pad_id=pad)

    def ends(self, tokenizer: TextTokenizer) -> Sequence[int]:
        """None: it generates nothing."""
        return ()

    def batch(self, rows: Sequence[Row]) -> tuple[Packed, Tensor]:
        """Targets: the label's number (R,); of several labels 0 or 1 for each (R, labels)."""
        numbers = {label: index for index, label in enumerate(self.labels)}
        packed = self.packed(rows)
        if not self.config.multi_label:
            return packed, torch.tensor([numbers[row.wanted[0]] for row in rows])
        targets = torch.zeros(len(rows), len(self.labels))
        for place, row in enumerate(rows):
            targets[place, [numbers[label] for label in row.wanted]] = 1.0
        return packed, targets

    def packed(self, rows: Sequence[Row]) -> Packed:
        """The texts side by side; chosen are their last tokens."""
        return pack([row.ids for row in rows], [np.array([len(row.ids) - 1]) for row in rows])

    def scores(self, model: TextModel, packed: Packed) -> Tensor:
        """(R, labels)."""
        assert isinstance(model, Classifier)
        return model.scores(packed.ids, packed.segments, packed.chosen).float()

    def loss(self, model: TextModel, packed: Packed, targets: Tensor, scale: Tensor) -> Tensor:
        """Cross-entropy of the label; of several, the mean of each label's own."""
        return self._summed(self.scores(model, packed), targets) * scale

    def _summed(self, scores: Tensor, targets: Tensor) -> Tensor:
        weights = self._weights.to(scores.device)
        if not self.config.multi_label:
            return F.cross_entropy(scores, targets, weight=weights, reduction="sum")
        every = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
        return (every * (targets * (weights - 1) + 1)).mean(1).sum()

    def _marked(self, labels: Tensor) -> npt.NDArray[np.bool_]:
        """Labels, by number (R,) or as 0 and 1 (R, labels), as booleans (R, labels)."""
        every = labels if self.config.multi_label else F.one_hot(labels, len(self.labels))
        return every.bool().cpu().numpy()

    def validate(self, model: TextModel, batches: Iterable[tuple[Packed, Tensor]]) -> Validation:
        """The loss of an example, accuracy (all labels right) and macro-F1."""
        loss, found, expected = 0.0, [], []
        for packed, targets in batches:
            scores = self.scores(model, packed)
            loss += float(self._summed(scores, targets))
            several = self.config.multi_label
            found.append(
                (scores > 0 if several else F.one_hot(scores.argmax(1), len(self.labels)).bool()).cpu().numpy()
            )
            expected.append((targets.bool() if several else F.one_hot(targets, len(self.labels)).bool()).cpu().numpy())
        guessed, true = np.concatenate(found), np.concatenate(expected)
        figures = {"accuracy": float((guessed == true).all(1).mean()), "macro_f1": macro_f1(guessed, true)}
        # Labels are what is asked for; their probabilities grow too sure long before the labels grow wrong.
        return Validation(loss / len(true), None, figures, criterion=-figures["accuracy"])


def macro_f1(guessed: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    """The mean of the labels' F1, a label that is neither there nor guessed left out. (rows, labels) each."""
    right = (guessed & true).sum(0)
    either = guessed.sum(0) + true.sum(0)
    known = either > 0
    return float((2 * right[known] / either[known]).mean()) if known.any() else 0.0
