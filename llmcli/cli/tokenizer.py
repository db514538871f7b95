"""`llmcli tokenizer`: train a tokenizer, use it, look into it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from llmcli.cli.display import progress
from llmcli.cli.info import table
from llmcli.cli.options import HELP, GroupedCommand, is_json, overwrite_option, prompt_text, settings, shared_options
from llmcli.cli.streams import notice, read_stdin, stdin_is_piped, write_json, write_out
from llmcli.config import TextConfig, TokenizerConfig
from llmcli.errors import UsageError

if TYPE_CHECKING:
    from llmcli.data.tokenizer import TextTokenizer
    from llmcli.operations.tokenizer import FileFigures, TokenizerInfo, TrainReport

_tokenizer_option = click.option("-t", "--tokenizer", "path", required=True, metavar="PATH", help="Tokenizer to use.")
_lines_option = click.option("--lines", is_flag=True, help="Each line is a text of its own.")
_BATCH = 1024  # lines that are encoded at once


@click.group(context_settings=HELP)
def tokenizer() -> None:
    """Train a tokenizer, use it, look into it."""


@tokenizer.command(cls=GroupedCommand)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder to write the tokenizer to.")
@overwrite_option
@settings(TokenizerConfig, TextConfig)
@shared_options
def train(
    inputs: tuple[str, ...], output: str, overwrite: bool, tokenizer_config: TokenizerConfig, text_config: TextConfig
) -> None:
    """Train a tokenizer on text files.

    INPUT is a file, a folder, a pattern such as 'texts/**/*.jsonl', or - for stdin. The same texts and settings give
    the same files, byte for byte. Memory does not grow with the size of the input.

    \b
    Example:
      llmcli tokenizer train notes.txt -o tokenizer --vocab-size 1000
    """
    from llmcli.operations.tokenizer import TrainReport, train_tokenizer

    report: Any = None
    with progress("Training") as show:
        for record in train_tokenizer(inputs, output, text_config, tokenizer_config, overwrite=overwrite):
            report = record
            if not isinstance(record, TrainReport):
                show(record)
    if is_json():
        write_json(report)
    else:
        _show_trained(report, tokenizer_config)


def _show_trained(report: TrainReport, config: TokenizerConfig) -> None:
    if config.vocab_size is not None and report.vocab_size < config.vocab_size:
        notice(f"The text gives no more than {report.vocab_size:,} tokens; {config.vocab_size:,} were asked for.")
    if report.thinned:
        notice("There were more distinct words than memory is spent on: a sample of the rare ones was learned from.")
    what = "characters" if report.kind == "char" else "words"
    facts = {
        "tokenizer": report.tokenizer,
        "kind": report.kind,
        "vocabulary": f"{report.vocab_size:,} tokens",
        "special tokens": " ".join(report.special_tokens),
        "learned from": f"{report.characters:,} characters, {report.distinct_words:,} distinct {what}",
        "bytes per token": report.bytes_per_token,
        "time": f"{report.seconds:.1f} s",
    }
    write_out("\n".join(table(facts)) + "\n")


# ----------------------------------------------------------------------------------------------------------------
# Encode


@tokenizer.command(cls=GroupedCommand)
@click.argument("text", nargs=-1)
@_tokenizer_option
@click.option("--ids", "show", flag_value="ids", default="ids", help="Show the ids (default).")
@click.option("--tokens", "show", flag_value="tokens", help="Show the tokens, quoted.")
@click.option("--count", "show", flag_value="count", help="Show how many tokens there are.")
@click.option("--offsets", "show", flag_value="offsets", help="Show a line a token: id, begin, end, token.")
@click.option("--no-special", is_flag=True, help="Leave out what the tokenizer puts around a text ([CLS], <s>).")
@_lines_option
@shared_options
def encode(text: tuple[str, ...], path: str, show: str, no_special: bool, lines: bool) -> None:
    """Turn a text into token ids.

    The text is the argument, or what is piped, or both. The whole of stdin is one text, and not a byte of it is
    stripped. Special tokens that occur in the text are text. Bytes that are no whole character show as \\xe4.

    \b
    Example:
      llmcli tokenizer encode -t tokenizer "Hello world" --tokens
    """
    from llmcli.data.tokenizer import load_tokenizer

    given = prompt_text(text, read_stdin=read_stdin, piped=stdin_is_piped())
    if given is None:
        raise UsageError("there is no text: give it as an argument, or pipe it in")
    opened = load_tokenizer(path)
    for part in _batches(given) if lines else ([given],):
        _show_encoded(opened, part, show, special=not no_special)


def _batches(text: str) -> Iterator[list[str]]:
    """The lines without their ends, some at a time."""
    rows = text.split("\n")
    if not rows[-1]:
        rows.pop()
    for begin in range(0, len(rows), _BATCH):
        yield [row.removesuffix("\r") for row in rows[begin : begin + _BATCH]]


def _show_encoded(opened: TextTokenizer, texts: list[str], show: str, *, special: bool) -> None:
    if show == "offsets":
        for text in texts:
            found = opened.encode_in_detail(text, special)
            if is_json():
                write_json({"ids": found.ids, "tokens": found.tokens, "offsets": found.offsets})
                continue
            rows = zip(found.ids, found.offsets, strict=True)
            write_out(
                "".join(f"{number}\t{begin}\t{end}\t{_quoted(opened, number)}\n" for number, (begin, end) in rows)
            )
        return
    for ids in opened.encode_batch(texts, special):
        if show == "count":
            write_json({"count": len(ids)}) if is_json() else write_out(f"{len(ids)}\n")
        elif is_json():
            write_json({"ids": ids, "tokens": [opened.token_text(identity) for identity in ids]})
        elif show == "tokens":
            write_out(" ".join(_quoted(opened, identity) for identity in ids) + "\n")
        else:
            write_out(" ".join(map(str, ids)) + "\n")


def _quoted(opened: TextTokenizer, identity: int) -> str:
    """A token as a JSON string, but with bytes that are no whole character as `\xe4`."""
    quoted = json.dumps(opened.token_bytes(identity).decode("utf-8", "surrogateescape"), ensure_ascii=False)
    return re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", quoted)


# ----------------------------------------------------------------------------------------------------------------
# Decode


@tokenizer.command(cls=GroupedCommand)
@click.argument("ids", nargs=-1)
@_tokenizer_option
@click.option("--no-special", is_flag=True, help="Leave special tokens out of the text.")
@_lines_option
@shared_options
def decode(ids: tuple[str, ...], path: str, no_special: bool, lines: bool) -> None:
    """Turn token ids back into text.

    IDS are numbers, JSON lists, or what `tokenizer encode --json` writes, as arguments or from stdin. Where the output
    is no terminal, nothing is added to the text, not even a line end.

    \b
    Example:
      llmcli tokenizer decode -t tokenizer 72 101 108
    """
    from llmcli.data.tokenizer import load_tokenizer
    from llmcli.operations.tokenizer import parse_ids, parse_record

    if not ids and not stdin_is_piped():
        raise UsageError("there are no ids: give them as arguments, or pipe them in")
    source = " ".join(ids) if ids and ids != ("-",) else read_stdin()
    lines = lines or source.lstrip().startswith("{")
    if lines:
        rows = [(number, row) for number, row in enumerate(source.split("\n"), start=1) if row.strip()]
        sequences = [parse_record(row, where=f"line {number}") for number, row in rows]
    else:
        sequences = [parse_ids(source)]
    opened = load_tokenizer(path)
    for sequence in sequences:
        text = opened.decode(sequence, skip_special=no_special)
        if is_json():
            write_json({"text": text})
        else:
            needs_end = lines or (sys.stdout.isatty() and not text.endswith("\n"))
            write_out(text + "\n" if needs_end else text)


# ----------------------------------------------------------------------------------------------------------------
# Info


@tokenizer.command(cls=GroupedCommand)
@click.argument("words", nargs=-1, metavar="[TOKENIZER] [FILE...]")
@click.option("-t", "--tokenizer", "path", metavar="PATH", help="Tokenizer; else the first argument is it.")
@settings(TextConfig)
@shared_options
def info(words: tuple[str, ...], path: str | None, text_config: TextConfig) -> None:
    """Describe a tokenizer, and how well it fits texts.

    For each FILE: bytes per token and tokens per word (to compare languages), unused and unknown tokens, and the
    documents that decoding does not give back.

    \b
    Example:
      llmcli tokenizer info tokenizer notes.txt
    """
    from llmcli.data.tokenizer import load_tokenizer
    from llmcli.operations.tokenizer import TokenizerInfo, tokenizer_info

    if path is None:
        if not words:
            raise UsageError("there is no tokenizer: give its folder")
        path, *words_left = words
    else:
        words_left = list(words)
    report: Any = None
    with progress("Measuring") as show:
        for record in tokenizer_info(load_tokenizer(path), words_left, text_config):
            report = record
            if not isinstance(record, TokenizerInfo):
                show(record)
    write_json(report) if is_json() else _show_info(report)


def _show_info(report: TokenizerInfo) -> None:
    roles = {role: getattr(report, f"{role}_id") for role in ("bos", "eos", "pad", "unk")}
    special = list(report.special_tokens)
    facts = {
        "tokenizer": report.tokenizer,
        "kind": report.kind,
        "vocabulary": f"{report.vocab_size:,} tokens",
        "special tokens": " ".join(special[:12]) + (f" and {len(special) - 12} more" if len(special) > 12 else ""),
        "roles": ", ".join(f"{role} {identity}" for role, identity in roles.items() if identity is not None),
        "engine": report.engine,
        "chat template": report.chat_template,
        "sha256": report.hash,
    }
    write_out("\n".join(table(facts)) + "\n")
    for file in report.files:
        write_out("\n" + "\n".join(table(_figures(file))) + "\n")


def _figures(file: FileFigures) -> dict[str, Any]:
    failed = f"{file.round_trip_failures:,}"
    return {
        "file": file.file,
        "size": f"{file.bytes:,} bytes, {file.characters:,} characters, {file.words:,} words",
        "documents": file.documents,
        "tokens": file.tokens,
        "bytes per token": round(file.bytes_per_token, 3),
        "tokens per word": round(file.tokens_per_word, 3),
        "unused tokens": file.unused_tokens,
        "unknown tokens": file.unknown_tokens,
        "round trip failures": failed + (f", the first {file.first_failure}" if file.first_failure else ""),
    }
