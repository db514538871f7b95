"""What an objective is to a pretraining run, a model, micro-batches, a loss, a validation; and the run's course.

Invariant: everything but the work itself (the folder, resuming, the loop, checkpoints) knows no objective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from llmcli.config import TextConfig
from llmcli.files.manifest import versions
from llmcli.operations import run_folder, training_run
from llmcli.operations.pretrain_settings import Settled
from llmcli.operations.training_run import Started
from llmcli.training.loop import Batch, Loop, LoopSettings, TrainingEvent, Validation
from llmcli.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Work:
    """See `training.loop.Loop`, whose parts these are; `kept` is what the run writes of the model."""

    model: nn.Module
    kept: run_folder.Kept
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    count_targets: Callable[[Tensor], int]
    count_tokens: Callable[[Any], int] | None
    validate: Callable[[], Validation | None]
    validated: bool  # whether there is something to validate on
    at_once: bool = False  # whether a step is one micro-batch, however many pieces it is worked off in


def run_work(
    work: Work,
    settled: Settled,
    opened: training_run.Opened,
    text: TextConfig,
    origins: Mapping[str, str | None],
    facts: Mapping[str, str],
    resume: str | None,
    stopping: Callable[[], bool],
) -> Iterator[Started | TrainingEvent]:
    """Begins or goes on with a run, and trains. `origins`: hashes of what it is made of, by name; `facts`: see Started.

    Raises DataError where a checkpoint descends from other origins.
    """
    config, machine = settled.config, settled.machine
    optimizer = Optimizer(work.model, kind=config.optimizer, weight_decay=config.weight_decay, dtype=machine.dtype)
    lineage = {**origins, "seed": config.seed, **versions()}
    folder = run_folder.RunFolder(opened.place, work.kept, lineage)
    names = [name for name, each in origins.items() if each is not None and name != "tokenizer"]
    state, resumed, notices = training_run.gone_on(folder, resume, optimizer, machine.device, names)
    opened.write(config, text, settled.objective)
    place = str(opened.place)
    yield Started(place, settled.plan, machine, settled.shape, config, resumed, tuple(notices), facts)
    settings = LoopSettings.of(config, settled.plan.steps)
    loop = Loop(
        model=work.model,
        optimizer=optimizer,
        settings=dataclasses.replace(settings, grad_accumulation=1) if work.at_once else settings,
        state=state,
        batches=work.batches,
        loss=work.loss,
        count_targets=work.count_targets,
        count_tokens=work.count_tokens,
        validate=work.validate,
        stopping=stopping,
    )
    yield from training_run.trained(
        loop, folder, machine=machine, limit=config.save_total_limit, validated=work.validated
    )
