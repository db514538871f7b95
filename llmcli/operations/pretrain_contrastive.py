"""Pretraining by contrast: an encoder of texts, that lie together or apart; loss, alignment, uniformity, Spearman's.

Invariant: loss and gradients are those of the whole batch, in whatever pieces it is worked off; what a run writes
gives the same vectors in sentence-transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmcli.config import ObjectiveConfig, PretrainConfig, TextConfig
from llmcli.data.frames import framed
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.models.encoder import Encoder
from llmcli.models.pooling import Pooling, pooled, write_pooling
from llmcli.operations import run_folder, training_run
from llmcli.operations.contrast_data import ContrastData, Ids, ScoredPairs, read_groups, read_scored
from llmcli.operations.evaluate_embed import correlation, ranks
from llmcli.operations.pretrain_base import built, open_base
from llmcli.operations.pretrain_settings import Amount, Settled, settle
from llmcli.operations.pretrain_work import Work, run_work
from llmcli.operations.records import Progress
from llmcli.operations.training_run import Started
from llmcli.training.contrast import Contrast, Groups, alignment, batches, cached, info_nce, uniformity
from llmcli.training.loop import TrainingEvent, Validation
from llmcli.training.machine import prepare_machine
from llmcli.training.packing import ExampleOrder, Packed, pack
from llmcli.training.seeding import seeded

_VALIDATED = 256  # groups that are told apart in a validation
_VECTORS = 8192  # tokens whose vectors are made at once
_VALIDATION = 2**62  # the first number of a validation's batches, for what is drawn at random


@dataclasses.dataclass
class SentenceModel(run_folder.WholeModel):
    """An encoder with what sentence-transformers needs beside it."""

    pooling: Pooling = dataclasses.field(default_factory=Pooling)

    def write(self, folder: Path, *, result: bool = False) -> None:
        """The model's folder, and how its vectors are made."""
        super().write(folder, result=result)
        write_pooling(folder, self.pooling, self.model.config.hidden_size)


def in_contrast(
    inputs: Sequence[str], opened: training_run.Opened, resume: str | None, stopping: Callable[[], bool]
) -> Generator[Progress | Started | TrainingEvent, None, None]:
    """The run, from its data to its result."""
    config, text, objective = opened.settings
    prepared: Prepared | None = None
    for record in prepared_contrast(inputs, config, text, objective):
        if isinstance(record, Prepared):
            prepared = record
        else:
            yield record
    assert prepared is not None
    settled, data, base = prepared.settled, prepared.data, open_base(objective.init)
    prepare_machine(settled.machine)
    run_folder.check_space(opened.place, 2 * settled.plan.checkpoint_bytes)
    model, facts = built(settled, prepared.tokenizer, base)
    assert isinstance(model, Encoder)
    work = contrastive_work(settled, model, prepared, stopping)
    origins = {"data": data.hash, "tokenizer": prepared.tokenizer.hash, "parent": base.hash}
    told = {"data": data.described(), **facts}
    yield from run_work(work, settled, opened, text, origins, told, resume, stopping)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The data of a run and its settings."""

    tokenizer: TextTokenizer
    data: ContrastData
    scored: ScoredPairs | None
    settled: Settled


def prepared_contrast(
    inputs: Sequence[str], config: PretrainConfig, text: TextConfig, objective: ObjectiveConfig
) -> Iterator[Progress | Prepared]:
    """Reads the data; yields how far it is, and last what a run needs."""
    assert objective.init is not None
    base = open_base(objective.init)
    tokenizer = framed(load_tokenizer(config.tokenizer or base.folder))
    first = settle(config, tokenizer.vocab_size, 1, objective, base=base.shape, tokenizer=tokenizer)
    longest = first.config.context or 0
    data: ContrastData | None = None
    for record in read_groups(inputs, tokenizer, longest, config, text, objective):
        if isinstance(record, ContrastData):
            data = record
        else:
            yield record
    assert data is not None
    scored = None if objective.scored is None else read_scored(objective.scored, tokenizer, longest)
    amount = Amount(data.mean_length * len(data.train), data.mean_length)
    settled = settle(config, tokenizer.vocab_size, amount, objective, base=base.shape, tokenizer=tokenizer)
    yield Prepared(tokenizer, data, scored, settled)


def contrastive_work(settled: Settled, model: Encoder, prepared: Prepared, stopping: Callable[[], bool]) -> Work:
    """What a run does with an encoder and texts."""
    config, objective, data = settled.config, settled.objective, prepared.data
    device = torch.device(settled.machine.device)
    groups = Groups(data.train)
    order = ExampleOrder(len(groups), batch_size=config.batch_size or 1, seed=config.seed)
    vectors = partial(_vectors, model, objective.pooling)

    def loss(inputs: Contrast, _targets: Tensor, scale: Tensor) -> Tensor:
        runs = [partial(vectors, piece, config.seed, inputs.number, at) for at, piece in enumerate(inputs.pieces)]
        found = cached(runs, model.embedding)
        return info_nce(joined_views(found, inputs.views), inputs.names, objective.temperature) * scale

    pooling = Pooling(objective.pooling, normalize=True, longest=model.config.longest)
    return Work(
        model=model.train(),
        kept=SentenceModel(model, prepared.tokenizer, pooling=pooling),
        batches=lambda number: batches(groups, order, config.grad_accumulation, number, device),
        loss=loss,
        count_targets=len,
        count_tokens=lambda inputs: sum(piece.tokens for piece in inputs.pieces),
        validate=_validation(model, objective, prepared, config.eval_tokens or 0, stopping),
        validated=bool(data.validation) or prepared.scored is not None,
        at_once=True,
    )


def _vectors(model: Encoder, pooling: str, piece: Packed, seed: int, number: int, part: int) -> Tensor:
    """The vectors of a piece's texts, the same each time that they are asked for: (views x R, C)."""
    seeded(seed, number, part)
    return _pooled(model, pooling, piece)


def _pooled(model: Encoder, pooling: str, texts: Packed) -> Tensor:
    states = model.hidden(texts.ids, segments=texts.segments)[0, : texts.tokens]
    return pooled(states, texts.lengths, pooling)


def joined_views(found: Sequence[Tensor], views: int) -> Tensor:
    """The vectors of all pieces, each (views x R, C), as (views, B, C)."""
    return torch.cat([each.view(views, -1, each.size(1)) for each in found], 1)


# ----------------------------------------------------------------------------------------------------------------
# Validation


def _validation(
    model: Encoder, objective: ObjectiveConfig, prepared: Prepared, most: int, stopping: Callable[[], bool]
) -> Callable[[], Validation | None]:
    """The loss of held-out texts, alignment and uniformity; of scored pairs Spearman's, which then decides.

    `most`: tokens of the held-out texts that are looked at.
    """
    held = prepared.data.validation
    views = max(2, len(held[0])) if held else 2
    sizes = np.cumsum([views * len(group[0]) for group in held])
    groups = Groups(held[: max(2, int(np.searchsorted(sizes, most, side="right")))])
    scored, device = prepared.scored, model.embedding.device

    def losses() -> tuple[float, dict[str, float]] | None:
        nats, near, far, count = 0.0, 0.0, 0.0, 0
        for first in range(0, len(groups), _VALIDATED):
            if stopping():
                return None
            chosen = range(first, min(first + _VALIDATED, len(groups)))
            batch = groups.batch(chosen, 1, _VALIDATION + first)[0].to(device)
            model.train()  # the views of a text are made by dropout, the same in each validation
            found = [_vectors(model, objective.pooling, batch.pieces[0], 0, batch.number, 0)]
            seen = joined_views(found, batch.views)
            nats += float(info_nce(seen, batch.names, objective.temperature))
            near += len(chosen) * alignment(seen[:2])
            model.eval()
            plain = joined_views([_vectors(model, objective.pooling, batch.pieces[0], 0, 0, 0)], batch.views)
            far += len(chosen) * uniformity(plain[0])
            count += len(chosen)
        return nats / count, {"alignment": near / count, "uniformity": far / count}

    def validate() -> Validation | None:
        figures: dict[str, float] = {}
        criterion, loss = None, 0.0
        try:
            with torch.no_grad():
                if len(groups):
                    found = losses()
                    if found is None:
                        return None
                    loss, figures = found
                if scored is not None:
                    model.eval()
                    figures["spearman"] = _spearman(model, objective.pooling, scored)
                    criterion = -figures["spearman"]
        finally:
            model.train()
        return Validation(loss, figures=figures, criterion=criterion) if figures else None

    return validate


def _spearman(model: Encoder, pooling: str, scored: ScoredPairs) -> float:
    """Spearman's correlation of the scores with the cosines."""
    first, second = (text_vectors(model, pooling, side) for side in (scored.first, scored.second))
    cosines = torch.nn.functional.cosine_similarity(first, second).numpy()
    return float(correlation(ranks(scored.scores), ranks(cosines)))


def text_vectors(model: Encoder, pooling: str, texts: Sequence[Ids]) -> Tensor:
    """The vectors of texts, in evaluation: (R, C), float32, on the CPU."""
    found = torch.empty(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    begin = 0
    while begin < len(order):
        end = begin + max(1, _VECTORS // len(texts[order[min(begin + _VECTORS // 32, len(order) - 1)]]))
        part = pack([texts[place] for place in order[begin:end]]).to(model.embedding.device)
        found[order[begin:end]] = _pooled(model, pooling, part).cpu()
        begin = end
    return found
