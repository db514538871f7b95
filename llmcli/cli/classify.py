"""`llmcli classify`: texts to labels."""

from __future__ import annotations

from collections.abc import Iterator

import click

from llmcli.cli.info import counted
from llmcli.cli.options import GroupedCommand, adapter_option, is_json, settings, shared_options
from llmcli.cli.streams import notice, stdin_is_piped, write_json, write_out
from llmcli.config import ClassifyConfig
from llmcli.errors import UsageError


@click.command(cls=GroupedCommand)
@click.argument("texts", metavar="[TEXT...|-]", nargs=-1)
@click.option("-m", "--model", required=True, metavar="PATH", help="Classifier, or run that made one, to use.")
@click.option("--input", "source", metavar="FILE", help="Texts: JSON, JSONL, CSV, TSV, parquet, or a line each.")
@click.option("--text-field", default="text", show_default=True, help="Its field, or the number of a column.")
@adapter_option
@settings(ClassifyConfig)
@shared_options
def classify(
    texts: tuple[str, ...], model: str, source: str | None, text_field: str, classify_config: ClassifyConfig
) -> None:
    """Give texts the label that a model has learnt, with its probability.

    Each TEXT is one; of piped text (or -) each line. Without --json a line holds label, probability and text, with tabs
    between.

    \b
    Example:
      llmcli classify -m runs/labels "A film to remember."
    """
    piped = stdin_is_piped()
    if source is not None and texts:
        raise UsageError("texts come from --input or as arguments, not both")
    if source is None and not texts and not piped:
        raise UsageError("give texts to classify, pipe them in, or name a file: --input FILE")
    from llmcli.data.text_rows import piped_texts
    from llmcli.operations.classify import classify as run

    given = iter(texts)
    if source is not None:
        given = _rows(source, text_field)
    elif texts in ((), ("-",)):
        given = piped_texts()
    cut = 0
    for record in run(model, given, classify_config):
        cut += record.cut
        if is_json():
            several = {} if record.labels is None else {"labels": list(record.labels)}
            found = {"text": record.text, "label": record.label, "probability": round(record.probability, 6)}
            write_json({**found, **several, "probabilities": {k: round(v, 6) for k, v in record.probabilities.items()}})
        else:
            label = record.label if record.labels is None else ",".join(record.labels)
            write_out(f"{label or '-'}\t{record.probability:.4f}\t{' '.join(record.text.split())}\n")
    if cut:
        notice(f"{counted(cut, 'text')} longer than the model's context; the end was not read")


def _rows(source: str, field: str) -> Iterator[str]:
    from llmcli.config import TextConfig
    from llmcli.data.readers import read_documents

    for document in read_documents([source], TextConfig(text_field=field, split_on="line")):
        if document.text.strip():
            yield document.text.rstrip("\n")
