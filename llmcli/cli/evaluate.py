"""`llmcli evaluate`: how well a model predicts held-out text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llmcli.cli.info import counted, size, table
from llmcli.cli.options import GroupedCommand, adapter_option, is_json, settings, shared_options
from llmcli.cli.streams import write_json, write_out
from llmcli.config import EvaluateConfig, TextConfig

if TYPE_CHECKING:
    from llmcli.operations.evaluate import EvaluateReport


@click.command(cls=GroupedCommand)
@click.argument("model", metavar="MODEL")
@click.argument("inputs", metavar="TEXT...", nargs=-1, required=True)
@adapter_option
@settings(EvaluateConfig, TextConfig)
@shared_options
def evaluate(model: str, inputs: tuple[str, ...], evaluate_config: EvaluateConfig, text_config: TextConfig) -> None:
    """Measure a model on held-out text.

    Loss in nats per token, perplexity and bits per byte, each with its 95 % interval. Bits per byte compare between
    tokenizers. Windows of the context overlap by half (--stride), so that every token is predicted from many.

    \b
    Example:
      llmcli evaluate runs/first held-out.txt
    """
    from llmcli.cli.display import progress
    from llmcli.operations.evaluate import EvaluateReport
    from llmcli.operations.evaluate import evaluate as run

    report: Any = None
    with progress("evaluate") as show:
        for record in run(model, inputs, evaluate_config, text_config):
            report = record
            if not isinstance(record, EvaluateReport):
                show(record)
    if is_json():
        write_json(report)
    else:
        write_out("\n".join(_lines(report)) + "\n")


def _lines(report: EvaluateReport) -> list[str]:
    """The report as a table; several files stand below each other first."""
    lines = []
    if len(report.files) > 1:
        width = max(len(file.file) for file in report.files)
        lines.append(f"{'file':<{width}}  {'tokens':>10}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}")
        for file in report.files:
            lines.append(
                f"{file.file:<{width}}  {file.tokens:>10,}  {file.loss:>8.4f}  {file.perplexity:>10.3f}  "
                f"{file.bits_per_byte:>9.4f}"
            )
        lines.append("")
    unit = {"loss": "nats/token", "perplexity": "", "bits_per_byte": "bits/byte"}
    facts: dict[str, str] = {}
    for name, value in report.metrics.items():
        interval = report.intervals.get(name)
        between = f"  (95 %: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        facts[name] = f"{value:.4f} {unit[name]}".rstrip() + between
    facts["text"] = f"{counted(report.documents, 'document')}, {report.tokens:,} tokens, {size(report.bytes)}"
    if report.unknown_tokens:
        facts["unknown"] = f"{counted(report.unknown_tokens, 'character')} that the tokenizer does not know"
    facts["windows"] = f"context {report.context:,}, stride {report.stride:,}"
    facts["speed"] = f"{report.tokens_per_second:,.0f} tokens/s, {report.seconds:.1f} s"
    return [*lines, *table(facts)]
