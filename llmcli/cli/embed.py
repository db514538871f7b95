"""`llmcli embed`: texts to vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmcli.cli.info import counted
from llmcli.cli.options import (
    GroupedCommand,
    SectionOption,
    adapter_option,
    is_json,
    overwrite_option,
    settings,
    shared_options,
)
from llmcli.cli.streams import notice, stdin_is_piped, write_json, write_out, writes_ascii
from llmcli.config import EmbedConfig
from llmcli.errors import UsageError

if TYPE_CHECKING:
    from llmcli.data.text_rows import TextRow

_FILES: dict[str, Any] = {"cls": SectionOption, "section": "Files"}


@click.command(cls=GroupedCommand)
@click.argument("texts", metavar="[TEXT...|-]", nargs=-1)
@click.option("-m", "--model", required=True, metavar="PATH", help="Encoder or decoder, or run that made one, to use.")
@click.option("-i", "--input", "source", metavar="FILE", help="A text a line, or JSON Lines; -: stdin.", **_FILES)
@click.option("--text-field", default="text", show_default=True, help="Field of JSON Lines with the text.", **_FILES)
@click.option("-o", "--output", metavar="FILE", help="To write: .jsonl, .npy or .safetensors.", **_FILES)
@click.option("--attentions", metavar="FILE", help="Of a single text: who looks at whom, to .safetensors.", **_FILES)
@overwrite_option
@adapter_option
@settings(EmbedConfig)
@shared_options
def embed(
    texts: tuple[str, ...],
    model: str,
    source: str | None,
    text_field: str,
    output: str | None,
    attentions: str | None,
    overwrite: bool,
    embed_config: EmbedConfig,
) -> None:
    """Turn texts into vectors, or into the hidden state of each of their tokens.

    Each TEXT is one; of piped text (or -) each line. On stdout stands a line of JSON a text: id (where its row has
    one), text, embedding, and with --pooling none tokens. A .npy file holds the vectors in the order of the texts, one
    below the other; how they were made stands on stderr, in the metadata of .safetensors, else in a .json file beside.
    A .jsonl file that was interrupted is gone on with by the same command.

    \b
    Example:
      llmcli embed -m runs/first "Deep learning is fun." --pooling mean
    """
    if source is not None and texts:
        raise UsageError("texts come from --input or as arguments, not both")
    if source is None and not texts and not stdin_is_piped():
        raise UsageError("give texts to embed, pipe them in, or name a file: --input FILE")
    if attentions is not None and (len(texts) != 1 or texts == ("-",)):
        raise UsageError("is of a single text: give one as an argument", where="--attentions")
    from llmcli.data.text_rows import read_lines, read_text_rows
    from llmcli.operations.embed import Embedder
    from llmcli.operations.embed_file import embed_into, line_of, refuse_output, write_attentions

    if output is not None:
        refuse_output(output, overwrite=overwrite)
    given: Iterable[str | TextRow]
    if source is not None:
        given = read_text_rows(source, text_field)
    else:
        given = texts if texts not in ((), ("-",)) else read_lines("-")
    embedder = Embedder(model, embed_config)
    if attentions is not None:
        tokens = write_attentions(embedder, texts[0], attentions, overwrite=overwrite)
        notice(f"{attentions}: attention of {counted(len(tokens), 'token')} (layer, head, query, key)")
    notice(embedder.described)
    left_out = 0
    if output is None:
        for record in embedder.embed(given):
            left_out += record.left_out
            write_out(line_of(record, ascii_only=writes_ascii()) + "\n")
    else:
        left_out = _file(embed_into(embedder, given, output, overwrite=overwrite), output, overwrite=overwrite)
    if left_out:
        notice(f"{left_out:,} tokens were not read: their texts are longer than the model reads")


def _file(records: Any, output: str, *, overwrite: bool) -> int:
    """Shows the writing of a file; the tokens that were not read."""
    from llmcli.cli.display import progress
    from llmcli.files.partial import partial_files
    from llmcli.operations.embed_file import EmbedReport

    report: Any = None
    try:
        with progress("Embedding") as show, contextlib.closing(records):
            for record in records:
                if isinstance(record, EmbedReport):
                    report = record
                else:
                    show(record)
    except BaseException as error:  # Ctrl-C too
        refused = overwrite or isinstance(error, UsageError)  # what stands there is not of this call
        for kept in [] if refused else partial_files(Path(output)):
            notice(f"{kept}: holds the vectors so far; the same command goes on there")
        raise
    if is_json():
        write_json({"output": report.output, "left_out": report.left_out, **report.facts})
    else:
        resumed = f", {report.resumed:,} of them as an interrupted call left them" if report.resumed else ""
        vectors = counted(report.rows, "vector")
        notice(f"{report.output}: {counted(report.texts, 'text')}, {vectors}{resumed}")
    return int(report.left_out)
