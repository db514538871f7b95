"""`llmcli export`: a model as an ONNX folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmcli.cli.options import GroupedCommand, is_json, overwrite_option, settings, shared_options
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.config import ExportConfig

if TYPE_CHECKING:
    from llmcli.operations.export import ExportReport


@click.command(cls=GroupedCommand)
@click.argument("model", metavar="MODEL")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder to make.")
@overwrite_option
@settings(ExportConfig)
@shared_options
def export(model: str, output: str, overwrite: bool, export_config: ExportConfig) -> None:
    """Export a model as an ONNX folder that runs fast and proves itself.

    MODEL is a model folder or a run. The folder is compared with the model before it gets its name: logits, cached
    decoding, rows of unequal length, and for quantized weights perplexity and agreement with float32. Where they do
    not hold the exit code is 3 and nothing is left. generate, complete and evaluate take the folder as a model.

    \b
    Example:
      llmcli export runs/first -o runs/first/int4
    """
    from llmcli.cli.display import progress
    from llmcli.operations.export import ExportReport
    from llmcli.operations.export import export as run

    with progress("export") as show:
        for record in run(model, output, export_config, overwrite=overwrite):
            if isinstance(record, ExportReport):
                report = record
            else:
                show(record)
    if is_json():
        write_json(report)
    else:
        _show(report)


def _show(report: ExportReport) -> None:
    from llmcli.cli.info import size

    notice(f"size       {size(report.size_bytes)} of {size(report.source_bytes)}")
    write_out(f"{report.output}\n")
