"""`llmcli generate`: text from a model, streamed, or a file of prompts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from llmcli.cli.options import (
    GroupedCommand,
    SectionOption,
    adapter_option,
    is_json,
    overwrite_option,
    prompt_text,
    settings,
    shared_options,
)
from llmcli.cli.streams import notice, read_stdin, stdin_is_piped, write_json, write_out
from llmcli.config import ConstraintConfig, GenerateConfig, SamplingConfig, SpeculationConfig
from llmcli.errors import CutShortError, DataError, UsageError

if TYPE_CHECKING:
    from llmcli.operations.generate import Generated

_ESCAPED = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})
_FILES: dict[str, Any] = {"cls": SectionOption, "section": "Files"}


@click.command(cls=GroupedCommand)
@click.argument("prompt", nargs=-1)
@click.option("-m", "--model", required=True, metavar="PATH", help="Model or run to use.")
@click.option("-p", "--prompt", "named", metavar="TEXT", help="The prompt, in place of the argument.")
@click.option("-i", "--input", "source", metavar="FILE", help="JSON Lines with a prompt each; -: stdin.", **_FILES)
@click.option("-o", "--output", metavar="FILE", help="JSON Lines to write; goes on where it stopped.", **_FILES)
@click.option("--prompt-field", default="prompt", show_default=True, help="Field with the prompt.", **_FILES)
@click.option("--prompt-cache", metavar="FILE", help="Keeps a prompt that was read, for the next call.", **_FILES)
@overwrite_option
@adapter_option
@settings(SamplingConfig, GenerateConfig, ConstraintConfig, SpeculationConfig)
@shared_options
def generate(
    prompt: tuple[str, ...],
    model: str,
    named: str | None,
    source: str | None,
    output: str | None,
    prompt_field: str,
    prompt_cache: str | None,
    overwrite: bool,
    sampling_config: SamplingConfig,
    generate_config: GenerateConfig,
    constraint_config: ConstraintConfig,
    speculation_config: SpeculationConfig,
) -> None:
    """Continue a prompt with a model.

    Piped text comes before PROMPT. The text is streamed to stdout; several samples are set apart by a line "---". With
    --logprobs it is a line a token: the token, its log-probability, and the most probable ones in its place. With
    --input, each row of a file is continued into --output, and an interrupted call goes on when it is repeated. A text
    under a constraint (--json-schema, --regex, --choice, --grammar) fits it, or was cut short: exit code 4. --lookup
    and --draft-model change the time that a text takes, never the text.

    \b
    Example:
      llmcli generate -m runs/first/model "The state" --max-new-tokens 50 --seed 1
    """
    if (source is None) != (output is None):
        raise UsageError("--input and --output go together")
    if source is not None and prompt_cache is not None:
        raise UsageError("--prompt-cache goes with one prompt, not with --input")
    if source is not None and output is not None:
        if prompt or named is not None:
            raise UsageError("there is a prompt and an --input: give one of them")
        chosen = (generate_config, sampling_config, constraint_config, speculation_config)
        _file(model, source, output, *chosen, prompt_field, overwrite)
        return
    if prompt and named is not None:
        raise UsageError("there are two prompts: give one of PROMPT and --prompt")
    words = prompt if named is None else (named,)
    text = prompt_text(words, read_stdin=read_stdin, piped=stdin_is_piped())
    if text is None:
        raise UsageError('there is no prompt: give it as an argument ("" for an empty one), or pipe it in')
    if not text and words in ((), ("-",)):  # what should have written it failed, more likely than not
        raise DataError('is empty; to begin with nothing, give "" as the prompt', where="<stdin>")
    _one(model, text, generate_config, sampling_config, constraint_config, speculation_config, prompt_cache)


def _one(
    model: str,
    text: str,
    config: GenerateConfig,
    sampling: SamplingConfig,
    constraint: ConstraintConfig,
    speculation: SpeculationConfig,
    cache: str | None,
) -> None:
    from llmcli.operations.generate import Generated, Piece, new_seed
    from llmcli.operations.generate import generate as run

    if config.num_samples > 1:
        _one_at_a_time(config, speculation)
    drawn = config.seed is None and sampling.temperature > 0
    if config.seed is None:
        config = dataclasses.replace(config, seed=new_seed())
    streamed = config.num_samples == 1 and config.logprobs is None and not is_json()
    told = False
    cut = 0
    for record in run(model, text, config, sampling, constraint, speculation, prompt_cache=cache):
        if drawn:  # said once there is something to repeat: an error stays one line
            notice(f"seed {config.seed}")
            drawn = False
        if isinstance(record, Piece) and streamed:
            write_out(record.text)
        elif isinstance(record, Generated):
            if record.truncated_tokens and not told:
                notice(f"The first {record.truncated_tokens:,} tokens of the prompt were left out.")
                told = True
            _show(record, streamed)
            if cache is not None and not record.sample:
                found = f"{record.cached_tokens or 0:,} of {record.prompt_tokens:,}"
                notice(f"{found} tokens of the prompt were in {cache}.")
            cut += record.valid is False
            if record.finish_reason == "cut":
                notice("The text ends here because the model's context is full.")
    if cut:
        raise CutShortError("the text was cut short of what its constraint asks for; a greater --max-new-tokens helps")


def _one_at_a_time(config: GenerateConfig, speculation: SpeculationConfig) -> None:
    if speculation != SpeculationConfig() and config.batch_size > 1:
        notice(f"With guesses rows run one at a time; without them {config.batch_size} do together.")


def _show(record: Generated, streamed: bool) -> None:
    if is_json():
        write_json({name: value for name, value in dataclasses.asdict(record).items() if value is not None})
        return
    if record.sample:
        write_out("---\n")
    if record.logprobs is not None:
        for token in record.logprobs:
            others = (f"{text.translate(_ESCAPED)}\t{logprob:.4f}" for text, logprob in token.top)
            write_out("\t".join((token.token.translate(_ESCAPED), f"{token.logprob:.4f}", *others)) + "\n")
    else:
        write_out("\n" if streamed else record.text + "\n")


def _file(
    model: str,
    source: str,
    output: str,
    config: GenerateConfig,
    sampling: SamplingConfig,
    constraint: ConstraintConfig,
    speculation: SpeculationConfig,
    field: str,
    overwrite: bool,
) -> None:
    from llmcli.cli.display import progress
    from llmcli.operations.generate_file import FileReport, FileStarted, generate_file
    from llmcli.operations.records import Progress

    _one_at_a_time(config, speculation)
    with progress("generate") as show:
        for record in generate_file(
            model, source, output, config, sampling, constraint, speculation, field=field, overwrite=overwrite
        ):
            if isinstance(record, FileStarted):
                if config.seed is None and sampling.temperature > 0:
                    notice(f"seed {record.seed}")
                if record.resumed:
                    notice(f"{record.resumed:,} prompts stand in {output} already")
            elif isinstance(record, Progress):
                show(record)
            elif isinstance(record, FileReport):
                report = record
    if is_json():
        write_json({name: value for name, value in dataclasses.asdict(report).items() if value is not None})
    else:
        notice(f"{report.output}: {report.prompts:,} prompts, {report.failed:,} failed; {report.tokens:,} tokens")
    if report.failed:
        raise DataError(f"{report.failed:,} of {report.prompts:,} prompts failed; their records say why", where=output)
    if report.cut:
        raise CutShortError(f"{report.cut:,} texts were cut short of what their constraint asks for", where=output)
