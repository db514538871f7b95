"""`llmcli chat`: a conversation on the terminal, or messages through a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmcli.cli.options import GroupedCommand, adapter_option, is_json, settings, shared_options
from llmcli.cli.streams import notice, printable, stdin_is_piped, write_json, write_out
from llmcli.config import ChatConfig, ConstraintConfig, SamplingConfig, SpeculationConfig
from llmcli.errors import CutShortError, DataError, LlmcliError, UsageError

if TYPE_CHECKING:
    from llmcli.operations.chat import Answer, Chat

_PROMPT = "> "
_HELP = """\
/help             this list
/reset            forget the conversation, but for the system prompt
/system [TEXT]    show the system prompt, or give another
/regenerate       answer the last question anew
/save FILE        write the conversation as JSON Lines
/load FILE        go on with a conversation that was saved
/exit             end (Ctrl-D too); Ctrl-C stops an answer
//TEXT            a message that begins with a slash"""


@click.command(cls=GroupedCommand)
@click.option("-m", "--model", required=True, metavar="PATH", help="Model or run to use.")
@click.option("-s", "--system", metavar="TEXT", help="System prompt.")
@click.option("--template", metavar="FILE", help="Jinja chat template, in place of the model's own.")
@click.option("--prompt-cache", metavar="FILE", help="Keeps the first prompt, for the next call.")
@adapter_option
@settings(SamplingConfig, ChatConfig, ConstraintConfig, SpeculationConfig)
@shared_options
def chat(
    model: str,
    system: str | None,
    template: str | None,
    prompt_cache: str | None,
    sampling_config: SamplingConfig,
    chat_config: ChatConfig,
    constraint_config: ConstraintConfig,
    speculation_config: SpeculationConfig,
) -> None:
    """Talk with a model, turn by turn.

    On a terminal: lines are messages, answers are streamed; /help lists the commands. Piped: each line is a message
    ({"role": "user", "content": "..."}), which goes on with the conversation, or a list of messages, which is a
    conversation of its own; each is answered by a line of JSON.

    \b
    Example:
      llmcli chat -m runs/first/model -s "Answer in one sentence."
    """
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if not terminal and not stdin_is_piped():
        raise UsageError("there is nobody to talk with: run it on a terminal, or pipe messages in (JSON, one a line)")
    from llmcli.operations.chat import open_chat

    opened = open_chat(
        model,
        chat_config,
        sampling_config,
        system=system,
        template=template,
        constraint=constraint_config,
        speculation=speculation_config,
        prompt_cache=prompt_cache,
    )
    with contextlib.closing(opened):
        if chat_config.seed is None and sampling_config.temperature > 0:
            notice(f"seed {opened.seed}")
        (_converse if terminal else _pipe)(opened)


def _pipe(chat: Chat) -> None:
    """A line of JSON for each line of JSON; a line that is wrong is one answer lost."""
    from llmcli.operations.chat_lines import answer_lines

    lines = failed = cut = 0
    for record in answer_lines(chat, sys.stdin.buffer):
        lines, failed, cut = lines + 1, failed + ("error" in record), cut + (record.get("valid") is False)
        write_json(record)
    if failed:
        raise DataError(f"{failed:,} of {lines:,} lines failed; their records say why", where="<stdin>")
    if cut:
        raise CutShortError(f"{cut:,} of {lines:,} answers were cut short of what their constraint asks for")


# ----------------------------------------------------------------------------------------------------------------
# On the terminal


def _converse(chat: Chat) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- input() then edits lines
    commands = _Commands(chat)
    notice("/help lists the commands; Ctrl-D ends.")
    while (line := _read()) is not None:
        try:
            if not line.strip():
                continue
            if line.startswith("/") and not line.startswith("//"):
                if not commands.run(line):
                    return
            else:
                _show(chat, chat.ask(line.removeprefix("/") if line.startswith("//") else line))
        except LlmcliError as error:  # the conversation goes on
            click.echo(printable(f"Error: {' '.join(str(error).splitlines())}"), err=True)


def _read() -> str | None:
    """A line from the terminal; None at its end (Ctrl-D). Ctrl-C begins the line anew."""
    while True:
        try:
            if sys.stdout.isatty():
                return input(_PROMPT)
            click.echo(_PROMPT, nl=False, err=True)  # stdout carries answers alone
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except EOFError:
            write_out("\n")
            return None
        except KeyboardInterrupt:
            click.echo(err=True)
        except UnicodeDecodeError:
            click.echo("Error: the line is not valid UTF-8", err=True)


class _Commands:
    """What begins with a slash."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self._own: set[Path] = set()  # files that this conversation was saved to or loaded from
        self._table: dict[str, Callable[[str], None]] = {
            "/help": lambda _: click.echo(_HELP, err=True),
            "/reset": lambda _: chat.reset(),
            "/system": self._system,
            "/regenerate": lambda _: _show(chat, chat.regenerate()),
            "/save": self._save,
            "/load": self._load,
        }

    def run(self, line: str) -> bool:
        """Whether the conversation goes on."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name not in self._table:
            from llmcli.config import nearest

            raise UsageError(f"no such command: {name}{nearest(name, [*self._table, '/exit'])} (/help lists them)")
        self._table[name](rest.strip())
        return True

    def _system(self, text: str) -> None:
        if text:
            self.chat.set_system(text)
        else:
            notice(self.chat.system or "There is no system prompt.")

    def _save(self, name: str) -> None:
        from llmcli.files.atomic import refuse_existing

        path = self._path(name)
        refuse_existing(path, overwrite=path.resolve() in self._own)
        self.chat.save(path)
        self._own.add(path.resolve())
        notice(f"{path}: {len(self.chat.messages):,} messages")

    def _load(self, name: str) -> None:
        path = self._path(name)
        self.chat.load(path)
        self._own.add(path.resolve())
        notice(f"{path}: {len(self.chat.messages):,} messages")

    @staticmethod
    def _path(name: str) -> Path:
        if not name:
            raise UsageError("name a file")
        return Path(name).expanduser()


def _show(chat: Chat, records: Iterator[Any]) -> None:
    """Streams an answer. Ctrl-C stops it; a second one, while it has not stopped, ends the program."""
    from llmcli.operations.chat_lines import as_record
    from llmcli.operations.generate import Piece

    answer: Answer | None = None
    with _stopping(chat):
        for record in records:
            if not isinstance(record, Piece):
                answer = record
            elif not is_json():
                write_out(record.text)
    if answer is None:
        notice("Stopped before the answer began; the question was not kept.")
        return
    if is_json():
        write_json(as_record(answer))
        return
    write_out("\n")
    notices = {
        "stopped": "Stopped.",
        "length": "The answer ends here by --max-new-tokens.",
        "cut": "The answer ends here because the model's context is full.",
    }
    if answer.finish_reason in notices:
        notice(notices[answer.finish_reason])
    if answer.valid is False:
        notice("It was cut short of what its constraint asks for.")
    if answer.left_out:
        notice(f"The context is full: the first {answer.left_out:,} messages were left out.")


@contextlib.contextmanager
def _stopping(chat: Chat) -> Iterator[None]:
    def stop(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        chat.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
