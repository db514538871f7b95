"""`llmcli data`: check text files, and prepare them as a corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llmcli.cli.display import progress
from llmcli.cli.info import counted, size, table
from llmcli.cli.labelled import show_labelled
from llmcli.cli.options import (
    HELP,
    GroupedCommand,
    SectionOption,
    is_json,
    overwrite_option,
    setting_option,
    settings,
    shared_options,
)
from llmcli.cli.streams import write_json, write_out
from llmcli.config import CorpusConfig, LabelledConfig, TextConfig
from llmcli.config_finetune import TASKS
from llmcli.errors import UsageError

if TYPE_CHECKING:
    from llmcli.operations.check_data import CheckReport
    from llmcli.operations.prepare import PrepareReport


_LISTED = 100  # files in the table; --json has them all


@click.group(context_settings=HELP)
def data() -> None:
    """Check text files and prepare them as a corpus."""


@data.command(cls=GroupedCommand)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("-t", "--tokenizer", required=True, metavar="DIR", help="Tokenizer that makes the ids.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder to write the corpus to.")
@overwrite_option
@settings(TextConfig, CorpusConfig)
@shared_options
def prepare(
    inputs: tuple[str, ...],
    tokenizer: str,
    output: str,
    overwrite: bool,
    text_config: TextConfig,
    corpus_config: CorpusConfig,
) -> None:
    """Turn text files into a corpus: token ids, split into train and validation.

    INPUT is a file, a folder, a pattern such as 'texts/**/*.jsonl', or - for stdin. Read are txt, md and other text,
    jsonl, json, csv, tsv and parquet, each also as gz, xz or zst. Memory does not grow with the size of the input.

    \b
    Example:
      llmcli data prepare notes.txt -t tokenizer -o corpus
    """
    from llmcli.operations.prepare import PrepareReport
    from llmcli.operations.prepare import prepare as run

    report: Any = None
    with progress("Preparing") as show:
        for record in run(inputs, tokenizer, output, text_config, corpus_config, overwrite=overwrite):
            report = record
            if not isinstance(record, PrepareReport):
                show(record)
    if is_json():
        write_json(report)
    else:
        _show_prepared(report)


def _show_prepared(report: PrepareReport) -> None:
    rule = {"hash": "by the hash of each document", "tail": f"the tail, from {report.split_place}", "none": "none"}
    rate = report.input_bytes / max(report.seconds, 1e-9)
    workers = f"{report.workers} process{'es' * (report.workers != 1)}"
    facts = {
        "corpus": report.corpus,
        "train": _part(report.train_tokens, report.train_bytes, report.train_documents)
        + (f" and {counted(report.train_sentences, 'sentence')} of theirs" if report.train_sentences else ""),
        "validation": f"{_part(report.val_tokens, report.val_bytes, report.val_documents)}; {rule[report.split]}",
        "ids": f"{report.dtype}, vocabulary {report.vocab_size:,}",
        "dropped": _counts(report.dropped),
        "replaced": _counts(report.pii),
        "invalid bytes": f"{report.replaced:,} replaced" if report.replaced else "",
        "encodings": _counts(report.encodings),
        "skipped": f"{len(report.skipped):,} files, the first: {report.skipped[0]}" if report.skipped else "",
        "speed": f"{size(report.input_bytes)} in {report.seconds:.1f} s, {size(rate)}/s ({report.engine}, {workers})",
    }
    write_out("\n".join(table(facts)) + "\n")


def _part(tokens: int, length: int, documents: int) -> str:
    return f"{tokens:,} tokens, {size(length)}, {counted(documents, 'document')}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


@data.command(cls=GroupedCommand)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--min-chars", type=click.IntRange(0), default=1, show_default=True, help="Report documents of fewer characters."
)
@click.option(
    "--task",
    type=click.Choice(TASKS),
    cls=SectionOption,
    section="Labelled data",
    help="Read the files as labelled data for this task.",
)
@setting_option(LabelledConfig, "columns", section="Labelled data")
@click.option(
    "-m",
    "--model",
    metavar="DIR",
    cls=SectionOption,
    section="Labelled data",
    help="Count this model's tokens, against its context, and render by its chat template.",
)
@click.option(
    "-t",
    "--tokenizer",
    metavar="DIR",
    cls=SectionOption,
    section="Labelled data",
    help="Count this tokenizer's tokens.",
)
@click.option(
    "--context",
    "tokens",
    type=click.IntRange(1),
    cls=SectionOption,
    section="Labelled data",
    help="Tokens that an example may have (default: the model's context).",
)
@settings(TextConfig)
@shared_options
@click.pass_context
def check(
    context: click.Context,
    files: tuple[str, ...],
    min_chars: int,
    task: str | None,
    columns: str | None,
    model: str | None,
    tokenizer: str | None,
    tokens: int | None,
    text_config: TextConfig,
) -> None:
    """Report what text files hold, and what prepare would stop at or drop.

    Formats, encodings, documents, empty, very long and duplicate ones, each with file and line. With --task they are
    labelled data: the layout that was recognised, lengths, duplicates, labels, what validation shares with training,
    and for chat the text that is trained on. The exit code is 3 where something would stop prepare or finetune.

    \b
    Example:
      llmcli data check notes.txt
    """
    if task is not None:
        labelled = LabelledConfig(columns, text_config.encoding, text_config.errors)
        context.exit(show_labelled(files, task, labelled, model=model, tokenizer=tokenizer, context=tokens))
    given = {"--columns": columns, "--model": model, "--tokenizer": tokenizer, "--context": tokens}
    for flag, value in given.items():
        if value is not None:
            raise UsageError(f"{flag} goes with --task, which says that the data are labelled")
    from llmcli.operations.check_data import CheckReport, check_data

    report: Any = None
    with progress("Checking") as show:
        for record in check_data(files, text_config, min_chars=min_chars):
            report = record
            if not isinstance(record, CheckReport):
                show(record)
    if is_json():
        write_json({"ok": report.ok, **vars(report)})
    else:
        _show_checked(report)
    context.exit(0 if report.ok else 3)


def _show_checked(report: CheckReport) -> None:
    _show_files(report)
    lines = [
        f"{counted(report.documents, 'document')}, {report.characters:,} characters, {size(report.bytes)} as UTF-8",
        f"length: {report.shortest:,} to {report.longest:,} characters, median about {report.median:,}",
        *(f"skipped: {reason}" for reason in report.skipped),
        *(f"{place.where}: {place.what}" for place in report.places),
    ]
    left = [f"{count:,} {kind}" for kind, count in report.dropped.items()]
    if report.duplicates:
        left.append(f"{report.duplicates:,} duplicates with --dedup exact")
    lines.append(f"prepare would drop: {', '.join(left) or 'nothing'}")
    lines += [f"problem: {problem}" for problem in report.problems]
    more = report.problem_count - len(report.problems)
    if more:
        lines.append(f"problem: {more:,} more")
    write_out("\n".join(lines) + "\n")


def _show_files(report: CheckReport) -> None:
    """A table of the files."""
    head = ("file", "format", "encoding", "bytes", "documents")
    rows = [
        (
            file.name,
            "+".join(filter(None, (file.format, file.compression))),
            file.encoding,
            f"{file.bytes:,}",
            f"{file.documents:,}",
        )
        for file in report.files
    ]
    widths = [max(len(row[column]) for row in (head, *rows[:_LISTED])) for column in range(len(head))]
    for row in (head, *rows[:_LISTED]):
        cells = [
            cell.rjust(width) if column > 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        write_out("  ".join(cells).rstrip() + "\n")
    if len(rows) > _LISTED:
        write_out(f"... and {len(rows) - _LISTED:,} more files\n")
