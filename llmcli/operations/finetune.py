"""`finetune`: a model and labelled data to a model that does a task. One generator that yields what happens.

Invariant: everything that decides the result is settled before the first step and written to the run's config.toml.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from llmcli import settings as configs
from llmcli.config_finetune import FinetuneConfig, LabelledConfig, LoraConfig
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import ConfigError
from llmcli.files.artefacts import end_ids, resolve_model
from llmcli.files.manifest import versions
from llmcli.files.tensors import weights_hash
from llmcli.models.decoder import Decoder
from llmcli.models.dropout import dropout_of, set_dropout
from llmcli.models.encoder import Encoder
from llmcli.models.text_model import TextModel, load_shape, load_to_train, most_tokens
from llmcli.models.vocabulary import grown, refreshed
from llmcli.operations import run_folder, training_run
from llmcli.operations.finetune_data import TuningData, read_data
from llmcli.operations.finetune_settings import choose_machine, plan_of, settle
from llmcli.operations.records import Progress
from llmcli.operations.tasks import Referring, Task, Writing, make_task
from llmcli.operations.training_run import Started
from llmcli.training.loop import Loop, LoopSettings, TrainingEvent, TrainingState, Validation
from llmcli.training.machine import Machine, prepare_machine
from llmcli.training.optimizer import Optimizer, is_matrix
from llmcli.training.packing import ExampleOrder, Packed, batches, in_turn

_VALIDATED_TOKENS = 8192  # of a batch in validation


def finetune(
    task: str,
    model: str | Path,
    data: str | Path | Sequence[str],
    run: str | Path,
    config: FinetuneConfig = FinetuneConfig(),  # noqa: B008  (frozen)
    lora: LoraConfig = LoraConfig(),  # noqa: B008
    labelled: LabelledConfig = LabelledConfig(),  # noqa: B008
    own: Any = None,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    given: Collection[str] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[Progress | Started | TrainingEvent, None, None]:
    """Fine-tunes a model folder, or a run's result, for a task, in the folder `run`.

    `own`: the settings that the task alone has (ClassifyTuneConfig). The rest is as in `pretrain`: `resume`, `given`,
    `stopping`, and what is yielded. The base is read and never written.

    Raises DataError, ConfigError and UsageError before the first step; LlmcliError when the loss is not finite.
    """
    inputs = [str(data)] if isinstance(data, str | Path) else [str(item) for item in data]
    settings = _checked(config, lora, labelled, own)
    base, place = resolve_model(model, onnx=False), Path(run)
    make_task(task, own, base)
    run_folder.refuse_taken(place, resume=resume is not None, overwrite=overwrite)
    run_folder.refuse_own(place, [str(base), *inputs, *([config.validation] if config.validation else [])])
    head = {"task": task, "model": str(model), "data": inputs}
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(
            training_run.opened(
                place,
                f"finetune {task}",
                head,
                settings,
                resume=resume is not None,
                overwrite=overwrite,
                given=given,
            )
        )
        records = _in_folder(task, base, inputs, opened, resume, stopping)
        for record in stack.enter_context(contextlib.closing(records)):
            if isinstance(record, Started):
                opened.started()
            yield record


def plan_finetuning(
    task: str,
    model: str | Path,
    data: str | Path | Sequence[str],
    config: FinetuneConfig = FinetuneConfig(),  # noqa: B008
    lora: LoraConfig = LoraConfig(),  # noqa: B008
    labelled: LabelledConfig = LabelledConfig(),  # noqa: B008
    own: Any = None,
) -> Started:
    """The plan of a run: the data is read and checked, nothing is trained or written."""
    inputs = [str(data)] if isinstance(data, str | Path) else [str(item) for item in data]
    settings = _checked(config, lora, labelled, own)
    for record in prepared_run(task, resolve_model(model, onnx=False), inputs, settings):
        if isinstance(record, PreparedRun):
            return record.started("", None, ())
    raise AssertionError("the data was read")


def _checked(*settings: Any) -> list[Any]:
    found = [each for each in settings if each is not None]
    for each in found:
        configs.check(each)
    return found


# ----------------------------------------------------------------------------------------------------------------
# The run


@dataclasses.dataclass
class PreparedRun:
    """A run that could begin: everything but its folder."""

    task: Task
    tokenizer: TextTokenizer
    data: TuningData
    model: TextModel
    config: FinetuneConfig
    settings: list[Any]
    machine: Machine
    kept: run_folder.Kept

    def started(self, run: str, resumed: int | None, notices: Sequence[str]) -> Started:
        """The record that says so."""
        parameters = dict(self.model.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        muon = self.config.optimizer == "muon"
        plan = plan_of(
            self.config,
            self.model.config,
            parameters=sum(p.numel() for p in parameters.values()),
            trained=sum(p.numel() for p in trained.values()),
            matrices=sum(p.numel() for name, p in trained.items() if muon and is_matrix(name, p)),
            examples=len(self.data.train),
            length=self.data.mean_length,
        )
        return Started(
            run, plan, self.machine, self.model.config, self.config, resumed, tuple(notices), self.data.described()
        )


def prepared_run(
    name: str, base: Path, inputs: Sequence[str], settings: list[Any]
) -> Generator[Progress | PreparedRun, None, None]:
    """Reads data and model; yields how far it is, and last what a run needs."""
    config, lora, labelled, *own = settings
    task = make_task(name, own[0] if own else None, base)
    shape = load_shape(base)
    given = load_tokenizer(base)
    tokenizer = task.tokenizer(given)
    data: TuningData | None = None
    for record in read_data(inputs, task, tokenizer, most_tokens(shape), config, labelled):
        if isinstance(record, TuningData):
            data = record
        else:
            yield record
    assert data is not None
    machine = choose_machine(config, shape)
    prepare_machine(machine)
    share = task.rate_share if isinstance(task, Referring) else 1.0
    config = settle(config, lora, machine, len(data.train), rate_share=share)
    loaded = load_to_train(base, torch.float32, keep=task.keeps).requires_grad_(True)
    longer = tokenizer.vocab_size > given.vocab_size
    if longer:
        assert isinstance(loaded, Decoder)
        grown(loaded, tokenizer.vocab_size)
        refreshed(loaded, given.vocab_size, tokenizer.vocab_size)
    model = task.model(loaded, torch.Generator().manual_seed(config.seed)).to(torch.device(machine.device))
    model.compute_dtype = machine.dtype
    if config.dropout is None:
        config = dataclasses.replace(config, dropout=dropout_of(model))
    facts = task.facts(tokenizer)
    ends = tuple(dict.fromkeys((*end_ids(base), *task.ends(tokenizer))))
    kept: run_folder.Kept
    also = task.write if isinstance(task, Writing) else None
    if lora.lora:
        if isinstance(model, Encoder):
            raise ConfigError("adapters go on decoders; an encoder is trained whole", where="lora")
        from llmcli.operations.adapter_run import adapted

        kept = adapted(model, tokenizer, base, lora, seed=config.seed, new_tokens=longer, facts=facts, ends=ends)
        kept.also = also
    else:
        kept = run_folder.WholeModel(model, tokenizer, facts, ends, also)
    set_dropout(model, config.dropout or 0.0)
    model.train()
    yield PreparedRun(task, tokenizer, data, model, config, [config, *settings[1:]], machine, kept)


def _in_folder(
    name: str,
    base: Path,
    inputs: Sequence[str],
    opened: training_run.Opened,
    resume: str | None,
    stopping: Callable[[], bool],
) -> Generator[Progress | Started | TrainingEvent, None, None]:
    prepared: PreparedRun | None = None
    for record in prepared_run(name, base, inputs, opened.settings):
        if isinstance(record, PreparedRun):
            prepared = record
        else:
            yield record
    assert prepared is not None
    config, machine, model = prepared.config, prepared.machine, prepared.model
    optimizer = Optimizer(model, kind=config.optimizer, weight_decay=config.weight_decay, dtype=machine.dtype)
    lineage = {
        "data": prepared.data.hash,
        "tokenizer": prepared.tokenizer.hash,
        "parent": weights_hash(base),
        "task": name,
        "seed": config.seed,
        **versions(),
    }
    folder = run_folder.RunFolder(opened.place, prepared.kept, lineage)
    started = prepared.started(str(opened.place), None, ())
    run_folder.check_space(opened.place, 2 * started.plan.checkpoint_bytes)
    if isinstance(prepared.task, Referring):  # now, while the model is what the run begins from
        key = "-".join([*(str(lineage[name]) for name in ("data", "tokenizer", "parent")), machine.precision])
        rows = [*prepared.data.train, *prepared.data.validation]
        yield from prepared.task.refer(model, rows, opened.place, key)
    origins = ["data", "tokenizer", "parent"]
    state, resumed, notices = training_run.gone_on(folder, resume, optimizer, machine.device, origins)
    opened.write(*prepared.settings)
    yield dataclasses.replace(started, resumed_from=resumed, notices=tuple(notices))
    loop = loop_of(prepared, optimizer, started.plan.steps, state, stopping)
    yield from training_run.trained(
        loop, folder, machine=machine, limit=config.save_total_limit, validated=bool(prepared.data.validation)
    )


def loop_of(
    prepared: PreparedRun, optimizer: Optimizer, steps: int | None, state: TrainingState, stopping: Callable[[], bool]
) -> Loop:
    """The loop of a run, from a state on."""
    task, config, model, data = prepared.task, prepared.config, prepared.model, prepared.data
    device = torch.device(prepared.machine.device)
    order = ExampleOrder(len(data.train), batch_size=config.batch_size // config.grad_accumulation, seed=config.seed)
    dropout = getattr(prepared.kept, "dropout", None)

    def loss(packed: Packed, targets: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        # What is left out depends on the batch alone, so a resumed run leaves out the same.
        seed = (config.seed * 0x9E3779B97F4A7C15 + packed.number) % 2**63
        if dropout is not None:
            dropout.generator.manual_seed(seed)
        if not isinstance(model, Encoder) and not config.dropout:
            return task.loss(model, packed, targets, scale)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # F.dropout knows no other
            torch.manual_seed(seed)
            return task.loss(model, packed, targets, scale)

    return Loop(
        model=model,
        optimizer=optimizer,
        settings=LoopSettings.of(config, steps),
        state=state,
        batches=lambda number: batches(data.train, order, task.batch, number, device),
        loss=loss,
        count_targets=len,
        count_tokens=lambda packed: packed.tokens,
        validate=_validation(prepared, stopping),
        stopping=stopping,
    )


def _validation(prepared: PreparedRun, stopping: Callable[[], bool]) -> Callable[[], Validation | None]:
    task, model, rows = prepared.task, prepared.model, prepared.data.validation
    device = torch.device(prepared.machine.device)

    def held_out() -> Any:
        for packed, targets in in_turn(rows, task.batch, length=lambda row: len(row.ids), tokens=_VALIDATED_TOKENS):
            if stopping():
                raise _StoppedError
            yield packed.to(device), targets.to(device)

    def validate() -> Validation | None:
        if not rows:
            return None
        model.eval()
        try:
            with torch.no_grad():
                return task.validate(model, held_out())
        except _StoppedError:
            return None
        finally:
            model.train()

    return validate


class _StoppedError(Exception):
    """The end was asked for in the midst of a validation."""
