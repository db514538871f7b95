"""`llmcli merge`: a base and an adapter to a model of its own."""

from __future__ import annotations

import click

from llmcli.cli.options import GroupedCommand, is_json, overwrite_option, shared_options
from llmcli.cli.streams import notice, write_json, write_out


@click.command(cls=GroupedCommand)
@click.argument("base", metavar="BASE")
@click.argument("adapter", metavar="ADAPTER")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder of the merged model.")
@overwrite_option
@shared_options
def merge(base: str, adapter: str, output: str, overwrite: bool) -> None:
    """Merge an adapter into its base: one model, which exports and runs like any other.

    BASE is a model or a run; ADAPTER a folder as PEFT keeps it, or a run of finetune --lora.

    \b
    Example:
      llmcli merge runs/first runs/adapter -o merged
    """
    from llmcli.operations.merge import merge as run

    report = run(base, adapter, output, overwrite=overwrite)
    if is_json():
        write_json(report)
    else:
        write_out(f"{report.output}\n")
    notice(f"{report.parameters / 1e6:.2f} M parameters")
