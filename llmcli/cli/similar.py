"""`llmcli similar`: an index of files, and what in them is nearest to a text."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from llmcli.cli.options import (
    HELP,
    GroupedCommand,
    adapter_option,
    is_json,
    overwrite_option,
    prompt_text,
    settings,
    shared_options,
)
from llmcli.cli.streams import notice, read_stdin, stdin_is_piped, write_json, write_out
from llmcli.config import IndexConfig, SearchConfig
from llmcli.errors import UsageError


@click.group(context_settings=HELP)
def similar() -> None:
    """Index files, and search them by meaning."""


@similar.command(cls=GroupedCommand)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("-m", "--model", required=True, metavar="PATH", help="Encoder or decoder, or run that made one, to use.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Index to make, or to bring up to date.")
@overwrite_option
@adapter_option
@settings(IndexConfig)
@shared_options
def index(files: tuple[str, ...], model: str, output: str, overwrite: bool, index_config: IndexConfig) -> None:
    """Make an index of files, or bring one up to date.

    FILE is a file, a folder, or a pattern such as 'docs/**/*.md'. Of an index that is there, files with the same bytes
    as before are kept, and those that are not named any more leave.

    \b
    Example:
      llmcli similar index notes.txt -m runs/first -o notes-index
    """
    from llmcli.cli.display import progress
    from llmcli.operations.similar import IndexReport, index_files

    report: Any = None
    with progress("Indexing") as show:
        for record in index_files(files, model, output, index_config, overwrite=overwrite):
            if isinstance(record, IndexReport):
                report = record
            else:
                show(record)
    if is_json():
        write_json(dataclasses.asdict(report))
        return
    for line in report.skipped[:5]:
        notice(f"skipped: {line}")
    if len(report.skipped) > 5:
        notice(f"skipped: {len(report.skipped) - 5:,} more")
    for line in report.notes:
        notice(line)
    done = f"{report.embedded:,} embedded, {report.kept:,} kept, {report.removed:,} files gone"
    how = f"pooling {report.pooling}, {report.dimensions:,} dimensions, {report.vectors}, {_searched(report.search)}"
    write_out(f"{report.index}: {report.files:,} files, {report.pieces:,} pieces ({done}); {how}\n")


def _searched(search: dict[str, Any]) -> str:
    if search["kind"] == "exact":
        return "exact search"
    looked = f"{search['probes']:,} of {search['lists']:,} lists a search, made in {search['seconds']:.1f} s"
    return f"approximate search ({looked}, recall@5 {search['recall_at_5']:.3f} on {search['sample']:,} pieces)"


@similar.command(cls=GroupedCommand)
@click.argument("index", metavar="INDEX")
@click.argument("query", metavar="[QUERY|-]", nargs=-1)
@click.option("-m", "--model", metavar="PATH", help="The model that made the index, where it is elsewhere now.")
@settings(SearchConfig)
@shared_options
def search(index: str, query: tuple[str, ...], model: str | None, search_config: SearchConfig) -> None:
    """Find the pieces of an index that are nearest to a text.

    A line a piece: score (cosine), file:line, the begin of its text; --json has it whole. Scores are exact in any case.

    \b
    Example:
      llmcli similar search notes-index "Where did the old man go?" -n 3
    """
    text = prompt_text(query, read_stdin=read_stdin, piped=stdin_is_piped())
    if text is None:
        raise UsageError("there is nothing to search for: give it as an argument, or pipe it in")
    from llmcli.operations.similar import Searcher

    searcher = Searcher(index, model, search_config)
    for line in searcher.notes:
        notice(line)
    for hit in searcher.search(text):
        if is_json():
            write_json({**dataclasses.asdict(hit), "score": round(hit.score, 6)})
        else:
            shown = " ".join(hit.text.split())
            cut = f"{shown[:157]}..." if len(shown) > 160 else shown
            write_out(f"{hit.score:.4f}\t{hit.file}:{hit.line}\t{cut}\n")
