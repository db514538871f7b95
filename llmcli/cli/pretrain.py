"""`llmcli pretrain`: a corpus, or plain text, to a model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from llmcli.cli.display import is_live, plan_lines, progress, training
from llmcli.cli.info import counted
from llmcli.cli.options import (
    GroupedCommand,
    SectionOption,
    is_json,
    is_quiet,
    overwrite_option,
    settings,
    shared_options,
)
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.config import PretrainConfig, TextConfig
from llmcli.errors import StoppedError
from llmcli.models.presets import preset_table

if TYPE_CHECKING:
    from llmcli.training.loop import TrainingEvent


_REASONS = {"steps": "all steps are done", "seconds": "the time is up", "patience": "validation got no better"}


class _PretrainCommand(GroupedCommand):
    """Lists the presets after the options."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Presets"):
            for line in preset_table().splitlines():
                formatter.write(f"  {line}\n")


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


@click.command(cls=_PretrainCommand)
@click.argument("data", metavar="DATA...", nargs=-1, required=True)
@click.option("-o", "--output", "run", required=True, metavar="DIR", help="Folder of the run.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="auto",
    default=None,
    metavar="[auto|PATH]",
    help="Go on from the newest sound checkpoint (anew where there is none), or from the one at PATH.",
    cls=SectionOption,
    section="Saving",
)
@click.option("--dry-run", is_flag=True, help="Print the plan (size, memory, work, time) and stop.")
@overwrite_option
@settings(PretrainConfig, TextConfig)
@shared_options
def pretrain(
    data: tuple[str, ...],
    run: str,
    resume: str | None,
    dry_run: bool,
    overwrite: bool,
    pretrain_config: PretrainConfig,
    text_config: TextConfig,
) -> None:
    """Pretrain a language model on a corpus or on plain text.

    DATA is a corpus folder, or text files: then a tokenizer and a corpus are made inside the run. RUN/model holds the
    result, the best on validation. Ctrl-C saves; --resume goes on from there.

    \b
    Example:
      llmcli pretrain notes.txt -o runs/first --preset 1m --max-steps 200
    """
    from llmcli.operations.pretrain import plan_pretraining

    if dry_run:
        planned = plan_pretraining(data, pretrain_config, text_config)
        if is_json():
            write_json({**dataclasses.asdict(planned.plan), "memory_bytes": planned.plan.memory_bytes})
        else:
            write_out("\n".join(plan_lines(planned)) + "\n")
        return
    context = click.get_current_context()
    given = [name for name in context.params if context.get_parameter_source(name) != ParameterSource.DEFAULT]
    last = run_and_show(data, run, pretrain_config, text_config, resume=resume, overwrite=overwrite, given=given)
    if not is_json():
        write_out(os.path.join(run, "model") + "\n")
    notice(f"{counted(last.step, 'step')}, {last.tokens:,} tokens; {_REASONS.get(last.reason or '', last.reason)}")


def run_and_show(
    data: tuple[str, ...],
    run: str,
    config: PretrainConfig,
    text: TextConfig,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    given: Collection[str] | None = None,
) -> TrainingEvent:
    """Pretrains and shows it; returns the last event. Raises StoppedError when a signal ended it, the work saved."""
    from llmcli.operations.pretrain import pretrain as operation
    from llmcli.operations.records import Progress
    from llmcli.operations.training_run import Started
    from llmcli.training.loop import TrainingEvent

    last: TrainingEvent | None = None
    signals = Signals()
    work = operation(data, run, config, text, resume=resume, overwrite=overwrite, given=given, stopping=signals)
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
                show = stack.enter_context(training(signals))
            elif isinstance(record, TrainingEvent):
                last = record
                if is_json():
                    signals.shown(write_json, record)
                signals.shown(show, record)
    assert last is not None
    if last.reason == "stopped":
        signals.stop(f"stopped at step {last.step:,}; saved, go on with --resume")
    return last
