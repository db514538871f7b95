"""The confusion matrix of an evaluation as an image.

Invariant: equal matrices give equal bytes; each cell shows its count, its colour the share of its row.
"""

from __future__ import annotations

import io
from pathlib import Path

from llmcli.errors import DataError
from llmcli.files.atomic import write_file
from llmcli.operations.evaluate_labelled import TaskReport
from llmcli.operations.plot import check_output as check_output
from llmcli.operations.plot import figure_class

_MOST = 40  # labels that still can be read


def draw(report: TaskReport, path: str | Path) -> None:
    """Writes the matrix as SVG or PNG, by the path's ending. Raises DataError where there is none, or one too large."""
    found = report.details.get("confusion")
    if found is None:
        raise DataError("texts have several labels or none, so there is no confusion matrix to draw", where=str(path))
    labels, matrix = found["labels"], found["matrix"]
    if len(labels) > _MOST:
        raise DataError(f"{len(labels)} labels cannot be drawn, {_MOST} at most; --json has them all", where=str(path))
    import matplotlib

    side = 2.5 + 0.5 * len(labels)
    with matplotlib.rc_context({"svg.hashsalt": "llmcli", "svg.fonttype": "none", "font.size": 10}):
        figure = figure_class()(figsize=(side + 0.5, side), layout="constrained")
        axes = figure.subplots()
        shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, counts in enumerate(matrix):
            for column, count in enumerate(counts):
                colour = "white" if shares[row][column] > 0.5 else "black"
                axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour)
        names = [label if len(label) <= 20 else f"{label[:19]}…" for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=90)
        axes.set_yticks(range(len(labels)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
        image = io.BytesIO()
        kind = Path(path).suffix.lower()[1:]
        figure.savefig(image, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    write_file(path, image.getvalue())
