"""`llmcli bench`: the speed of models on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmcli.cli.info import size
from llmcli.cli.options import GroupedCommand, adapter_option, is_json, settings, shared_options
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.config import BenchConfig

if TYPE_CHECKING:
    from llmcli.operations.bench import BenchReport


@click.command(cls=GroupedCommand)
@click.option(
    "-m", "--model", "models", required=True, multiple=True, metavar="PATH", help="Model or run; given again for each."
)
@adapter_option
@settings(BenchConfig)
@shared_options
def bench(models: tuple[str, ...], bench_config: BenchConfig) -> None:
    """Measure how fast a model reads and decodes.

    Tokens per second of all rows together, the median of the rounds; the spread is the fastest round less the slowest.
    Sampling and the tokenizer are not timed. Rows of a batch are of one length here, each with a prompt of its own.

    \b
    Example:
      llmcli bench -m runs/first/model -m runs/first/int4 --batch-size 1 --batch-size 16
    """
    from llmcli.cli.display import progress
    from llmcli.operations.bench import BenchReport
    from llmcli.operations.bench import bench as run

    reports: list[BenchReport] = []
    with progress("bench") as show:
        for record in run(models, bench_config):
            if isinstance(record, BenchReport):
                reports.append(record)
            else:
                show(record)
    if is_json():
        for report in reports:
            write_json(report)
        return
    write_out("\n".join(_lines(reports)) + "\n")
    for note in (f"{report.model}: {note}" for report in reports for note in report.notes):
        notice(note)


def _lines(reports: list[BenchReport]) -> list[str]:
    """The measurements as a table, and a line for each model below it."""
    width = max(len("model"), *(len(report.model) for report in reports))
    lines = [f"{'model':<{width}}  {'test':<7}  {'tokens':>6}  {'batch':>5}  {'tokens/s':>10}  {'spread':>6}"]
    for report in reports:
        for run in report.runs:
            lines.append(
                f"{report.model:<{width}}  {run.test:<7}  {run.tokens:>6,}  {run.batch:>5,}  "
                f"{run.tokens_per_second:>10,.1f}  {100 * run.spread:>4.0f} %"
            )
    lines.append("")
    for report in reports:
        facts = [
            f"loaded in {report.load_seconds:.2f} s",
            f"first token after {report.first_token_seconds:.2f} s",
            *([] if report.memory_bytes is None else [f"{size(report.memory_bytes)} of memory"]),
            f"{size(report.weight_bytes)} of weights",
        ]
        if report.bandwidth is not None:
            share = report.bandwidth / report.machine_bandwidth
            facts.append(f"read at {size(report.bandwidth)}/s, {100 * share:.0f} % of a copy's bandwidth")
        lines.append(f"{report.model:<{width}}  {'; '.join(facts)}")
    return lines
