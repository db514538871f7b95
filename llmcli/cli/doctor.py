"""`llmcli doctor`: what this machine offers and what is missing."""

from __future__ import annotations

import click

from llmcli.cli.options import GroupedCommand, is_json, shared_options
from llmcli.cli.streams import write_json, write_out
from llmcli.errors import CheckError

_SIGNS = {"ok": " ", "note": "!", "missing": "x"}


@click.command(cls=GroupedCommand)
@click.option("--strict", is_flag=True, help="Exit with 3 when something needed does not work.")
@shared_options
def doctor(strict: bool) -> None:
    """Report what this machine offers and what is missing.

    A line marked ! is good to know; a line marked x is needed and does not work.

    \b
    Example:
      llmcli doctor
    """
    from llmcli.operations.doctor import examine

    findings = list(examine())
    missing = [finding.name for finding in findings if finding.level == "missing"]
    if is_json():
        write_json({"ok": not missing, "findings": findings})
    else:
        topic = ""
        for finding in findings:
            if finding.topic != topic:
                topic = finding.topic
                write_out(f"{topic}\n")
            advice = f"  ({finding.advice})" if finding.advice else ""
            write_out(f" {_SIGNS[finding.level]} {finding.name:<22} {finding.value}{advice}\n")
    if strict and missing:
        raise CheckError(f"does not work: {', '.join(missing)}")
