"""What the commands that train share: their options, signals that save the work, and the show of a run.

Invariant: a signal, or a reader who is gone, ends a run only once its work is saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from llmcli.cli.display import is_live, plan_lines, progress, training
from llmcli.cli.info import counted
from llmcli.cli.options import SectionOption, is_json, is_quiet, overwrite_option
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.errors import StoppedError

if TYPE_CHECKING:
    from llmcli.operations.training_run import Started
    from llmcli.training.loop import TrainingEvent

F = TypeVar("F", bound=Callable[..., Any])
_REASONS = {"steps": "all steps are done", "seconds": "the time is up", "patience": "validation got no better"}


def run_options(function: F) -> F:
    """Adds --resume, --dry-run and --overwrite."""
    for decorate in (
        overwrite_option,
        click.option("--dry-run", is_flag=True, help="Print the plan (size, memory, work, time) and stop."),
        click.option(
            "--resume",
            is_flag=False,
            flag_value="auto",
            default=None,
            metavar="[auto|PATH]",
            help="Go on from the newest sound checkpoint (anew where there is none), or from the one at PATH.",
            cls=SectionOption,
            section="Saving",
        ),
    ):
        function = decorate(function)
    return function


def given_names() -> list[str]:
    """The settings that were given on purpose, by whatever way."""
    context = click.get_current_context()
    return [name for name in context.params if context.get_parameter_source(name) != ParameterSource.DEFAULT]


def tell_plan(planned: Started) -> None:
    """What --dry-run prints."""
    if is_json():
        write_json({**dataclasses.asdict(planned.plan), "memory_bytes": planned.plan.memory_bytes})
    else:
        write_out("\n".join(plan_lines(planned)) + "\n")


def tell_end(run: str, last: TrainingEvent) -> None:
    """Where the result is, and why it ended."""
    if not is_json():
        write_out(os.path.join(run, "model") + "\n")
    notice(f"{counted(last.step, 'step')}, {last.tokens:,} tokens; {_REASONS.get(last.reason or '', last.reason)}")


class Signals:
    """Remembers the first SIGINT, SIGTERM or SIGHUP, so that the work can be saved; a SIGINT after it ends at once.

    That nobody reads what is shown any more counts the same: the work is saved, then it ends quietly.
    """

    def __init__(self) -> None:
        self.number = 0
        self.unread = False
        self._silent = is_quiet() or is_json() or is_live()  # the live panel says it itself

    def __call__(self) -> bool:
        return self.number != 0 or self.unread

    def _take(self, number: int, _frame: Any) -> None:
        if self.number:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        if not self._silent:  # past sys.stderr, which may be in the middle of a write that this interrupts
            with contextlib.suppress(OSError):
                os.write(2, b"stopping: saving the work; press Ctrl-C once more to stop at once\n")

    def shown(self, show: Callable[..., None], *what: Any) -> None:
        """Shows something, and takes it as a signal when its reader is gone."""
        try:
            show(*what)
        except BrokenPipeError:
            self.unread = True

    def stop(self, message: str) -> NoReturn:
        """Raises what ends the command once the work is saved."""
        if not self.number:
            raise BrokenPipeError
        raise StoppedError(message, signal_number=self.number)

    @contextlib.contextmanager
    def caught(self) -> Iterator[Signals]:
        """Takes the signals while the body runs."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup, which is meant to go on
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._take) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def shown(work: Generator[Any, None, None], signals: Signals) -> TrainingEvent:
    """Runs and shows it; returns the last event. Raises StoppedError when a signal ended it, the work saved."""
    from llmcli.operations.records import Progress
    from llmcli.operations.training_run import Started
    from llmcli.training.loop import TrainingEvent

    last: TrainingEvent | None = None
    with signals.caught(), contextlib.closing(work), contextlib.ExitStack() as stack:
        show_progress = stack.enter_context(progress("preparing"))
        show: Any = None
        for record in work:
            if isinstance(record, Progress):
                if signals():
                    signals.stop("stopped before the first step")
                signals.shown(show_progress, record)
            elif isinstance(record, Started):
                stack.close()
                resumed = [] if record.resumed_from is None else [f"resumed    from step {record.resumed_from:,}"]
                for line in (*record.notices, *plan_lines(record), *resumed):
                    signals.shown(notice, line)
                show = stack.enter_context(training(record, signals))
            elif isinstance(record, TrainingEvent):
                last = record
                if is_json():
                    signals.shown(write_json, record)
                signals.shown(show, record)
    assert last is not None
    if last.reason == "stopped":
        signals.stop(f"stopped at step {last.step:,}; saved, go on with --resume")
    return last
