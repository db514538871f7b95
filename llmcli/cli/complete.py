"""`llmcli complete`: autocompletion."""

from __future__ import annotations

import dataclasses

import click

from llmcli.cli.options import GroupedCommand, adapter_option, is_json, prompt_text, settings, shared_options
from llmcli.cli.streams import notice, read_stdin, stdin_is_piped, write_json, write_out
from llmcli.config import CompleteConfig
from llmcli.errors import UsageError

_ESCAPED = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})


@click.command(cls=GroupedCommand)
@click.argument("prefix", nargs=-1)
@click.option("-m", "--model", required=True, metavar="PATH", help="Model or run to use.")
@adapter_option
@settings(CompleteConfig)
@shared_options
def complete(prefix: tuple[str, ...], model: str, complete_config: CompleteConfig) -> None:
    """List the most probable completions of a prefix, which is taken for the begin of a text.

    A line each: the probability, a tab, and what comes after PREFIX, up to the end of a word or a line (spaces and line
    ends before it are kept; line ends show as \\n). The tokens of the last word of PREFIX may be chosen anew by the
    model, so that a word that was begun goes on; the probabilities are those of texts that begin with PREFIX.

    \b
    Example:
      llmcli complete -m runs/first/model "The sta"
    """
    text = prompt_text(prefix, read_stdin=read_stdin, piped=stdin_is_piped())
    if text is None:
        raise UsageError('there is no prefix: give it as an argument ("" for an empty one), or pipe it in')
    from llmcli.operations.complete import complete as run

    found = run(model, text, complete_config)
    if found.truncated_tokens:
        notice(f"The first {found.truncated_tokens:,} tokens of the prefix were left out.")
    if is_json():
        # The keys that generate has are those of the best one; nothing was drawn, so there is no seed.
        best = dataclasses.asdict(found.completions[0]) if found.completions else {"text": "", "tokens": 0}
        write_json({**best, "seed": None, **dataclasses.asdict(found)})
        return
    for item in found.completions:
        write_out(f"{item.probability:.4f}\t{item.text.translate(_ESCAPED)}\n")
