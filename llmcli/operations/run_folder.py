"""A run's folder: its settings, its metrics, its checkpoints, its result.

Invariant: `config.toml` holds every setting as it was resolved at the start, and a resumed run goes on with exactly
these; what may differ (how long, how often to look and save) is named in MAY_CHANGE.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llmcli import config as configs
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import DataError, LlmcliError, UsageError
from llmcli.files.artefacts import CHECKPOINTS, METRICS, RESULT, RUN_CONFIG, SWEEP, TRIALS, checkpoints_of, read_json
from llmcli.files.atomic import (
    TEMPORARY,
    locked,
    make_folders,
    moved_aside,
    refuse_existing,
    remove_debris,
    remove_folder,
    staged_folder,
    write_file,
)
from llmcli.files.checkpoints import OPTIMIZER, STATE, latest_checkpoint, save_checkpoint
from llmcli.files.manifest import manifest_problems, read_manifest, write_manifest
from llmcli.files.reference import REFERENCE
from llmcli.files.tensors import load_tensors, load_weights, save_tensors
from llmcli.models.text_model import TextModel, restore, save_text_model
from llmcli.training.loop import TrainingState
from llmcli.training.optimizer import Optimizer

LENGTH = ("max_steps", "max_tokens", "epochs", "max_seconds")
MAY_CHANGE = frozenset(
    (*LENGTH, *("eval_every", "eval_tokens", "patience", "save_every", "save_total_limit", "threads", "device"))
)
_CONTENTS = (
    *(RUN_CONFIG, METRICS, "loss.svg", CHECKPOINTS, RESULT, REFERENCE, "tokenizer", "corpus"),
    *(TRIALS, SWEEP, "sweep.svg"),
)
RATES_IMAGE = "find-lr.svg"  # what is made before a run, and is not in its way
C = TypeVar("C")


def write_settings(run: Path, command: str, head: Mapping[str, Any], settings: Sequence[Any]) -> None:
    """Writes `config.toml`: what the run is of (`head`: DATA and its like) and all settings, dataclass by dataclass.

    `llmcli COMMAND -c` reads it, and makes the same run again.
    """
    values = dict(head)
    for each in settings:
        values |= dataclasses.asdict(each)
    write_file(
        run / RUN_CONFIG, f"# Settings of this run, resolved; made by llmcli {command}.\n" + configs.to_toml(values)
    )


def read_settings(run: Path, head: Mapping[str, Any], kinds: Sequence[type]) -> tuple[dict[str, Any], list[Any]]:
    """What `write_settings` wrote: what the run is of, with the keys of `head`; the settings of each kind.

    Raises DataError where a part of the head is missing or of another type than in `head`.
    """
    values = configs.read_toml(run / RUN_CONFIG)
    where = str(run / RUN_CONFIG)
    then = {}
    for name, now in head.items():
        then[name] = values.pop(name, None)
        sound = isinstance(then[name], type(now)) and all(isinstance(item, str) for item in then[name])
        if not sound:
            raise DataError(f"does not say the {name.upper()} that the run was begun on", where=where)
    found: list[Any] = []
    for kind in kinds[1:]:
        names = [field.name for field in dataclasses.fields(kind)]
        own = {name: values.pop(name) for name in names if name in values}
        found.append(configs.from_mapping(kind, own, where=where))
    return then, [configs.from_mapping(kinds[0], values, where=where), *found]


def merged_settings(stored: C, given: C, names: Collection[str] | None = None) -> C:
    """The settings to resume with: the stored ones, and of the given ones those that may change.

    `names`: the settings that were given again; None: those that are not the default. One that leaves the choice to us
    (None, "auto") was settled and stays. A new length takes the place of the old one, whatever that was counted in.
    Raises UsageError for a setting that differs and may not.
    """
    default, changed = type(given)(), {}
    fields = [field.name for field in dataclasses.fields(given)]  # type: ignore[arg-type]
    if names is None:
        names = [name for name in fields if getattr(given, name) != getattr(default, name)]
    for name in fields:
        new, old = getattr(given, name), getattr(stored, name)
        if name not in names or new == old or new in (None, "auto"):
            continue
        if name not in MAY_CHANGE:
            raise UsageError(f"the run was begun with {old!r}, which a resumed run keeps; asked: {new!r}", where=name)
        changed[name] = new
    if not changed.keys().isdisjoint(LENGTH):
        changed = {name: None for name in LENGTH if name not in names and name in fields} | changed
    return dataclasses.replace(stored, **changed)  # type: ignore[type-var]


# ----------------------------------------------------------------------------------------------------------------
# The folder


def is_vacant(run: Path) -> bool:
    """Whether a run can begin here without touching anybody's files: nothing but debris and a picture of rates."""
    if not run.is_dir():
        return not (run.exists() or run.is_symlink())
    ours = (".lock", RATES_IMAGE)
    return all(path.name in ours or (path.name[0] == "." and TEMPORARY in path.name) for path in run.iterdir())


def refuse_taken(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises UsageError where something stands that is neither to be replaced nor a run to go on with."""
    if resume and overwrite:
        raise UsageError("--resume goes on with what is there, --overwrite removes it: give one", where=str(run))
    if is_vacant(run) or (resume and (run / RUN_CONFIG).is_file()):
        return
    if resume and run.is_dir():
        raise UsageError(f"is no run that could be gone on with: it has no {RUN_CONFIG}", where=str(run))
    refuse_existing(run, overwrite=overwrite)


@contextlib.contextmanager
def claimed(run: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Holds the run's folder for one process. Raises UsageError or LlmcliError where it is taken.

    A body that fails leaves no folder that was not there before, unless something of the run is in it.
    """
    refuse_taken(run, resume=resume, overwrite=overwrite)
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]
    lock = run / ".lock"
    ours = not lock.exists()
    with locked(run, "run"):
        refuse_taken(run, resume=resume, overwrite=overwrite)  # another process may have been faster
        remove_debris(run)
        try:
            yield
        except BaseException:
            if ours and is_vacant(run):
                with contextlib.suppress(OSError):
                    lock.unlink(missing_ok=True)
                    for folder in missing:
                        folder.rmdir()
            raise


def begun(run: Path) -> contextlib.AbstractContextManager[Any]:
    """A run that begins anew: see `moved_aside`. What a run makes goes again when it fails before it trains."""
    return moved_aside(run, _CONTENTS)


def refuse_own(run: Path, paths: Sequence[str]) -> None:
    """Raises UsageError for what is read and lies in the run's folder, where it would be written or removed."""
    place = run.resolve()
    for path in paths:
        if Path(path).resolve().is_relative_to(place):
            raise UsageError("is to be read and lies in the run's own folder; put one of them elsewhere", where=path)


class Kept(Protocol):
    """What a run keeps of its model: written into a staged folder, read back from a checkpoint."""

    def write(self, folder: Path, *, result: bool = False) -> None:
        """Writes it; `result`: for use, and not to go on from."""

    def read(self, folder: Path) -> None:
        """Takes on what `write` wrote. Raises DataError when it does not fit."""


@dataclasses.dataclass
class WholeModel:
    """All weights of a model, with the tokenizer.

    `facts`: further keys of config.json, as they are when it is written; `ends`: see `save_model`; `also`: writes what
    else the folder has.
    """

    model: TextModel
    tokenizer: TextTokenizer
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ends: Sequence[int] = ()
    also: Callable[[Path], None] | None = None

    @property
    def special_ids(self) -> dict[str, int | None]:
        """For config.json."""
        return special_ids(self.tokenizer)

    def write(self, folder: Path, *, result: bool = False) -> None:
        """The model's folder."""
        save_text_model(self.model, folder, special_ids=self.special_ids, facts=self.facts, ends=self.ends)
        self.tokenizer.save(folder)
        if self.also is not None:
            self.also(folder)

    def read(self, folder: Path) -> None:
        """The weights, and what validation had found out by then; the tokenizer is the run's."""
        if isinstance(self.facts, dict):
            known = read_json(folder / "config.json")
            self.facts.update({name: known[name] for name in self.facts if name in known})
        try:
            restore(self.model, load_weights(folder, str(self.model.embedding.device)))
        except RuntimeError as error:
            raise DataError("the checkpoint's weights do not fit the run's settings", where=str(folder)) from error


def special_ids(tokenizer: TextTokenizer) -> dict[str, int | None]:
    """The ids of a tokenizer's special tokens by the names of config.json."""
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


@dataclasses.dataclass
class RunFolder:
    """Where a run of a model is kept, and everything that its checkpoints need beside the optimizer."""

    path: Path
    kept: Kept
    lineage: Mapping[str, Any]

    def save(self, optimizer: Optimizer, state: TrainingState, machine: Mapping[str, Any]) -> Path:
        """Writes a checkpoint: model, tokenizer, optimizer, state, manifest."""

        def write(folder: Path) -> None:
            self.kept.write(folder)
            save_tensors(optimizer.state(), folder / OPTIMIZER)
            content = {**state.to_json(), "machine": dict(machine)}
            (folder / STATE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")

        return save_checkpoint(self.path, state.step, write, self.lineage)

    def save_result(self, state: TrainingState) -> None:
        """Writes `model/`: the weights as they are, with lineage and step."""
        with staged_folder(self.path / RESULT, overwrite=True) as folder:
            self.kept.write(folder, result=True)
            write_manifest(folder, {**self.lineage, "step": state.step})

    def restore(self, checkpoint: Path, optimizer: Optimizer, device: str) -> TrainingState:
        """Loads a checkpoint into model and optimizer; returns the state. Raises DataError when it does not fit."""
        self.kept.read(checkpoint)
        optimizer.load_state(load_tensors(checkpoint / OPTIMIZER, device))
        try:
            return TrainingState.from_json(read_json(checkpoint / STATE))
        except (TypeError, ValueError) as error:
            raise DataError("is not a training state", where=str(checkpoint / STATE)) from error


def find_checkpoint(run: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from: the newest sound one, or the one that is named; and notices of damaged ones.

    Raises DataError where there are checkpoints and none is sound: what is left of them is not written over unasked.
    """
    if resume == "auto":
        newest, damaged = latest_checkpoint(run)
        if damaged and newest is None:
            raise DataError(f"no checkpoint is sound ({damaged[0]}); --overwrite begins anew", where=str(run))
        return newest, damaged
    place = Path(resume)
    if not place.is_dir():
        raise DataError("no such checkpoint", where=resume)
    problems = manifest_problems(place)
    if problems:
        raise DataError(f"the checkpoint is damaged: {problems[0]}", where=resume)
    return place, []


def forget_beyond(run: Path, step: int) -> None:
    """Removes checkpoints of later steps than the one that is gone on from: their future will be another."""
    for place in checkpoints_of(run):
        if int(place.name[5:]) > step:
            remove_folder(place)


def refuse_other(checkpoint: Path, lineage: Mapping[str, Any], names: Sequence[str] = ("corpus",)) -> None:
    """Raises DataError when a checkpoint descends from another corpus, or whatever is named, than the run does."""
    known = read_manifest(checkpoint)["lineage"]
    for name in names:
        if known.get(name) != lineage[name]:
            raise DataError(
                f"was trained on another {name} ({str(known.get(name))[:12]}) than the one that is here now "
                f"({str(lineage[name])[:12]})",
                where=str(checkpoint),
            )


def is_kept(record: Mapping[str, Any], state: TrainingState) -> bool:
    """Whether a line of the metrics is older than the state that is gone on from: what comes after is written anew."""
    step = record.get("step", 0)
    return bool(step < state.step) or (
        step == state.step and (record.get("event") != "validation" or state.validated_step == step)
    )


def check_space(run: Path, needed: int) -> None:
    """Raises LlmcliError when a checkpoint would not fit on the disk, or the folder not be made."""
    make_folders(run)
    free = shutil.disk_usage(run).free
    if free < needed:
        raise LlmcliError(
            f"{free / 1e9:.1f} GB are free, checkpoints and the result need {needed / 1e9:.1f} GB", where=str(run)
        )
