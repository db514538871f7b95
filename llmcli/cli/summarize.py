"""`llmcli summarize`: a summary of a text."""

from __future__ import annotations

from typing import Any

import click

from llmcli.cli.options import GroupedCommand, adapter_option, is_json, prompt_text, settings, shared_options
from llmcli.cli.streams import notice, read_stdin, stdin_is_piped, write_json, write_out
from llmcli.config import SummarizeConfig
from llmcli.errors import UsageError


@click.command(cls=GroupedCommand)
@click.argument("text", metavar="[TEXT|-]", nargs=-1)
@click.option("-m", "--model", required=True, metavar="PATH", help="Model or run to use.")
@click.option("--input", "source", metavar="FILE", help="File with the text, in place of TEXT.")
@adapter_option
@settings(SummarizeConfig)
@shared_options
def summarize(text: tuple[str, ...], model: str, source: str | None, summarize_config: SummarizeConfig) -> None:
    """Summarize a text, section by section where it is long.

    TEXT, piped text, or that of a file. A text that is longer than the model's context is cut at headings and between
    paragraphs; the summaries of its sections are summarized in turn. --max-tokens is the length of each. Models that
    were taught by `finetune summarize` do it well.

    \b
    Example:
      llmcli summarize -m runs/summaries --input notes.txt --max-tokens 60
    """
    if source is not None and text:
        raise UsageError("there is a text and an --input: give one of them")
    from llmcli.cli.display import progress
    from llmcli.data.whole_text import read_text
    from llmcli.operations.records import Progress
    from llmcli.operations.summarize import summarize as run

    if source is not None:
        given: str | None = read_text(source)
    else:
        given = prompt_text(text, read_stdin=read_stdin, piped=stdin_is_piped())
    if given is None:
        raise UsageError("there is no text: give it as an argument, pipe it in, or name a file: --input FILE")
    found: Any = None
    with progress("summarize") as show:
        for record in run(model, given, summarize_config):
            if isinstance(record, Progress):
                show(record)
            found = record
    if is_json():
        write_json(found)
        return
    write_out(f"{found.summary}\n")
    if found.sections:
        notice(f"The text was read in {len(found.sections):,} sections, and summarized in {found.rounds} rounds.")
    if found.finish_reason == "length":
        notice("The summary ends here by --max-tokens.")
