"""`llmcli fill-mask`: candidates for a missing word."""

from __future__ import annotations

import click

from llmcli.cli.options import GroupedCommand, is_json, settings, shared_options
from llmcli.cli.streams import stdin_is_piped, write_json, write_out
from llmcli.config import FillMaskConfig
from llmcli.errors import UsageError


@click.command(cls=GroupedCommand)
@click.argument("texts", metavar="[TEXT...|-]", nargs=-1)
@click.option("-m", "--model", required=True, metavar="PATH", help="Encoder with a masked-LM head, or run, to use.")
@settings(FillMaskConfig)
@shared_options
def fill_mask(texts: tuple[str, ...], model: str, fill_mask_config: FillMaskConfig) -> None:
    """List what a missing word of a text may be, by an encoder.

    Each TEXT is one; of piped text (or -) each line. The missing word is written as the model's tokenizer writes it:
    [MASK] for BERT and DistilBERT, <mask> for RoBERTa. Without --json a line holds a candidate's probability, the
    candidate, and the text with it, with tabs between.

    \b
    Example:
      llmcli fill-mask -m bert-base-uncased "Paris is the [MASK] of France."
    """
    if not texts and not stdin_is_piped():
        raise UsageError("give texts with a mask, or pipe them in")
    from llmcli.data.text_rows import piped_texts
    from llmcli.operations.fill_mask import fill_mask as run

    for record in run(model, iter(texts) if texts not in ((), ("-",)) else piped_texts(), fill_mask_config):
        if is_json():
            write_json(record)
            continue
        for each in record.candidates:
            token, text = (" ".join(part.split()) or repr(part) for part in (each.token, each.text))
            write_out(f"{each.probability:.4f}\t{token}\t{text}\n")
