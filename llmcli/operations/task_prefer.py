"""Fine-tuning on preferences (DPO): of two answers to a prompt the better is to become likelier, against the worse.

Invariant: the model that the run begins from is the reference. Its log-probabilities are computed once, before the
first step, and kept in the run's folder, so no second model is held.

Sources: direct preference optimization (arXiv:2305.18290), equation 7; label smoothing as in its authors' code (cDPO).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmcli.config_finetune import PreferTuneConfig
from llmcli.data.chat_template import open_template
from llmcli.data.examples import ChatExample, Example, PreferenceExample
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError
from llmcli.files.reference import REFERENCE, Array, read_reference, write_reference
from llmcli.models.decoder import Decoder
from llmcli.models.text_model import TextModel
from llmcli.operations.chat_examples import ChatExampleEncoder
from llmcli.operations.records import Progress
from llmcli.operations.task_chat import ChatTask
from llmcli.operations.tasks import Row
from llmcli.training.loop import Validation
from llmcli.training.losses import log_probabilities
from llmcli.training.packing import Packed, in_turn, pack

_TOKENS = 8192  # of a batch of the reference


@dataclasses.dataclass(frozen=True, slots=True)
class PairRow(Row):
    """The prompt with the better answer, then with the worse; `wanted` says for each id whether it is an answer's."""

    split: int  # where the second text begins

    @property
    def longest(self) -> int:
        """Ids of the longer of both texts."""
        return max(self.split, len(self.ids) - self.split)

    @property
    def parts(self) -> tuple[slice, slice]:
        """Where both texts lie in the ids."""
        return slice(0, self.split), slice(self.split, None)


class PreferTask(ChatTask):
    """As a conversation is learnt, but for the loss: a target is a pair of answers."""

    name = "prefer"
    rate_share = 0.1  # the reference is to be left slowly

    def __init__(self, config: PreferTuneConfig = PreferTuneConfig()) -> None:  # noqa: B008  (frozen)
        super().__init__()
        self.config = config
        self._reference: dict[bytes, tuple[float, float]] = {}

    def encoded(self, examples: Iterable[Example], tokenizer: TextTokenizer) -> Iterator[Row]:
        """Both conversations through the template."""
        with contextlib.closing(ChatExampleEncoder(open_template(tokenizer), tokenizer)) as conversations:
            for example in examples:
                if not isinstance(example, PreferenceExample):
                    raise DataError(f"is no preference, but {type(example).__name__}", where=example.where)
                ids: list[int] = []
                answers: list[bool] = []
                split = 0
                for side in (example.chosen, example.rejected):
                    split = len(ids)
                    whole = ChatExample((*example.prompt, *side), None, example.where)
                    found = conversations.encode(whole, len(example.prompt))
                    ids += found[0]
                    answers += found[1]
                row = PairRow(np.asarray(ids, np.int32), np.asarray(answers, bool), example.where, split)
                if not _differ(row):
                    raise DataError("chosen and rejected are the same to the model", where=example.where)
                yield row

    def longest(self, context: int) -> int:
        """All tokens are read."""
        return context

    def cut(self, row: Row, length: int) -> Row | None:
        """The begin of both texts; None where an answer lies behind it, or where both begin alike."""
        assert isinstance(row, PairRow)
        kept = [(row.ids[part][:length], row.wanted[part][:length]) for part in row.parts]
        ids, answers = (np.concatenate(each) for each in zip(*kept, strict=True))
        found = PairRow(ids, answers, row.where, len(kept[0][0]))
        return found if _differ(found) else None

    def batch(self, rows: Sequence[Row]) -> tuple[Packed, Tensor]:
        """Targets (R, 4): the reference's log-probabilities of both answers, and how many tokens they have."""
        packed, counts = _packed(rows)
        known = torch.tensor([self._reference.get(_key(row), (0.0, 0.0)) for row in rows])
        return packed, torch.cat([known, torch.tensor(counts, dtype=torch.float32).view(-1, 2)], 1)

    def margins(self, model: TextModel, packed: Packed, targets: Tensor) -> Tensor:
        """What the model has come to prefer the better answers by, times beta. Returns (R,)."""
        assert isinstance(model, Decoder)
        found = answer_log_probabilities(model, packed, targets[:, 2:].int().flatten().tolist())
        gained = found - targets[:, :2]
        return self.config.beta * (gained[:, 0] - gained[:, 1])

    def loss(self, model: TextModel, packed: Packed, targets: Tensor, scale: Tensor) -> Tensor:
        """-log sigmoid of the margin; smoothed, a share of it as if both had been exchanged."""
        return preference_losses(self.margins(model, packed, targets), self.config.label_smoothing).sum() * scale

    def validate(self, model: TextModel, batches: Iterable[tuple[Packed, Tensor]]) -> Validation:
        """The loss of a pair; the share of pairs whose margin is above 0; the mean margin."""
        found = torch.cat([self.margins(model, packed, targets).cpu() for packed, targets in batches])
        figures = {"accuracy": float((found > 0).float().mean()), "margin": float(found.mean())}
        return Validation(float(preference_losses(found, self.config.label_smoothing).mean()), None, figures)

    def refer(self, model: TextModel, rows: Sequence[Row], run: Path, key: str) -> Generator[Progress, None, None]:
        """Reads what the beginning gives each answer from the run's folder, or computes it and writes it there."""
        assert isinstance(model, Decoder)
        path = run / REFERENCE
        values = read_reference(path, key, len(rows))
        if values is None:
            values = yield from _computed(model, rows)
            write_reference(path, values, key)
        self._reference = {_key(row): (float(a), float(b)) for row, (a, b) in zip(rows, values, strict=True)}


def preference_losses(margins: Tensor, smoothing: float = 0.0) -> Tensor:
    """Nats of each pair. `smoothing`: the share of pairs that are taken to be labelled the wrong way round."""
    straight = -F.logsigmoid(margins)
    return straight if not smoothing else (1 - smoothing) * straight - smoothing * F.logsigmoid(-margins)


def answer_log_probabilities(model: Decoder, packed: Packed, counts: Sequence[int]) -> Tensor:
    """The log-probability of each answer, chosen and rejected in turn. `counts`: their tokens. Returns (R, 2)."""
    states = model.hidden(packed.ids, segments=packed.segments)[0].index_select(0, packed.chosen)
    wanted = packed.ids[0].index_select(0, packed.chosen + 1)
    found = log_probabilities(states, model.head, wanted)
    return torch.stack([part.sum() for part in torch.split(found, list(counts))]).view(-1, 2)


def _packed(rows: Sequence[Row]) -> tuple[Packed, list[int]]:
    """Both texts of each row side by side, and how many tokens of an answer each has."""
    texts, places = [], []
    for row in rows:
        assert isinstance(row, PairRow)
        for part in row.parts:
            texts.append(row.ids[part])
            places.append(np.flatnonzero(row.wanted[part][1:]))  # the places before them
    return pack(texts, places), [len(each) for each in places]


def _differ(row: PairRow) -> bool:
    """Whether both answers have tokens, and not the same ones."""
    first, second = row.parts
    answered = row.wanted[first][1:].any() and row.wanted[second][1:].any()
    return bool(answered) and not np.array_equal(row.ids[first], row.ids[second])


def _key(row: Row) -> bytes:
    assert isinstance(row, PairRow)
    return hashlib.sha256(row.ids.tobytes() + row.wanted.tobytes() + row.split.to_bytes(8, "little")).digest()


def _computed(model: Decoder, rows: Sequence[Row]) -> Generator[Progress, None, Array]:
    """What the model gives each answer, (examples, 2). It must be the one that the run begins from."""
    values = np.zeros((len(rows), 2), np.float32)
    device = model.embedding.device
    done = 0

    def batch(numbers: Sequence[int]) -> tuple[Packed, Tensor]:
        packed, counts = _packed([rows[number] for number in numbers])
        return packed, torch.tensor([[number, *counts[2 * at : 2 * at + 2]] for at, number in enumerate(numbers)])

    trained = model.training
    model.eval()
    try:
        places = range(len(rows))
        for packed, facts in in_turn(places, batch, length=lambda number: len(rows[number].ids), tokens=_TOKENS):
            with torch.no_grad():
                found = answer_log_probabilities(model, packed.to(device), facts[:, 1:].flatten().tolist())
            values[facts[:, 0].numpy()] = found.cpu().numpy()
            done += len(facts)
            yield Progress("reference", done, len(rows), "examples")
    finally:
        model.train(trained)
    return values
