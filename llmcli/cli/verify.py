"""`llmcli verify`: whether an artefact is whole and its parts agree."""

from __future__ import annotations

import click

from llmcli.cli.options import GroupedCommand, is_json, shared_options
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.errors import CheckError


@click.command(cls=GroupedCommand)
@click.argument("path", type=click.Path())
@click.option("--strict", is_flag=True, help="Also read every weight or vector: NaN and infinities are problems.")
@shared_options
def verify(path: str, strict: bool) -> None:
    """Check that an artefact is whole and consistent.

    Checksums of manifests, headers and shapes of weights, tokenizer against embedding, corpus ids against the
    vocabulary, texts of an index against their places, each checkpoint of a run. Problems are listed on stdout and the
    exit code is 3.

    \b
    Example:
      llmcli verify runs/first
    """
    from llmcli.operations.verify import verify as check

    verdict = check(path, values=strict)
    if is_json():
        write_json({"path": path, "kind": verdict.kind, "ok": verdict.ok, "problems": verdict.problems})
    else:
        for problem in verdict.problems:
            write_out(problem + "\n")
    kind = "ONNX folder" if verdict.kind == "onnx" else verdict.kind
    if not verdict.ok:
        count = len(verdict.problems)
        raise CheckError(f"{count} problem{'s' if count > 1 else ''} in this {kind}", where=path)
    notice(f"{path}: this {kind} is whole")
