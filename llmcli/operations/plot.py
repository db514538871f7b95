"""`plot`: the loss curves of runs, read from their metrics, as points and as an image.

Invariant: points are the recorded ones; nothing is smoothed or left out but what is not a finite number.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmcli.errors import DataError, MissingExtraError, UsageError
from llmcli.files import artefacts
from llmcli.files.atomic import write_file

X_KEYS = {"steps": "step", "tokens": "tokens", "seconds": "elapsed_seconds"}
Y_NAMES = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}
FORMATS = (".svg", ".png")


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """The curves of one run: (x, y) of its training steps and of its validations."""

    run: str
    training: tuple[tuple[float, float], ...]
    validation: tuple[tuple[float, float], ...]


def read_curves(runs: Sequence[str | Path], x: str = "steps", y: str = "loss") -> list[Curve]:
    """Reads the curves of runs, of a sweep those of its trials; `x` is a key of X_KEYS, `y` of Y_NAMES.

    Raises DataError when a run has none yet.
    """
    curves = []
    found: list[str | Path] = []
    for run in runs:
        if artefacts.kind_of(run) != "run":
            raise DataError("is not a run", where=str(run))
        found += artefacts.trials_of(Path(run)) or [run]
    for run in found:
        points: dict[str, list[tuple[float, float]]] = {"step": [], "validation": []}
        for record in artefacts.read_metrics(Path(run)):
            along, value = record.get(X_KEYS[x]), record.get(y)
            if record.get("event") in points and _is_finite(along) and _is_finite(value):
                points[record["event"]].append((along, value))  # type: ignore[arg-type]
        if not points["step"] and not points["validation"]:
            raise DataError(f"has no {Y_NAMES[y]} in its {artefacts.METRICS} yet", where=str(run))
        curves.append(Curve(str(run), tuple(points["step"]), tuple(points["validation"])))
    return curves


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_output(path: str | Path) -> None:
    """Raises UsageError for a file name of another kind than FORMATS, MissingExtraError when nothing can draw it."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UsageError(f"must end in {' or '.join(FORMATS)}", where=str(path))
    figure_class()


def draw(curves: Sequence[Curve], path: str | Path, x: str = "steps", y: str = "loss") -> None:
    """Writes the curves as SVG or PNG, by the path's ending; equal curves give equal bytes."""

    def fill(axes: Any) -> None:
        for index, curve in enumerate(curves):
            name = Path(curve.run).resolve().name
            if curve.training:
                axes.plot(*zip(*curve.training, strict=True), color=f"C{index}", alpha=0.4, linewidth=0.8)
                axes.plot([], [], color=f"C{index}", alpha=0.4, label=f"{name}, training")
            if curve.validation:
                axes.plot(
                    *zip(*curve.validation, strict=True), color=f"C{index}", marker=".", label=f"{name}, validation"
                )
        axes.set_xlabel(x)
        axes.set_ylabel(Y_NAMES[y])

    _drawn(fill, path)


def draw_rates(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], at: float, path: Path
) -> None:
    """Writes the loss against the learning rate, with a line at the rate that is suggested."""

    def fill(axes: Any) -> None:
        axes.plot(rates, losses, color="C0", alpha=0.4, linewidth=0.8, label="loss")
        axes.plot(rates, smoothed, color="C0", label="smoothed")
        axes.axvline(at, color="C1", label=f"steepest at {at:.1e}")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss (nats)")

    _drawn(fill, path)


def _drawn(fill: Callable[[Any], None], path: str | Path) -> None:
    check_output(path)
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "llmcli", "svg.fonttype": "none", "font.size": 10}):
        figure = figure_class()(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        fill(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        image = io.BytesIO()
        kind = Path(path).suffix.lower()[1:]
        figure.savefig(image, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    write_file(path, image.getvalue())


def figure_class() -> Any:
    """matplotlib's Figure without pyplot, which would look for a screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing an image") from error
    return Figure
