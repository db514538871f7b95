"""What `finetune` shows of a search: the trials of a sweep as a table, the learning rate that a range test suggests."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmcli.cli.display import plan_lines, progress, training
from llmcli.cli.options import SectionOption, is_json
from llmcli.cli.running import Signals
from llmcli.cli.streams import notice, write_json, write_out

if TYPE_CHECKING:
    from llmcli.operations.sweep import SweepPlan, Trial, TrialStarted

F = TypeVar("F", bound=Callable[..., Any])


def search_options(function: F) -> F:
    """Adds --find-lr; --sweep is a setting."""
    for decorate in (
        click.option(
            "--find-lr-steps",
            type=click.IntRange(10, 100_000),
            default=100,
            show_default=True,
            help="Steps of --find-lr.",
            cls=SectionOption,
            section="Search",
        ),
        click.option(
            "--find-lr",
            is_flag=True,
            help="Let the rate rise on throw-away weights, suggest one, and stop; RUN/find-lr.svg shows it.",
            cls=SectionOption,
            section="Search",
        ),
    ):
        function = decorate(function)
    return function


def is_sweep(run: str) -> bool:
    """Whether the run that is there is a sweep."""
    from llmcli.files.artefacts import SWEEP, TRIALS

    return any(os.path.exists(os.path.join(run, name)) for name in (SWEEP, TRIALS))


def show_rate(work: Iterator[Any], signals: Signals) -> None:
    """Runs the range test and prints the rate."""
    from llmcli.operations.find_rate import FoundRate

    found = None
    for record in _told(work, signals):
        found = record if isinstance(record, FoundRate) else found
    if found is None:
        signals.stop("stopped before a rate was found; nothing was written")
    if is_json():
        write_json({"event": "rate", **dataclasses.asdict(found)})
    else:
        write_out(f"{found.suggested:.2g}\n")
    notice(
        f"the loss falls fastest at a rate of {found.suggested:.2g}" + (f"; see {found.image}" if found.image else "")
    )


def tell_sweep(planned: SweepPlan) -> None:
    """What --dry-run prints of a sweep: the grid, and the plan of the first trial."""
    if is_json():
        trials = [dataclasses.asdict(trial) for trial in planned.trials]
        plan = planned.first.plan
        first = {**dataclasses.asdict(plan), "memory_bytes": plan.memory_bytes}
        write_json({"trials": trials, "shares": list(planned.shares), "plan": first})
        return
    halts = ", ".join(f"{share:.0%}" for share in planned.shares[:-1])
    told = f"; after {halts} of their length the worse half stops" if halts else ""
    lines = [f"trials     {len(planned.trials)}, one after another{told}"]
    lines += _aligned([[each.name, "" if each.steps is None else f"{each.steps:,} steps"] for each in planned.trials])
    write_out("\n".join([*lines, "the first one:", *plan_lines(planned.first)]) + "\n")


def show_sweep(work: Generator[Any, None, None], signals: Signals) -> None:
    """Runs the trials and prints their table, the best first."""
    from llmcli.operations.sweep import SweepEnd

    end = None
    for record in _told(work, signals):
        end = record if isinstance(record, SweepEnd) else end
    assert end is not None
    if end.model is None:
        signals.stop("stopped in the midst of a trial; saved, go on with --resume")
    if is_json():
        for trial in end.trials:
            write_json({"event": "trial", **dataclasses.asdict(trial)})
        write_json(
            {"event": "sweep", "run": end.run, "best": end.trials[0].name, "model": end.model, "image": end.image}
        )
    else:
        write_out("\n".join(table(end.trials)) + f"\n{end.model}\n")
    if end.image:
        notice(f"see {end.image}")


def table(trials: Sequence[Trial]) -> list[str]:
    """Trials as lines of a table."""
    figures = list(dict.fromkeys(name for trial in trials for name in trial.figures or ()))
    rows = [["trial", "validation", *figures, "at step", "steps", ""]]
    for trial in trials:
        own = [f"{(trial.figures or {})[name]:.4f}" if name in (trial.figures or {}) else "" for name in figures]
        loss = "" if trial.loss is None else f"{trial.loss:.4f}"
        rows.append([trial.name, loss, *own, str(trial.best_step or ""), str(trial.step), trial.state])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=False))]
        lines.append("  ".join([*cells, last]).rstrip())
    return lines


def _told(work: Iterator[Any], signals: Signals) -> Iterator[Any]:
    """Runs an operation, shows its progress and its steps, and hands every record on."""
    from llmcli.operations.records import Progress
    from llmcli.operations.sweep import TrialStarted
    from llmcli.operations.training_run import Started
    from llmcli.training.loop import TrainingEvent

    name: str | None = None
    with signals.caught(), contextlib.ExitStack() as outer, contextlib.ExitStack() as stack:
        outer.callback(getattr(work, "close", lambda: None))
        show: Any = stack.enter_context(progress("preparing"))
        told = False
        for record in work:
            if isinstance(record, Progress):
                if signals():
                    signals.stop("stopped before the first step")
                signals.shown(show, record)
            elif isinstance(record, TrialStarted):
                stack.close()
                name = record.trial.name
                signals.shown(notice, _line(record))
                show = stack.enter_context(progress("preparing"))
            elif isinstance(record, Started):
                stack.close()
                for line in (*record.notices, *([] if told else plan_lines(record))):
                    signals.shown(notice, line)
                told = True
                show = stack.enter_context(training(record, signals))
            elif isinstance(record, TrainingEvent):
                if is_json():
                    extra = {} if name is None else {"trial": name}
                    signals.shown(write_json, {**dataclasses.asdict(record), **extra})
                signals.shown(show, record)
            yield record


def _line(record: TrialStarted) -> str:
    part = "" if record.share == 1 else f", {record.share:.0%} of its length"
    return f"trial {record.number} of {record.count}{part}: {record.trial.name}"
