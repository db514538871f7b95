"""Fine-tuning an encoder on labels: as a decoder learns them, but by the family's own head and with pairs framed.

Invariant: a cut text keeps what the tokenizer puts around it, and of a pair the longer text is cut first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmcli.data.examples import LabelExample
from llmcli.data.framed import FramedEncoding, fitted
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError
from llmcli.models.classifier import classifier_facts
from llmcli.models.encoder import Encoder
from llmcli.models.encoder_heads import EncoderClassifier, with_head
from llmcli.models.text_model import TextModel
from llmcli.operations.task_classify import ClassifyTask
from llmcli.operations.tasks import Row
from llmcli.training.packing import Packed, pack


@dataclasses.dataclass(frozen=True, slots=True)
class FramedRow(Row):
    """A text or a pair in its frame; `wanted` is the tuple of labels."""

    framed: FramedEncoding


class EncoderClassifyTask(ClassifyTask):
    """Labels, by an encoder."""

    def row(self, example: LabelExample, tokenizer: TextTokenizer) -> Row:
        """The row of a text, or of a pair."""
        framed = tokenizer.encode_framed(example.text, example.text_pair)
        if all(text is None for text in framed.texts):
            raise DataError("the text is empty", where=example.where)
        return FramedRow(np.asarray(framed.ids, np.int32), example.labels, example.where, framed)

    def cut(self, row: Row, length: int) -> Row | None:
        """The begin of the text, or of both."""
        assert isinstance(row, FramedRow)
        framed = fitted(row.framed, length)
        return None if framed is None else FramedRow(np.asarray(framed.ids, np.int32), row.wanted, row.where, framed)

    def model(self, base: TextModel, generator: torch.Generator) -> TextModel:
        """The base under a fresh head; BERT's pooler is the base's where it has one."""
        assert isinstance(base, Encoder)
        return with_head(base, "classifier", generator, labels=len(self.labels))

    def facts(self, tokenizer: TextTokenizer) -> Mapping[str, Any]:
        """The labels."""
        return classifier_facts(None, self.labels, several=self.config.multi_label)

    def packed(self, rows: Sequence[Row]) -> Packed:
        """The texts side by side; chosen are their first tokens."""
        return pack_framed([row.framed for row in rows if isinstance(row, FramedRow)])

    def scores(self, model: TextModel, packed: Packed) -> Tensor:
        """(R, labels)."""
        assert isinstance(model, EncoderClassifier)
        return model.scores(packed.ids, packed.segments, packed.chosen, packed.types).float()


def pack_framed(texts: Sequence[FramedEncoding]) -> Packed:
    """Framed texts side by side; chosen are their first tokens."""
    ids, types = ([np.asarray(getattr(text, name), np.int32) for text in texts] for name in ("ids", "types"))
    first: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)] * len(texts)
    return pack(ids, first, types=types)
