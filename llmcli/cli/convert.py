"""`llmcli convert`: a model of another program as a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmcli.cli.options import GroupedCommand, is_json, overwrite_option, settings, shared_options
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.config import ConvertConfig

if TYPE_CHECKING:
    from llmcli.operations.convert import ConvertReport


@click.command(cls=GroupedCommand)
@click.argument("file", metavar="FILE")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder to make.")
@overwrite_option
@settings(ConvertConfig)
@shared_options
def convert(file: str, output: str, overwrite: bool, convert_config: ConvertConfig) -> None:
    """Convert a model of another program to a model folder.

    FILE is a .bin of llama2.c: float32 weights of version 0 (no magic) or 1. With its tokenizer it becomes a folder of
    the family llama, which llmcli and transformers load.

    \b
    Example:
      llmcli convert stories15M.bin --tokenizer tokenizer.bin -o stories
    """
    from llmcli.cli.display import progress
    from llmcli.operations.convert import ConvertReport
    from llmcli.operations.convert import convert as run

    with progress("convert") as show:
        for record in run(file, output, convert_config, overwrite=overwrite):
            if isinstance(record, ConvertReport):
                report = record
            else:
                show(record)
    if is_json():
        write_json(report)
    else:
        _show(report)


def _show(report: ConvertReport) -> None:
    from llmcli.cli.info import size

    notice(f"model        {report.family}, {report.parameters:,} parameters, context {report.context:,} tokens")
    notice(f"vocabulary   {report.vocab_size:,} tokens")
    notice(f"size         {size(report.size_bytes)}, in {report.seconds:.1f} s")
    write_out(f"{report.output}\n")
