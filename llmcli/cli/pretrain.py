"""`llmcli pretrain`: a corpus, or plain text, to a model."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from llmcli.cli.options import GroupedCommand, SectionOption, is_json, overwrite_option, settings, shared_options
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.config import PretrainConfig, TextConfig
from llmcli.errors import StoppedError
from llmcli.models.presets import preset_table

if TYPE_CHECKING:
    from llmcli.training.loop import TrainingEvent


class _PretrainCommand(GroupedCommand):
    """Lists the presets after the options."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Presets"):
            for line in preset_table().splitlines():
                formatter.write(f"  {line}\n")


class Signals:
    """Remembers the first SIGINT or SIGTERM, so that the work can be saved; the second SIGINT ends at once."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> bool:
        return self.number != 0

    def _take(self, number: int, _frame: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        notice("stopping: saving the work; press Ctrl-C once more to stop at once")

    @contextlib.contextmanager
    def caught(self) -> Iterator[Signals]:
        """Takes the signals while the body runs."""
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
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
    from llmcli.cli.display import plan_lines
    from llmcli.operations.pretrain import plan_pretraining

    if dry_run:
        planned = plan_pretraining(data, pretrain_config, text_config)
        if is_json():
            write_json({**dataclasses.asdict(planned.plan), "memory_bytes": planned.plan.memory_bytes})
        else:
            write_out("\n".join(plan_lines(planned)) + "\n")
        return
    last = run_and_show(data, run, pretrain_config, text_config, resume=resume, overwrite=overwrite)
    if not is_json():
        write_out(f"{run}/model\n")
    notice(f"{last.step:,} steps, {last.tokens:,} tokens; the end: {last.reason}")


def run_and_show(
    data: tuple[str, ...],
    run: str,
    config: PretrainConfig,
    text: TextConfig,
    *,
    resume: str | None = None,
    overwrite: bool = False,
) -> TrainingEvent:
    """Pretrains and shows it; returns the last event. Raises StoppedError when a signal ended it, the work saved."""
    from llmcli.cli.display import plan_lines, progress, training
    from llmcli.operations.pretrain import Started
    from llmcli.operations.pretrain import pretrain as operation
    from llmcli.operations.records import Progress
    from llmcli.training.loop import TrainingEvent

    last: TrainingEvent | None = None
    with Signals().caught() as signals, contextlib.ExitStack() as stack:
        show_progress = stack.enter_context(progress("preparing"))
        show: Any = None
        for record in operation(data, run, config, text, resume=resume, overwrite=overwrite, stopping=signals):
            if isinstance(record, Progress):
                if signals():
                    raise StoppedError("stopped before the first step", signal_number=signals.number)
                show_progress(record)
            elif isinstance(record, Started):
                stack.close()
                for line in (*record.notices, *plan_lines(record)):
                    notice(line)
                if record.resumed_from is not None:
                    notice(f"resumed   from step {record.resumed_from:,}")
                show = stack.enter_context(training())
            elif isinstance(record, TrainingEvent):
                last = record
                if is_json():
                    write_json(record)
                show(record)
    assert last is not None
    if last.reason == "stopped":
        raise StoppedError(f"stopped at step {last.step:,}; saved, go on with --resume", signal_number=signals.number)
    return last
