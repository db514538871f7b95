"""Fine-tuning on texts that are to lie close to each other as vectors, or far: scored pairs, pairs, triplets.

Invariant: a vector is made in training as `embed` makes it of the result, whose folder says how (sentence-transformers'
files). Scored pairs are learnt by CoSENT; pairs and triplets by ranking against all other texts of the micro-batch, so
--grad-accumulation makes that task easier.

Source: Matryoshka representations (arXiv:2205.13147): the loss is the weighted sum over so many first dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmcli.config_finetune import EmbedTuneConfig
from llmcli.data.examples import Example, ScoredPairExample, TripletExample
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import ConfigError, DataError
from llmcli.models.decoder import Decoder, without_head
from llmcli.models.pooling import Pooling, pooled, read_pooling, write_pooling
from llmcli.models.text_model import TextModel
from llmcli.operations.evaluate_embed import correlation, ranks
from llmcli.operations.task_prompted import of_another_task
from llmcli.operations.tasks import Row
from llmcli.training.embedding_losses import cosent_loss, ranking_losses, same_text, similarities
from llmcli.training.loop import Validation
from llmcli.training.packing import Packed, pack

_PIECE = 1024  # texts whose similarities with all others are held at once
_CLASSES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "gpt2": "GPT2"}


@dataclasses.dataclass(frozen=True, slots=True)
class TextsRow(Row):
    """Two texts or three side by side; `wanted` is the score of the first two, or None: the second one is right."""

    ends: tuple[int, ...]  # where each text ends in the ids

    @property
    def longest(self) -> int:
        """Ids of the longest text."""
        return max(len(text) for text in self.texts)

    @property
    def texts(self) -> list[npt.NDArray[np.int32]]:
        """The ids of each."""
        return np.split(self.ids, self.ends[:-1])


class EmbedTask:
    """Vectors of texts, by an encoder or a decoder."""

    name = "embed"
    keeps: Sequence[str] = ()

    def __init__(self, config: EmbedTuneConfig = EmbedTuneConfig(), base: Path | None = None) -> None:  # noqa: B008
        self.config = config
        own = (None if base is None else read_pooling(base)) or Pooling()
        self.pooling = own if config.pooling is None else dataclasses.replace(own, mode=config.pooling)
        self.sizes = dimensions_of(config)
        self.scored = True
        self._behind = 0  # tokens that the tokenizer puts behind a text, which a cut leaves
        self._hidden_size = 0
        self._family = ""

    def tokenizer(self, base: TextTokenizer) -> TextTokenizer:
        """The model's own."""
        return base

    def longest(self, context: int) -> int:
        """All tokens are read."""
        limit = self.pooling.longest or context
        if limit > context:
            self.pooling = dataclasses.replace(self.pooling, longest=None)
        return min(limit, context)

    def encoded(self, examples: Iterable[Example], tokenizer: TextTokenizer) -> Iterator[Row]:
        """The texts as `embed` encodes them."""
        frame = tokenizer.encode_framed("a").texts
        self._behind = len(frame) - 1 - max(place for place, text in enumerate(frame) if text is not None)
        before = self.pooling.prompts.get(self.pooling.prompt or "", "")
        for example in examples:
            score: float | None = None
            if isinstance(example, ScoredPairExample):
                texts, score = [example.first, example.second], example.score
            elif isinstance(example, TripletExample):
                texts = [text for text in (example.anchor, example.positive, example.negative) if text is not None]
            else:
                raise of_another_task(example, "pair or triplet of texts")
            ids = [
                np.asarray(tokenizer.encode(before + (text.lower() if self.pooling.lower else text), special=True))
                for text in texts
            ]
            if not all(map(len, ids)):
                raise DataError("one of its texts is empty", where=example.where)
            yield _row(ids, score, example.where)

    def cut(self, row: Row, length: int) -> Row | None:
        """The begin of each text, with what the tokenizer puts behind it."""
        assert isinstance(row, TextsRow)
        behind = min(self._behind, length - 1)
        texts = [
            ids if len(ids) <= length else np.append(ids[: length - behind], ids[len(ids) - behind :])
            for ids in row.texts
        ]
        return _row(texts, row.wanted, row.where)

    def classes(self, row: Row) -> Sequence[str]:
        """None: any texts can be compared."""
        return ()

    def settle(self, train: Sequence[Row], validation: Sequence[Row]) -> None:
        """Whether it is scores that are learnt. Raises DataError where some rows have one and others have none."""
        self.scored = train[0].wanted is not None
        for row in [*train, *validation]:
            if (row.wanted is not None) != self.scored:
                kinds = ("a score", "none") if self.scored else ("no score", "one")
                raise DataError(f"the first example has {kinds[0]}, this one has {kinds[1]}", where=row.where)
        if self.scored and len({row.wanted for row in train}) < 2:
            raise DataError("every example has the same score, so none is better than another", where=train[0].where)

    def model(self, base: TextModel, generator: torch.Generator) -> TextModel:
        """The base without a head."""
        self._hidden_size, self._family = base.config.hidden_size, base.config.model_type
        for size, _ in self.sizes:
            if size > self._hidden_size:
                raise ConfigError(f"{size} is more than the model's {self._hidden_size}", where="dimensions")
        if isinstance(base, Decoder):
            return without_head(base)
        if base.body.pooler is not None:
            base.body.pooler.requires_grad_(False)  # it is kept, and no vector goes through it
        return base

    def facts(self, tokenizer: TextTokenizer) -> Mapping[str, Any]:
        """That there is no head."""
        known = _CLASSES.get(self._family)
        return {} if known is None else {"architectures": [f"{known}Model"]}

    def ends(self, tokenizer: TextTokenizer) -> Sequence[int]:
        """None: it generates nothing."""
        return ()

    def write(self, folder: Path) -> None:
        """sentence-transformers' files, into the staged folder of the model."""
        write_pooling(folder, self.pooling, self._hidden_size)

    def batch(self, rows: Sequence[Row]) -> tuple[Packed, Tensor]:
        """Targets: the scores (R,); without scores numbers that tell the texts apart (R, 3), -1 for none."""
        pairs = [row for row in rows if isinstance(row, TextsRow)]
        texts = [text for row in pairs for text in row.texts]
        packed = pack(texts)
        if self.scored:
            return packed, torch.tensor([row.wanted for row in pairs], dtype=torch.float32)
        numbers = [[_number(text) for text in row.texts] for row in pairs]
        return packed, torch.tensor([[*each, *[-1] * (3 - len(each))] for each in numbers])

    def vectors(self, model: TextModel, packed: Packed) -> Tensor:
        """(texts, C), not normalized: only their directions are compared."""
        states = model.hidden(packed.ids, segments=packed.segments)[0, : packed.tokens]
        return pooled(states, packed.lengths, self.pooling.mode)

    def loss(self, model: TextModel, packed: Packed, targets: Tensor, scale: Tensor) -> Tensor:
        """The loss of the batch, as often as it has rows."""
        return self._summed(self.vectors(model, packed), targets) * scale

    def _summed(self, vectors: Tensor, targets: Tensor) -> Tensor:
        sizes = self.sizes or [(vectors.size(1), 1.0)]
        return torch.stack([weight * self._at(vectors[:, :size], targets) for size, weight in sizes]).sum()

    def _at(self, vectors: Tensor, targets: Tensor) -> Tensor:
        if self.scored:
            return cosent_loss(vectors[::2], vectors[1::2], targets, self.config.scale) * len(targets)
        anchors, candidates, ours = _parts(vectors, targets)
        return ranking_losses(anchors, candidates, ours, self.config.scale).sum()

    def validate(self, model: TextModel, batches: Iterable[tuple[Packed, Tensor]]) -> Validation:
        """The loss of a row; Spearman's coefficient, or the share of anchors to which their own text is the nearest."""
        loss, held, wanted = 0.0, [], []
        for packed, targets in batches:
            vectors = self.vectors(model, packed)
            loss += float(self._summed(vectors, targets))
            held.append(vectors.cpu())
            wanted.append(targets.cpu())
        vectors, targets = torch.cat(held), torch.cat(wanted)
        figures: dict[str, float] = {}
        judged = []
        for size, _ in self.sizes or [(vectors.size(1), 1.0)]:
            found = self._figures(vectors[:, :size], targets)
            judged.append(next(iter(found.values())))
            figures |= found if not figures else {f"{name}_{size}": value for name, value in found.items()}
        return Validation(loss / len(targets), None, figures, criterion=-float(np.mean(judged)))

    def _figures(self, vectors: Tensor, targets: Tensor) -> dict[str, float]:
        """What is measured, first what the run is judged by."""
        if not self.scored:
            anchors, candidates, ours = _parts(vectors, targets)
            return {"accuracy": nearest_share(anchors, candidates, ours)}
        cosines = torch.cosine_similarity(vectors[::2], vectors[1::2]).double().numpy()
        scores = targets.double().numpy()
        found = {
            "spearman": float(correlation(ranks(scores), ranks(cosines))),
            "pearson": float(correlation(scores, cosines)),
        }
        return {name: value if np.isfinite(value) else 0.0 for name, value in found.items()}


def nearest_share(anchors: Tensor, candidates: Tensor, ours: Tensor) -> float:
    """The share of anchors to which their own candidate, the one of their number, is nearer than any other."""
    right = 0
    for begin in range(0, len(anchors), _PIECE):
        part = slice(begin, begin + _PIECE)
        found = similarities(anchors[part], candidates).masked_fill(ours[part], -torch.inf)
        rows = torch.arange(len(found))
        own = found[rows, rows + begin].clone()
        found[rows, rows + begin] = -torch.inf
        right += int((own > found.amax(1)).sum())
    return right / len(anchors)


def dimensions_of(config: EmbedTuneConfig) -> list[tuple[int, float]]:
    """The numbers of dimensions with their weights; none: all dimensions count, and only together."""
    found: list[tuple[int, float]] = []
    for part in filter(None, map(str.strip, (config.dimensions or "").split(","))):
        size, _, weight = part.partition(":")
        try:
            found.append((int(size), float(weight or 1.0)))
            if found[-1][0] < 1 or not 0 < found[-1][1] < 1e6:
                raise ValueError
        except ValueError:
            raise ConfigError(f"must be SIZE[:WEIGHT],..., is {part!r:.60}", where="dimensions") from None
    if len({size for size, _ in found}) < len(found):
        raise ConfigError("names a size twice", where="dimensions")
    return found


def _row(texts: Sequence[npt.NDArray[Any]], score: float | None, where: str) -> TextsRow:
    ends = tuple(np.cumsum([len(text) for text in texts]).tolist())
    return TextsRow(np.concatenate(texts).astype(np.int32), score, where, ends)


def _number(text: npt.NDArray[np.int32]) -> int:
    """A number that tells a text from others."""
    return int.from_bytes(hashlib.sha256(text.tobytes()).digest()[:7], "little")


def _parts(vectors: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors (R, C), candidates (M, C), the positives first, and which of them are no wrong answers (R, M)."""
    there = numbers >= 0  # (R, 3)
    places = there.flatten().cumsum(0).view_as(numbers) - 1  # in the vectors
    anchors, positives, last = places.unbind(1)
    with_negative = there[:, 2]
    chosen = torch.cat([positives, last[with_negative]])
    said = torch.cat([numbers[:, 1], numbers[with_negative, 2]])
    return vectors[anchors], vectors[chosen], same_text(numbers[:, 0], numbers[:, 1], said)
