"""`llmcli answer`: a question about a text."""

from __future__ import annotations

import dataclasses

import click

from llmcli.cli.options import GroupedCommand, adapter_option, is_json, settings, shared_options
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.config import AnswerConfig


@click.command(cls=GroupedCommand)
@click.argument("question", nargs=-1, required=True)
@click.option("-m", "--model", required=True, metavar="PATH", help="Model or run to use.")
@click.option("--context", required=True, metavar="FILE", help="The text that answers; -: stdin.")
@adapter_option
@settings(AnswerConfig)
@shared_options
def answer(question: tuple[str, ...], model: str, context: str, answer_config: AnswerConfig) -> None:
    """Answer a question about a text.

    The answer, or "no answer", is a line on stdout; the place in FILE that says it, counted in characters, is told
    on stderr. A text that is longer than the model's context is read in windows that overlap. Models that were taught
    by `finetune answer` do it well: decoders, which say it in words, and encoders, which find it in the text.

    \b
    Example:
      llmcli answer -m runs/answers --context notes.txt "Who went to the sea?"
    """
    from llmcli.data.task_prompts import NO_ANSWER
    from llmcli.data.whole_text import read_text
    from llmcli.operations.answer import answer as run

    text = read_text(context)
    found = run(model, text, " ".join(question), answer_config)
    if is_json():
        write_json({**dataclasses.asdict(found), "probability": round(found.probability, 6)})
        return
    write_out(f"{found.answer or NO_ANSWER}\n")
    if found.start is not None and found.end is not None:
        said = " ".join(text[found.start : found.end].split())
        notice(f"characters {found.start:,} to {found.end:,}: {said} (probability {found.probability:.3f})")
    elif found.answer is not None:
        notice(f"the text does not say it in these words (probability {found.probability:.3f})")
