"""`llmcli info`: any artefact in a readable table."""

from __future__ import annotations

from typing import Any

import click

from llmcli.cli.options import GroupedCommand, is_json, shared_options
from llmcli.cli.streams import write_json, write_out


@click.command(cls=GroupedCommand)
@click.argument("path", type=click.Path())
@shared_options
def info(path: str) -> None:
    """Describe a tokenizer, corpus, index, run or model.

    Reads small files and headers only: weights are not loaded, so it is instant for a model of any size.

    \b
    Example:
      llmcli info runs/first/model
    """
    from llmcli.operations.inspect import describe

    found = describe(path)
    if is_json():
        write_json({"path": found.path, "kind": found.kind, **found.facts})
    else:
        write_out("\n".join(table({"kind": found.kind, **found.facts})) + "\n")


def table(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Facts as aligned lines; what is nested stands indented below its name, what is not known is left out."""
    shown = {key: value for key, value in facts.items() if value is not None and value not in ({}, [], "")}
    width = max((len(_label(key)) for key in shown), default=0)
    lines = []
    for key, value in shown.items():
        if isinstance(value, dict):
            lines += [f"{indent}{_label(key)}", *table(value, indent + "  ")]
        else:
            lines.append(f"{indent}{_label(key):<{width}}  {_shown(key, value)}")
    return lines


def _label(key: str) -> str:
    if "." in key:  # a file's name
        return key
    return key.removesuffix("_bytes").replace("_", " ") if key.endswith("_bytes") else key.replace("_", " ")


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_shown("", item) for item in value)
    if isinstance(value, int) and key.endswith("_bytes"):
        return size(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        unit = " s" if key.endswith("_seconds") else ""
        return f"{value:.6g}{unit}"
    return str(value)


def counted(count: int, thing: str) -> str:
    """How many there are of a thing: 1 document, 2,000 documents."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def size(count: float) -> str:
    """Bytes with their unit."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
