"""A run's folder: its settings, its metrics, its checkpoints, its result.

Invariant: `config.toml` holds every setting as it was resolved at the start, and a resumed run goes on with exactly
these; what may differ (how long, how often to look and save) is named in MAY_CHANGE.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcli import config as configs
from llmcli.config import PretrainConfig, TextConfig
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError, LlmcliError, UsageError
from llmcli.files.artefacts import CHECKPOINTS, METRICS, RESULT, RUN_CONFIG, read_json
from llmcli.files.atomic import make_folders, staged_folder, write_file
from llmcli.files.checkpoints import OPTIMIZER, STATE, latest_checkpoint, save_checkpoint
from llmcli.files.manifest import write_manifest
from llmcli.files.tensors import load_tensors, load_weights, save_tensors
from llmcli.models.decoder import Decoder
from llmcli.models.folder import save_model
from llmcli.training.loop import TrainingState
from llmcli.training.optimizer import Optimizer

MAY_CHANGE = frozenset(
    (
        *("max_steps", "max_tokens", "epochs", "max_seconds", "eval_every", "eval_tokens", "patience"),
        *("save_every", "save_total_limit", "threads"),
    )
)


def write_settings(run: Path, data: str, config: PretrainConfig, text: TextConfig) -> None:
    """Writes `config.toml`: the settings at its top, how text is read in a table `text`."""
    values = {"data": data, **dataclasses.asdict(config), "text": dataclasses.asdict(text)}
    write_file(
        run / RUN_CONFIG, "# Settings of this run, resolved; made by llmcli pretrain.\n" + configs.to_toml(values)
    )


def read_settings(run: Path) -> tuple[str, PretrainConfig, TextConfig]:
    """What `write_settings` wrote: DATA, the settings, how text is read."""
    values = configs.read_toml(run / RUN_CONFIG)
    where = str(run / RUN_CONFIG)
    data, text = values.pop("data", ""), values.pop("text", {})
    return str(data), configs.from_mapping(PretrainConfig, values, where=where), configs.from_mapping(TextConfig, text)


def merged_settings(stored: PretrainConfig, given: PretrainConfig) -> PretrainConfig:
    """The settings to resume with: the stored ones, and of the given ones those that may change.

    A setting that was not given again has its default and is taken as stored. Raises UsageError for one that differs.
    """
    default, changed = PretrainConfig(), {}
    for field in dataclasses.fields(PretrainConfig):
        new, old = getattr(given, field.name), getattr(stored, field.name)
        if new in (old, getattr(default, field.name)):
            continue
        if field.name not in MAY_CHANGE:
            raise UsageError(
                f"the run was begun with {old!r}, which a resumed run keeps; asked: {new!r}", where=field.name
            )
        changed[field.name] = new
    return dataclasses.replace(stored, **changed)


@dataclasses.dataclass
class RunFolder:
    """Where a run of a model is kept, and everything that its checkpoints need beside the model."""

    path: Path
    tokenizer: TextTokenizer
    lineage: Mapping[str, Any]

    @property
    def special_ids(self) -> dict[str, int | None]:
        """For config.json."""
        tokenizer = self.tokenizer
        return {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }

    def save(self, model: Decoder, optimizer: Optimizer, state: TrainingState, machine: Mapping[str, Any]) -> Path:
        """Writes a checkpoint: model, tokenizer, optimizer, state, manifest."""

        def write(folder: Path) -> None:
            save_model(model, folder, special_ids=self.special_ids)
            self.tokenizer.save(folder)
            save_tensors(optimizer.state(), folder / OPTIMIZER)
            content = {**state.to_json(), "machine": dict(machine)}
            (folder / STATE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")

        return save_checkpoint(self.path, state.step, write, self.lineage)

    def save_result(self, model: Decoder, state: TrainingState) -> None:
        """Writes `model/`: the weights as they are, with lineage and step."""
        with staged_folder(self.path / RESULT, overwrite=True) as folder:
            save_model(model, folder, special_ids=self.special_ids)
            self.tokenizer.save(folder)
            write_manifest(folder, {**self.lineage, "step": state.step})


def restore(checkpoint: Path, model: Decoder, optimizer: Optimizer) -> TrainingState:
    """Loads a checkpoint into model and optimizer; returns the state. Raises DataError when it does not fit."""
    device = str(model.embedding.device)
    try:
        model.load_state_dict(load_weights(checkpoint, device))
    except RuntimeError as error:
        raise DataError("the checkpoint's weights do not fit the run's settings", where=str(checkpoint)) from error
    optimizer.load_state(load_tensors(checkpoint / OPTIMIZER, device))
    try:
        return TrainingState.from_json(read_json(checkpoint / STATE))
    except (TypeError, ValueError) as error:
        raise DataError("is not a training state", where=str(checkpoint / STATE)) from error


def find_checkpoint(run: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from: the newest sound one, or the one that is named; and notices of damaged ones."""
    if resume == "auto":
        return latest_checkpoint(run)
    from llmcli.files.manifest import manifest_problems

    place = Path(resume)
    if not place.is_dir():
        raise DataError("no such checkpoint", where=resume)
    problems = manifest_problems(place)
    if problems:
        raise DataError(f"the checkpoint is damaged: {problems[0]}", where=resume)
    return place, []


def forget_beyond(run: Path, step: int) -> None:
    """Removes checkpoints of later steps than the one that is gone on from: their future will be another."""
    from llmcli.files.artefacts import checkpoints_of

    for place in checkpoints_of(run):
        if int(place.name[5:]) > step:
            shutil.rmtree(place, ignore_errors=True)


def clear_contents(run: Path) -> None:
    """Removes what a run made, and nothing else that may lie in the folder."""
    for name in (RUN_CONFIG, METRICS, "loss.svg"):
        (run / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, RESULT, "tokenizer", "corpus"):
        shutil.rmtree(run / name, ignore_errors=True)


def clear_run(run: Path) -> None:
    """Removes a run, with its folder when that is empty then."""
    clear_contents(run)
    (run / ".lock").unlink(missing_ok=True)
    if run.is_dir() and not any(run.iterdir()):
        run.rmdir()


def check_space(run: Path, needed: int) -> None:
    """Raises LlmcliError when a checkpoint would not fit on the disk, or the folder not be made."""
    make_folders(run)
    free = shutil.disk_usage(run).free
    if free < needed:
        raise LlmcliError(
            f"{free / 1e9:.1f} GB are free, checkpoints and the result need {needed / 1e9:.1f} GB", where=str(run)
        )
