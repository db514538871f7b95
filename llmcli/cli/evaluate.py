"""`llmcli evaluate`: how good a model is, on text and on labelled examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llmcli.cli.evaluated import side_by_side, task_lines
from llmcli.cli.info import counted, size, table
from llmcli.cli.options import (
    GroupedCommand,
    adapter_option,
    is_json,
    overwrite_option,
    setting_option,
    settings,
    shared_options,
)
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.config import EvaluateConfig, LabelledConfig, TextConfig
from llmcli.errors import CheckError, UsageError

if TYPE_CHECKING:
    from llmcli.operations.evaluate import EvaluateReport


@click.command(cls=GroupedCommand)
@click.argument("model", metavar="MODEL")
@click.argument("inputs", metavar="[MODEL_B] DATA...", nargs=-1, required=True)
@click.option("--predictions", metavar="FILE", help="Write what the model made of each example, as JSON Lines.")
@click.option("--plot", metavar="FILE.svg|FILE.png", help="classify: draw the confusion matrix.")
@overwrite_option
@adapter_option
@settings(EvaluateConfig, TextConfig)
@setting_option(LabelledConfig, "columns", section="Reading")
@shared_options
def evaluate(
    model: str,
    inputs: tuple[str, ...],
    predictions: str | None,
    plot: str | None,
    overwrite: bool,
    columns: str | None,
    evaluate_config: EvaluateConfig,
    text_config: TextConfig,
) -> None:
    """Measure a model on text, or on labelled examples.

    DATA are files or folders, and what is measured is the --task. All figures have their 95 % intervals. With a second
    model both are measured on the same examples, and the difference gets an interval and a p-value.

    \b
    lm         how well text is predicted: loss in nats per token, perplexity, and
               bits per byte, which compare between tokenizers (windows overlap)
    chat       the same of what the assistant says in conversations, or of completions
    choice     multiple choice and minimal pairs: accuracy by log-probability,
               accuracy_norm by log-probability per byte
    classify   accuracy, macro_f1, each label's precision, recall and F1
    answer     exact_match and f1 by the rules of SQuAD 2.0
    summarize  rouge1, rouge2, rougeL (needs the extra [eval])
    prefer     accuracy and margin of the better answer, whole and per token
    embed      spearman and pearson of pairs' scores with the cosine of their vectors

    \b
    Example:
      llmcli evaluate runs/first held-out.txt
      llmcli evaluate runs/first pairs.jsonl --task choice
    """
    from llmcli.cli.display import progress
    from llmcli.files.atomic import refuse_existing
    from llmcli.operations import evaluate as operation
    from llmcli.operations import evaluate_plot
    from llmcli.operations.records import Progress

    other, data = operation.second_model(inputs)
    if plot is not None:
        if evaluate_config.task != "classify":
            raise UsageError("is of --task classify", where="--plot")
        refuse_existing(plot, overwrite=overwrite)
        evaluate_plot.check_output(plot)
    report: Any = None
    with progress("evaluate") as show:
        for record in operation.evaluate(
            model,
            data,
            evaluate_config,
            text_config,
            other=other,
            columns=columns,
            predictions=predictions,
            overwrite=overwrite,
        ):
            if isinstance(record, operation.Fitting):
                notice(f"the examples are labelled ({record.layout}); --task {record.task} measures by their labels")
            elif isinstance(record, Progress):
                show(record)
            report = record
    if plot is not None:
        evaluate_plot.draw(report, plot)
        notice(f"wrote {plot}")
    if is_json():
        write_json(report)
    else:
        write_out("\n".join(task_lines(report) if report.task != "lm" else _lines(report)) + "\n")
    if report.missed:
        raise CheckError("; ".join(map(str, report.missed)))


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
    if report.other is not None:
        lines += [*side_by_side(report), ""]
    for name, value in report.metrics.items() if report.other is None else ():
        interval = report.intervals.get(name)
        between = f"  (95 %: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        facts[name] = f"{value:.4f} {unit[name]}".rstrip() + between
    facts["text"] = f"{counted(report.documents, 'document')}, {report.tokens:,} tokens, {size(report.bytes)}"
    if report.unknown_tokens:
        facts["unknown"] = f"{counted(report.unknown_tokens, 'character')} that the tokenizer does not know"
    facts["windows"] = f"context {report.context:,}, stride {report.stride:,}"
    facts["speed"] = f"{report.tokens_per_second:,.0f} tokens/s, {report.seconds:.1f} s"
    return [*lines, *table(facts)]
