"""Writes what of the documentation is made from the code: docs/commands.md, and the tables and the tree of README.md.

`make docs` runs it; a test fails when the files are not what it would write.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMANDS = ROOT / "docs" / "commands.md"
README = ROOT / "README.md"
HEAD = """# Commands

Made from the commands themselves by `make docs`. A command that has settings also takes `-c/--config FILE.toml`;
a flag beats `LLMCLI_<COMMAND>_<OPTION>`, which beats the file, which beats the default.

"""


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command and subcommand by its full name, in the order of the help."""
    from llmcli.cli.main import main

    def walk(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield f"{prefix} {name}", command
            if isinstance(command, click.Group):
                yield from walk(command, f"{prefix} {name}")

    yield "llmcli", main
    yield from walk(main, "llmcli")


def help_of(name: str) -> str:
    """What `--help` prints, 100 columns wide."""
    from llmcli.cli.main import main

    out = io.StringIO()
    words = [*name.split()[1:], "--help"]
    with contextlib.redirect_stdout(out), contextlib.suppress(click.exceptions.Exit):
        main.main(words, prog_name="llmcli", standalone_mode=False, terminal_width=100, max_content_width=100)
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def examples_of(command: click.Command) -> list[str]:
    """The example lines of a command's help, without continuation marks."""
    _, found, tail = (command.help or "").partition("Example:")
    joined = re.sub(r"\\\n\s*", "", tail) if found else ""
    return [line.strip() for line in joined.splitlines() if "llmcli" in line]


def reference() -> str:
    """The text of docs/commands.md."""
    parts = [f"{'#' * (1 + len(name.split()))} `{name}`\n\n```text\n{help_of(name)}\n```\n" for name, _ in commands()]
    return HEAD + "\n".join(parts)


def command_table() -> str:
    """The commands, a line each, with an example."""
    lines = ["| command | what it does | example |", "| --- | --- | --- |"]
    for name, command in commands():
        if isinstance(command, click.Group):
            continue
        first = (command.help or "").strip().splitlines()[0]
        example = (examples_of(command) or [""])[0].replace("|", "\\|")
        lines.append(f"| `{name.removeprefix('llmcli ')}` | {first} | `{example}` |")
    return "\n".join(lines)


def tree() -> str:
    """The files of the package, each with the first line of its docstring."""
    lines = ["llmcli/"]
    for room in sorted({path.parent for path in (ROOT / "llmcli").rglob("*.py")}, key=_order):
        depth = len(room.relative_to(ROOT / "llmcli").parts)
        if depth:
            lines.append(f"{'  ' * depth}{room.name}/".ljust(30) + _first_line(room / "__init__.py"))
        for path in sorted(room.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"{'  ' * (depth + 1)}{path.name}".ljust(30) + _first_line(path))
    return "```text\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def _order(room: Path) -> tuple[int, str]:
    rooms = ["", "cli", "operations", "training", "onnx", "runtime", "models", "data", "files"]
    name = room.relative_to(ROOT / "llmcli").as_posix()
    return (rooms.index(name if name != "." else ""), name)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.splitlines()[0] if text else ""


def readme(text: str) -> str:
    """README.md with its made parts put in anew."""
    for name, content in (("commands", command_table()), ("tree", tree())):
        begin, end = f"<!-- {name}: made by `make docs` -->", f"<!-- end of {name} -->"
        head, found, tail = text.partition(begin)
        if not found or end not in tail:
            raise SystemExit(f"README.md lacks the marks of its part {name!r}")
        text = f"{head}{begin}\n{content}\n{end}{tail.partition(end)[2]}"
    return text


def main() -> None:
    """Writes both files."""
    COMMANDS.write_text(reference(), "utf-8")
    README.write_text(readme(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
