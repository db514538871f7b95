"""What `data check --task` shows of labelled data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmcli.cli.display import progress
from llmcli.cli.info import counted
from llmcli.cli.options import is_json
from llmcli.cli.streams import write_json, write_out
from llmcli.config import LabelledConfig

if TYPE_CHECKING:
    from llmcli.operations.check_labelled import LabelledReport

_LISTED = 20  # files, and labels of a part; --json has them all
_PREVIEW = 2000  # characters of the rendered conversation; --json has it whole
_BEGIN, _END = "[[", "]]"  # around what is trained on: a pipe and a log have no colours


def show_labelled(files: Sequence[str], task: str, config: LabelledConfig, **details: Any) -> int:
    """Checks, shows the report, and gives the exit code."""
    from llmcli.operations.check_labelled import LabelledReport, check_labelled

    report: Any = None
    with progress("Checking") as show:
        for record in check_labelled(files, task, config, **details):
            report = record
            if not isinstance(record, LabelledReport):
                show(record)
    if is_json():
        write_json({"ok": report.ok, **vars(report)})
    else:
        write_out("\n".join(_lines(report)) + "\n")
    return 0 if report.ok else 3


def _lines(report: LabelledReport) -> Iterator[str]:
    for file in report.files[:_LISTED]:
        used = ", ".join(f"column {name}" if not file.header else name for name in file.fields)
        names = "" if file.header else ", no line of names"
        yield f"{file.name}: {file.layout} ({used}{names}), {file.part}, {counted(file.examples, 'example')}"
    if len(report.files) > _LISTED:
        yield f"... and {len(report.files) - _LISTED:,} more files"
    for name, lengths in report.lengths.items():
        yield (f"{name}: {lengths.shortest:,} to {lengths.longest:,} {report.unit}, median about {lengths.median:,}")
    if report.context is not None:
        yield f"context: {report.context:,} tokens; {counted(report.over_context, 'example')} longer"
    for part, counts in report.labels.items():
        total = sum(counts.values())
        shown = [f"{label} {count:,} ({count / total:.0%})" for label, count in list(counts.items())[:_LISTED]]
        more = f", and {len(counts) - _LISTED:,} more" if len(counts) > _LISTED else ""
        yield f"labels of {part}: {', '.join(shown)}{more}"
    shared = "".join(f"; {part} shares {count:,} with training" for part, count in report.overlap.items())
    yield f"duplicates: {report.duplicates:,}{shared}"
    if report.rendered is not None:
        yield from _preview(report)
    yield from (f"{place.where}: {place.what}" for place in report.places)
    yield from (f"warning: {warning}" for warning in report.warnings)
    yield from (f"problem: {problem}" for problem in report.problems)
    more_problems = report.problem_count - len(report.problems)
    if more_problems:
        yield f"problem: {more_problems:,} more"


def _preview(report: LabelledReport) -> Iterator[str]:
    """The first conversation with marks around what is trained on."""
    assert report.rendered is not None
    parts, place = [], 0
    for begin, end in report.rendered.spans:
        parts += [report.rendered.text[place:begin], _BEGIN, report.rendered.text[begin:end], _END]
        place = end
    text = "".join([*parts, report.rendered.text[place:]])
    yield f"the first one, by {report.template}; {_BEGIN}trained on{_END}:"
    yield from ("  " + line for line in text[:_PREVIEW].splitlines())
    if len(text) > _PREVIEW:
        yield f"  ... and {len(text) - _PREVIEW:,} more characters"
