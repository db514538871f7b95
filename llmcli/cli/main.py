"""The command `llmcli`: a table of commands, each imported when it is run.

Invariant: importing this module, and `llmcli --help`, import nothing beyond the standard library and click.
"""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

import click

from llmcli import __version__

# name: (module, attribute, one-line help). The line equals the first of the command's docstring; a test holds them.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "quickstart": (
        "quickstart",
        "quickstart",
        "Text to tokenizer, corpus, model, int4 and generated text, in minutes.",
    ),
    "tokenizer": ("tokenizer", "tokenizer", "Train a tokenizer, use it, look into it."),
    "data": ("data", "data", "Check text files and prepare them as a corpus."),
    "pretrain": ("pretrain", "pretrain", "Pretrain a language model on a corpus or on plain text."),
    "finetune": ("finetune", "finetune", "Fine-tune a model for a task, on labelled data."),
    "merge": ("merge", "merge", "Merge an adapter into its base: one model, which exports and runs like any other."),
    "export": ("export", "export", "Export a model as an ONNX folder that runs fast and proves itself."),
    "evaluate": ("evaluate", "evaluate", "Measure a model on text, or on labelled examples."),
    "bench": ("bench", "bench", "Measure how fast a model reads and decodes."),
    "generate": ("generate", "generate", "Continue a prompt with a model."),
    "chat": ("chat", "chat", "Talk with a model, turn by turn."),
    "complete": (
        "complete",
        "complete",
        "List the most probable completions of a prefix, which is taken for the begin of a text.",
    ),
    "embed": ("embed", "embed", "Turn texts into vectors, or into the hidden state of each of their tokens."),
    "similar": ("similar", "similar", "Index files, and search them by meaning."),
    "convert": ("convert", "convert", "Convert a model of another program to a model folder."),
    "answer": ("answer", "answer", "Answer a question about a text."),
    "summarize": ("summarize", "summarize", "Summarize a text, section by section where it is long."),
    "classify": ("classify", "classify", "Give texts the label that a model has learnt, with its probability."),
    "fill-mask": ("fill_mask", "fill_mask", "List what a missing word of a text may be, by an encoder."),
    "info": ("info", "info", "Describe a tokenizer, corpus, index, run or model."),
    "verify": ("verify", "verify", "Check that an artefact is whole and consistent."),
    "plot": ("plot", "plot", "Draw the loss curves of runs; of a sweep, of each of its trials."),
    "doctor": ("doctor", "doctor", "Report what this machine offers and what is missing."),
    "completion": ("completion", "completion", "Print the completion script of a shell."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps, and imports a command when it is asked for."""

    def __init__(self, *arguments: Any, table: dict[str, tuple[str, str, str]], **details: Any) -> None:
        super().__init__(*arguments, **details)
        self.table = table

    def list_commands(self, context: click.Context) -> list[str]:
        """The names, in the table's order."""
        return list(self.table)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Imports the command's module."""
        if name not in self.table:
            return None
        module, attribute, _ = self.table[name]
        command = getattr(importlib.import_module(f"llmcli.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, context: click.Context, arguments: list[str]) -> Any:
        """Names the nearest command when there is none of that name."""
        name = arguments[0]
        if name not in self.table and not name.startswith("-"):
            from llmcli.config import nearest

            context.fail(f"No such command {name!r}{nearest(name, self.table)}")
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in self.table.items()])


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: llmcli quickstart",
)
@click.version_option(__version__, message="llmcli %(version)s")
def main() -> None:
    """From plain text to a language model that runs offline on this machine."""


def run() -> NoReturn:
    """The entry point of the command line."""
    from llmcli.cli.streams import guarded

    guarded(main)
