"""`finetune --sweep`: a run for each combination of settings, one after another; the best on validation is the result.

Trials are judged by the task's criterion at their best validation. Where a setting is tried that changes the loss
itself (the beta of preferences, the weights of labels) they are judged by accuracy, and no loss is compared.

Invariant: each trial is a run of its own in RUN/trials, which stops and goes on bit for bit; so a sweep that was
stopped goes on where it was, and a trial that ended is never run again.

Source of the halving: arXiv:1502.07943, algorithm 1, with the half kept each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path
from typing import Any

from llmcli import settings as configs
from llmcli.config_finetune import FinetuneConfig, LabelledConfig, LoraConfig, SweepConfig
from llmcli.data.layouts import find_splits
from llmcli.errors import ConfigError, DataError, LlmcliError, MissingExtraError, UsageError
from llmcli.files.artefacts import RESULT, SWEEP, TRIALS, read_json, read_metrics, resolve_model
from llmcli.files.atomic import staged_folder, write_json
from llmcli.operations import run_folder, training_run
from llmcli.operations.finetune import PreparedRun, finetune, prepared_run
from llmcli.operations.finetune_settings import steps_of
from llmcli.operations.plot import Curve, draw, read_curves
from llmcli.operations.records import Progress
from llmcli.operations.sweep_trials import change_the_loss, combinations
from llmcli.operations.tasks import make_task
from llmcli.operations.training_run import Started
from llmcli.training.loop import TrainingEvent

IMAGE = "sweep.svg"


Worth = tuple[float, float] | None  # what a trial is judged by; of equal ones the loss, or 0; None: it failed


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """How one combination of settings fares."""

    name: str  # of its folder
    settings: dict[str, Any]
    state: str = "waiting"  # "done", "stopped early" (by halving), "failed" (its loss is not finite)
    loss: float | None = None  # of its best validation
    criterion: float | None = None  # what that was judged by: the least is the best
    best_step: int | None = None
    step: int = 0  # steps done
    figures: dict[str, float] | None = None  # of the best validation
    halts: tuple[Worth, ...] = ()  # how it stood at each halt of the halving


@dataclasses.dataclass(frozen=True, slots=True)
class TrialStarted:
    """A trial begins, or goes on."""

    trial: Trial
    number: int
    count: int
    share: float  # of its length that it is now run to


@dataclasses.dataclass(frozen=True, slots=True)
class SweepEnd:
    """The last record: the trials, the best first. `model` is where the best one's is; None: it was stopped."""

    run: str
    trials: tuple[Trial, ...]
    model: str | None
    image: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedTrial:
    """A combination of settings, and how many steps it takes; None: only time bounds it."""

    name: str
    settings: dict[str, Any]
    steps: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep would run. `shares`: of its length, to which a trial is run at each halt; `first`: the first one."""

    trials: tuple[PlannedTrial, ...]
    shares: tuple[float, ...]
    first: Started


Record = Progress | Started | TrainingEvent | TrialStarted | SweepEnd


def sweep(
    task: str,
    model: str | Path,
    data: str | Path | Sequence[str],
    run: str | Path,
    config: FinetuneConfig = FinetuneConfig(),  # noqa: B008  (frozen)
    lora: LoraConfig = LoraConfig(),  # noqa: B008
    labelled: LabelledConfig = LabelledConfig(),  # noqa: B008
    own: Any = None,
    asked: SweepConfig = SweepConfig(),  # noqa: B008
    *,
    resume: str | None = None,
    overwrite: bool = False,
    given: Collection[str] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[Record, None, None]:
    """Runs the trials and copies the best one's model to RUN/model. The rest is as in `finetune`.

    Raises ConfigError for a setting that is not known, or a value that it does not take, before the first trial.
    """
    inputs = [str(data)] if isinstance(data, str | Path) else [str(item) for item in data]
    settings = [each for each in (config, lora, labelled, own, asked) if each is not None]
    for each in settings:
        configs.check(each)
    make_task(task, own)
    if asked.sweep or resume is None:  # else they are those that the sweep was begun with
        combinations(asked, settings, apart=_apart(config, inputs))
    _refuse_unmeasured(config, inputs)
    if resume not in (None, "auto"):
        raise UsageError("a sweep goes on from where each trial was; give --resume without a path", where="resume")
    base, place = resolve_model(model, onnx=False), Path(run)
    run_folder.refuse_taken(place, resume=resume is not None, overwrite=overwrite)
    run_folder.refuse_own(place, [str(base), *inputs, *([config.validation] if config.validation else [])])
    with training_run.opened(
        place,
        f"finetune {task}",
        {"task": task, "model": str(model), "data": inputs},
        settings,
        resume=resume is not None,
        overwrite=overwrite,
        given=given,
    ) as opened:
        trials = _Trials(task, model, inputs, opened, stopping)
        with contextlib.closing(trials.run()) as records:
            yield from records


def plan_sweep(
    task: str,
    model: str | Path,
    data: str | Path | Sequence[str],
    config: FinetuneConfig = FinetuneConfig(),  # noqa: B008
    lora: LoraConfig = LoraConfig(),  # noqa: B008
    labelled: LabelledConfig = LabelledConfig(),  # noqa: B008
    own: Any = None,
    asked: SweepConfig = SweepConfig(),  # noqa: B008
) -> SweepPlan:
    """What a sweep would run: the data is read and checked, nothing is trained or written."""
    inputs = [str(data)] if isinstance(data, str | Path) else [str(item) for item in data]
    settings = [each for each in (config, lora, labelled, own, asked) if each is not None]
    for each in settings:
        configs.check(each)
    found = combinations(asked, settings, apart=_apart(config, inputs))
    _refuse_unmeasured(config, inputs)
    for record in prepared_run(task, resolve_model(model, onnx=False), inputs, list(found[0].settings)):
        if isinstance(record, PreparedRun):
            examples = len(record.data.train)
            trials = (
                PlannedTrial(each.name, dict(each.values), steps_of(each.settings[0], examples)) for each in found
            )
            return SweepPlan(tuple(trials), tuple(shares_of(len(found), asked)), record.started("", None, ()))
    raise AssertionError("the data was read")


def shares_of(count: int, asked: SweepConfig) -> list[float]:
    """The shares of its length that a trial is run to, at each halt."""
    rounds = math.ceil(math.log2(count)) if asked.sweep_method == "halving" else 0
    return [0.5 ** (rounds - number) for number in range(rounds + 1)]


def _apart(config: FinetuneConfig, inputs: Sequence[str]) -> bool:
    """Whether what is validated on has a file of its own."""
    return bool(config.validation or find_splits(inputs).validation)


def _refuse_unmeasured(config: FinetuneConfig, inputs: Sequence[str]) -> None:
    if not (config.val_split or _apart(config, inputs)):
        raise ConfigError("a sweep chooses by validation, so something must be held out", where="val_split")


class _Trials:
    """The trials of a sweep, and what is known of each."""

    def __init__(
        self,
        task: str,
        model: str | Path,
        inputs: list[str],
        opened: training_run.Opened,
        stopping: Callable[[], bool],
    ) -> None:
        self.task, self.model, self.inputs, self.opened, self.stopping = task, model, inputs, opened, stopping
        *self.settings, asked = opened.settings
        self.place = opened.place
        found = combinations(asked, self.settings, apart=_apart(self.settings[0], inputs))
        self.combinations = {each.name: each for each in found}
        self.trials = {name: Trial(name, dict(each.values)) for name, each in self.combinations.items()}
        self.unlike = change_the_loss(list(self.combinations.values()))
        self.shares = shares_of(len(self.trials), asked)
        if (self.place / SWEEP).is_file():
            self._read()

    def run(self) -> Generator[Record, None, None]:
        """Runs what is left to run."""
        active = list(self.trials)
        for halt, share in enumerate(self.shares):
            for name in active:
                trial = self.trials[name]
                if len(trial.halts) > halt:
                    continue
                yield TrialStarted(trial, list(self.trials).index(name) + 1, len(self.trials), share)
                whole = yield from self._trial(name, share)
                if not whole:
                    yield SweepEnd(str(self.place), self._ranked(), None, None)
                    return
                self._write()
            if halt + 1 < len(self.shares):
                active.sort(key=lambda name: _rank(self.trials[name].halts[halt]))
                for name in active[math.ceil(len(active) / 2) :]:
                    if self.trials[name].state == "waiting":
                        self._note(name, state="stopped early")
                active = active[: math.ceil(len(active) / 2)]
        self._write()
        yield self._ended()

    def _trial(self, name: str, share: float) -> Generator[Record, None, bool]:
        """Runs a trial to a share of its length; False where the end of all was asked for."""
        place, reached = self.place / TRIALS / name, False
        work = finetune(
            self.task,
            self.model,
            self.inputs,
            place,
            *self.combinations[name].settings,  # FinetuneConfig, LoraConfig, LabelledConfig, the task's own
            resume="auto",
            stopping=lambda: reached or self.stopping(),
        )
        reason: str | None = None
        try:
            with contextlib.closing(work):
                for record in work:
                    if isinstance(record, Started):
                        self.opened.started()
                    elif isinstance(record, TrainingEvent):
                        reason = record.reason
                        # It halts behind a validation, so that what it is judged by was measured where it stands.
                        reached = reached or (share < 1 and record.event == "validation" and record.progress >= share)
                    yield record
        except LlmcliError as error:
            if error.kind != "not-finite":
                raise
            self._note(name, state="failed", halts=(None,) * len(self.shares), **self._measured(place))
            return True
        if reason == "stopped" and not reached:
            return False
        found = self._measured(place)
        if found["loss"] is None:
            raise DataError("nothing was validated on, so the trials cannot be compared", where=str(place))
        done = reason != "stopped"
        known = self.trials[name].halts
        count = len(self.shares) if done else len(known) + 1  # one that is done has met every halt
        worth = (found["criterion"], 0.0 if self.unlike else found["loss"])
        halts = (*known, *(worth,) * (count - len(known)))
        self._note(name, state="done" if done else "waiting", halts=halts, **found)
        return True

    def _measured(self, place: Path) -> dict[str, Any]:
        """What the trial's metrics say."""
        records = list(read_metrics(place))
        best: dict[str, Any] = next(
            (record for record in reversed(records) if record["event"] == "validation" and record["best"]), {}
        )
        step = max((record["step"] for record in records), default=0)
        accuracy = (best.get("figures") or {}).get("accuracy")
        return {
            "loss": best.get("loss"),
            "criterion": -accuracy if self.unlike and accuracy is not None else best.get("criterion"),
            "best_step": best.get("step"),
            "figures": best.get("figures"),
            "step": step,
        }

    def _note(self, name: str, **changes: Any) -> None:
        self.trials[name] = dataclasses.replace(self.trials[name], **changes)

    def _ranked(self) -> tuple[Trial, ...]:
        """Those that ran to their end before those that did not, the better before the worse."""

        def place(trial: Trial) -> tuple[bool, tuple[float, float], str]:
            return trial.state != "done", _rank(trial.halts[-1] if trial.halts else None), trial.name

        return tuple(sorted(self.trials.values(), key=place))

    def _ended(self) -> SweepEnd:
        ranked = self._ranked()
        if ranked[0].state != "done":
            raise LlmcliError("the loss of every trial was not finite; try lower rates", where=str(self.place))
        _keep(self.place / TRIALS / ranked[0].name / RESULT, self.place / RESULT)
        image: Path | None = self.place / IMAGE
        curves = [each for each in read_curves([self.place / TRIALS / name for name in self.trials]) if each.validation]
        try:
            assert image is not None
            draw([Curve(each.run, (), each.validation) for each in curves], image)
        except MissingExtraError:
            image = None
        return SweepEnd(str(self.place), ranked, str(self.place / RESULT), None if image is None else str(image))

    def _write(self) -> None:
        write_json(self.place / SWEEP, {"trials": [dataclasses.asdict(trial) for trial in self.trials.values()]})

    def _read(self) -> None:
        path = self.place / SWEEP
        try:
            for values in read_json(path)["trials"]:
                halts = tuple(None if each is None else (each[0], each[1]) for each in values["halts"])
                trial = Trial(**{**values, "halts": halts})
                if trial.name in self.trials:
                    self.trials[trial.name] = trial
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("does not say how the trials fared; --overwrite begins anew", where=str(path)) from error


def _rank(worth: Worth) -> tuple[float, float]:
    return (math.inf, math.inf) if worth is None else worth


def _keep(result: Path, target: Path) -> None:
    """Copies a trial's model, byte for byte, manifest and all."""
    with staged_folder(target, overwrite=True) as folder:
        shutil.copytree(result, folder, dirs_exist_ok=True)
