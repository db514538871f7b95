"""A training run's course: begun or gone on with, its records kept, its checkpoints and its result saved.

Invariant: pretraining and fine-tuning go through here, so stop, resume, validation and the best result are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcli.data.heap import HeapLimit
from llmcli.errors import LlmcliError, UsageError
from llmcli.files.artefacts import METRICS, RESULT, RUN_CONFIG
from llmcli.files.checkpoints import keep_newest, latest_checkpoint
from llmcli.files.journal import Journal
from llmcli.models.text_model import Shape
from llmcli.operations import run_folder
from llmcli.training.loop import Loop, NotFiniteError, TrainingEvent, TrainingState
from llmcli.training.machine import Machine
from llmcli.training.optimizer import Optimizer
from llmcli.training.plan import Plan


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """What a run begins with: its plan, its machine, the step that it goes on from."""

    run: str
    plan: Plan
    machine: Machine
    model: Shape
    settings: Any  # PretrainConfig or FinetuneConfig, settled
    resumed_from: int | None
    notices: tuple[str, ...] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what else is to be told, a line each


@dataclasses.dataclass
class Opened:
    """A run's folder, held; `settings` are those to go by: the stored ones where it is gone on with."""

    place: Path
    command: str
    head: Mapping[str, Any]
    settings: list[Any]
    begin: Callable[[], None] | None

    def write(self, *settings: Any) -> None:
        """Writes the settings as they were resolved."""
        run_folder.write_settings(self.place, self.command, self.head, settings)

    def started(self) -> None:
        """Lets what stood here before go: from now on the folder is this run's."""
        if self.begin is not None:
            self.begin()


@contextlib.contextmanager
def opened(
    place: Path,
    command: str,
    head: Mapping[str, Any],
    settings: Sequence[Any],
    *,
    resume: bool,
    overwrite: bool,
    given: Collection[str] | None,
) -> Iterator[Opened]:
    """Holds the folder of a run that begins, or that is gone on with. `head`: what the run is of.

    Raises UsageError where the folder is taken, or where the run there was begun on something else.
    """
    with run_folder.claimed(place, resume=resume, overwrite=overwrite), contextlib.ExitStack() as stack:
        if not (resume and (place / RUN_CONFIG).is_file()):
            begin = stack.enter_context(run_folder.begun(place))
            run_folder.write_settings(place, command, head, settings)
            yield Opened(place, command, head, list(settings), begin)
            return
        then, stored = run_folder.read_settings(place, head, [type(each) for each in settings])
        for name, now in head.items():
            if _normal(then[name]) != _normal(now):
                raise UsageError(f"was begun on {_words(then[name])}, not on {_words(now)}", where=str(place))
        merged = [run_folder.merged_settings(old, new, given) for old, new in zip(stored, settings, strict=True)]
        yield Opened(place, command, head, merged, None)


def _normal(value: Any) -> Any:
    return [os.path.normpath(item) for item in value] if isinstance(value, list) else os.path.normpath(value)


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def gone_on(
    folder: run_folder.RunFolder, resume: str | None, optimizer: Optimizer, device: str, origins: Sequence[str]
) -> tuple[TrainingState, int | None, list[str]]:
    """The state to begin with, the step that is gone on from (None: anew), notices. `origins`: see `refuse_other`."""
    if resume is None:
        return TrainingState(), None, []
    checkpoint, damaged = run_folder.find_checkpoint(folder.path, resume)
    notices = [f"passed over: {line}" for line in damaged]
    if checkpoint is None:
        return TrainingState(), None, notices
    run_folder.refuse_other(checkpoint, folder.lineage, origins)
    state = folder.restore(checkpoint, optimizer, device)
    run_folder.forget_beyond(folder.path, state.step)
    return state, state.step, notices


def trained(
    loop: Loop, folder: run_folder.RunFolder, *, machine: Machine, limit: int, validated: bool
) -> Iterator[TrainingEvent]:
    """Runs the loop; writes the metrics, the checkpoints (`limit` of them stay) and the result.

    `validated`: whether there is something to validate on; without, the last state is the result.
    Raises LlmcliError when a loss is not finite, naming the last good checkpoint.
    """
    place, state = folder.path, loop.state
    facts, heap = dataclasses.asdict(machine), HeapLimit()
    with Journal(place / METRICS, keep=lambda record: run_folder.is_kept(record, state)) as metrics:
        try:
            for event in loop.run():
                heap.check()
                metrics.write(dataclasses.asdict(event))
                if event.event == "validation" and event.best:
                    folder.save_result(state)
                elif event.event == "checkpoint":
                    metrics.sync()
                    folder.save(loop.optimizer, state, facts)
                    keep_newest(place, limit)
                elif event.event == "end" and state.step and not (validated and (place / RESULT).is_dir()):
                    folder.save_result(state)  # nothing to choose by: the last is the result
                yield event
        except NotFiniteError as error:
            metrics.write(dataclasses.asdict(loop.ended(error.kind)))
            raise _with_last_good(error, place) from error


def _with_last_good(error: NotFiniteError, place: Path) -> LlmcliError:
    last, _ = latest_checkpoint(place)
    kept = f"the last good checkpoint is {last}" if last else "there was no checkpoint yet"
    raised = LlmcliError(f"{error.message}; {kept}", where=str(place))
    raised.kind = error.kind
    return raised
