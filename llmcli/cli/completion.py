"""`llmcli completion`: the completion scripts of the shells."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from llmcli.cli.options import GroupedCommand, shared_options
from llmcli.cli.streams import write_out

SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """The completion script of a shell: it asks `llmcli` itself, so it never goes stale."""
    from llmcli.cli.main import main

    kind = get_completion_class(shell)
    assert kind is not None
    return kind(main, {}, "llmcli", "_LLMCLI_COMPLETE").source().rstrip("\n") + "\n"


@click.command(cls=GroupedCommand)
@click.argument("shell", type=click.Choice(SHELLS))
@shared_options
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example:
      llmcli completion bash >> ~/.bashrc
    """
    write_out(script(shell))
