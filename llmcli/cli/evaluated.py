"""What `evaluate` shows of labelled examples: the figures, a table of files, labels and their confusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmcli.cli.info import counted, table

if TYPE_CHECKING:
    from llmcli.operations.evaluate_labelled import TaskReport

_LISTED = 100  # files
_MATRIX = 12  # labels of a matrix that fits a terminal; --json has larger ones
_UNITS = {"margin": "nats", "margin_per_token": "nats/token", "loss": "nats/token", "bits_per_byte": "bits/byte"}


def task_lines(report: TaskReport) -> Iterator[str]:
    """The report as text."""
    yield from _of_files(report)
    yield from _of_classes(report.details)
    if report.other is not None:
        yield from side_by_side(report)
    else:
        width = max(map(len, report.metrics))
        for name, value in report.metrics.items():  # as --fail-under names them
            unit = _UNITS.get(name, "")
            yield f"{name:<{width}}  {value:.4f} {unit}".rstrip() + _between(report.intervals.get(name))
    cut = max(report.cut, report.other.cut if report.other else 0)
    told: dict[str, Any] = {
        "examples": f"{report.examples:,}" + (f", {cut:,} cut to fit the context" if cut else ""),
        "speed": f"{report.examples / max(report.seconds, 1e-9):,.1f} examples/s, {report.seconds:.1f} s",
        "predictions": report.predictions,
    }
    yield from table(told)


def _of_files(report: TaskReport) -> Iterator[str]:
    if len(report.files) < 2:
        return
    names = list(report.metrics)
    rows = [
        [file.file, f"{file.examples:,}", *(_shown(file.metrics.get(name)) for name in names)]
        for file in report.files[:_LISTED]
    ]
    yield from _grid([["file", "examples", *names], *rows])
    if len(report.files) > _LISTED:
        yield f"... and {counted(len(report.files) - _LISTED, 'more file')}"
    yield ""


def _of_classes(details: Mapping[str, Any]) -> Iterator[str]:
    found = details.get("per_class")
    if not found:
        return
    rows = [
        [label, f"{each['examples']:,}", *(_shown(each[name]) for name in ("precision", "recall", "f1"))]
        for label, each in found.items()
    ]
    yield from _grid([["label", "examples", "precision", "recall", "f1"], *rows])
    yield ""
    confusion = details.get("confusion")
    if confusion and len(confusion["labels"]) <= _MATRIX:
        labels = confusion["labels"]
        rows = [[label, *map(str, row)] for label, row in zip(labels, confusion["matrix"], strict=True)]
        yield from _grid([["label \\ predicted", *labels], *rows])
        yield ""


def side_by_side(report: Any) -> Iterator[str]:
    """The metrics of two models, and what of their differences can be told."""
    yield f"A  {report.model}"
    yield f"B  {report.other.model}"
    rows = []
    for name, first in report.metrics.items():
        found = report.differences.get(name)
        difference = "-" if found is None else f"{found.difference:+.4f}{_between(found.interval)}"
        p_value = "-" if found is None else f"{found.p_value:.4f}"
        rows.append([name, _shown(first), _shown(report.other.metrics.get(name)), difference, p_value])
    yield from _grid([["metric", "A", "B", "B - A", "p"], *rows])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _between(interval: tuple[float, float] | None) -> str:
    return f"  (95 %: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""


def _grid(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Cells in columns, the first one's to the left."""
    cells = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        first, *rest = row
        yield "  ".join(
            [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))]
        )
