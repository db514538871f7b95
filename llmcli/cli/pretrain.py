"""`llmcli pretrain`: a corpus, or plain text, to a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import click

from llmcli.cli.options import GroupedCommand, settings, shared_options
from llmcli.cli.running import Signals, given_names, run_options, shown, tell_end, tell_plan
from llmcli.config import ObjectiveConfig, PretrainConfig, TextConfig
from llmcli.models.presets import preset_table

if TYPE_CHECKING:
    from llmcli.training.loop import TrainingEvent


class _PretrainCommand(GroupedCommand):
    """Lists the presets after the options."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Presets"):
            for line in preset_table().splitlines():
                formatter.write(f"  {line}\n")


@click.command(cls=_PretrainCommand)
@click.argument("data", metavar="DATA...", nargs=-1, required=True)
@click.option("-o", "--output", "run", required=True, metavar="DIR", help="Folder of the run.")
@run_options
@settings(ObjectiveConfig, PretrainConfig, TextConfig)
@shared_options
def pretrain(
    data: tuple[str, ...],
    run: str,
    resume: str | None,
    dry_run: bool,
    overwrite: bool,
    objective_config: ObjectiveConfig,
    pretrain_config: PretrainConfig,
    text_config: TextConfig,
) -> None:
    """Pretrain a language model on a corpus or on plain text.

    DATA is a corpus folder, or text files: then a tokenizer and a corpus are made inside the run. RUN/model holds the
    result, the best on validation. Ctrl-C saves; --resume goes on from there.

    For --objective contrastive DATA is text, whose sentences are learnt from, or files of pairs (anchor, positive, and
    where there is one negative). A step's texts are told apart all at once, in however many pieces they are worked off.

    \b
    Example:
      llmcli pretrain notes.txt -o runs/first --preset 1m --max-steps 200
      llmcli pretrain notes.txt -o runs/encoder --objective masked --lowercase --max-steps 200
    """
    from llmcli.operations.pretrain import plan_pretraining

    if dry_run:
        tell_plan(plan_pretraining(data, pretrain_config, text_config, objective_config))
        return
    last = run_and_show(
        data,
        run,
        pretrain_config,
        text_config,
        objective_config,
        resume=resume,
        overwrite=overwrite,
        given=given_names(),
    )
    tell_end(run, last)


def run_and_show(
    data: tuple[str, ...],
    run: str,
    config: PretrainConfig,
    text: TextConfig,
    objective: ObjectiveConfig,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    given: Collection[str] | None = None,
) -> TrainingEvent:
    """Pretrains and shows it; returns the last event. Raises StoppedError when a signal ended it, the work saved."""
    from llmcli.operations.pretrain import pretrain as operation

    signals = Signals()
    work = operation(
        data, run, config, text, objective, resume=resume, overwrite=overwrite, given=given, stopping=signals
    )
    return shown(work, signals)
