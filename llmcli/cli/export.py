"""`llmcli export`: a model as an ONNX folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmcli.cli.options import GroupedCommand, is_json, overwrite_option, settings, shared_options
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.config import ExportConfig, TextConfig

if TYPE_CHECKING:
    from llmcli.operations.export import ExportReport
    from llmcli.operations.export_encoder_check import EncoderCheckReport


@click.command(cls=GroupedCommand)
@click.argument("model", metavar="MODEL")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder to make.")
@overwrite_option
@settings(ExportConfig, TextConfig)
@shared_options
def export(model: str, output: str, overwrite: bool, export_config: ExportConfig, text_config: TextConfig) -> None:
    """Export a model as an ONNX folder that runs fast and proves itself.

    MODEL is a model folder or a run. The folder is compared with the model before it gets its name: logits, cached
    decoding, rows of unequal length, and for quantized weights perplexity and agreement with float32. Where they do
    not hold the exit code is 3 and nothing is left. generate, complete and evaluate take the folder as a model. Of a
    classifier scores and labels are compared; classify and evaluate take it. Of an encoder (BERT, RoBERTa, DistilBERT)
    hidden states, vectors and its head's scores are compared on texts of many lengths.

    \b
    Example:
      llmcli export runs/first -o runs/first/int4
    """
    from llmcli.cli.display import progress
    from llmcli.operations.export import ExportReport
    from llmcli.operations.export import export as run

    with progress("export") as show:
        for record in run(model, output, export_config, text_config, overwrite=overwrite):
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
    from llmcli.operations.export_encoder_check import EncoderCheckReport
    from llmcli.operations.export_scores import ScoreReport

    sizes = f"{size(report.source_bytes)} -> {size(report.size_bytes)}"
    notice(f"size         {sizes}, {report.bits_per_weight:g} bits a weight")
    found = report.checks
    if isinstance(found, ScoreReport):
        notice(f"labels       {100 * found.label_agreement:.2f} % of {found.texts:,} texts get the model's")
        notice(f"scores       differ by {found.score_difference:.3g} at most")
        notice(f"speed        {found.speed_before:,.0f} -> {found.speed_after:,.0f} tokens/s")
    elif isinstance(found, EncoderCheckReport):
        _show_encoder(found)
    elif found is not None:
        increase = found.perplexity_increase_percent
        notice(f"perplexity   {found.perplexity_before:.4f} -> {found.perplexity_after:.4f} ({increase:+.3f} %)")
        notice(f"agreement    top-1 {100 * found.top1_agreement:.2f} %, KL {found.kl_divergence:.6f} nats a token")
        notice(f"prefill      {found.prefill_before:,.0f} -> {found.prefill_after:,.0f} tokens/s")
        notice(f"decode       {found.decode_before:,.0f} -> {found.decode_after:,.0f} tokens/s")
    write_out(f"{report.output}\n")


def _show_encoder(found: EncoderCheckReport) -> None:
    cosines = f"mean {found.state_cosine:.6f}"
    notice(f"states       cosine {cosines}, largest difference {found.state_difference:.3g}")
    if found.vector_cosine is not None:
        notice(f"vectors      cosine mean {found.vector_cosine:.6f}, least {found.least_vector_cosine:.6f}")
    if found.head_agreement is not None:
        notice(f"head         first choice equal in {100 * found.head_agreement:.2f} %")
    notice(f"speed        {found.texts_before:,.0f} -> {found.texts_after:,.0f} texts/s")
