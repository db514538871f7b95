"""`llmcli plot`: loss curves in the terminal, and as SVG or PNG."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from llmcli.cli.options import GroupedCommand, is_json, overwrite_option, shared_options
from llmcli.cli.streams import notice, write_json, write_out

if TYPE_CHECKING:
    from llmcli.operations.plot import Curve


@click.command(cls=GroupedCommand)
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", type=click.Path(), metavar="FILE.svg|FILE.png", help="Write an image instead.")
@click.option(
    "--x", type=click.Choice(["steps", "tokens", "seconds"]), default="steps", show_default=True, help="Axis."
)
@click.option(
    "--y",
    type=click.Choice(["auto", "loss", "bits_per_byte"]),
    default="auto",
    show_default=True,
    help="What is drawn; auto: loss for one run, bits per byte, which compare between tokenizers, for several.",
)
@overwrite_option
@shared_options
def plot(runs: tuple[str, ...], output: str | None, x: str, y: str, overwrite: bool) -> None:
    """Draw the loss curves of runs; of a sweep, of each of its trials.

    In the terminal, or with -o as an image (needs the extra [plot]).

    \b
    Example:
      llmcli plot runs/first -o loss.svg
    """
    from llmcli.files.atomic import refuse_existing
    from llmcli.operations import plot as operation

    wanted = y if y != "auto" else "loss" if len(runs) == 1 else "bits_per_byte"
    if output is not None:
        refuse_existing(output, overwrite=overwrite)
        operation.check_output(output)
    curves = operation.read_curves(runs, x, wanted)
    if output is not None:
        operation.draw(curves, output, x, wanted)
        notice(f"wrote {output}")
    if is_json():
        write_json({"x": x, "y": wanted, "output": output, "runs": curves})
    elif output is None:
        write_out(_as_text(curves, x, operation.Y_NAMES[wanted]))


def _as_text(curves: Sequence[Curve], x: str, title: str) -> str:
    """The curves for a terminal: one run's training and validation below each other, several runs' in one chart."""
    from llmcli.cli.chart import chart

    width, height = shutil.get_terminal_size((80, 24)).columns, 16
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    lines = []
    if len(curves) == 1:
        for name, points in (("training", curves[0].training), ("validation", curves[0].validation)):
            if points:
                lines += [
                    f"{curves[0].run}: {name}, {title}",
                    *chart({name: points}, width, height, utf8=utf8, x_label=x),
                ]
    else:
        series = {curve.run: curve.validation or curve.training for curve in curves}
        lines += [f"validation, {title}", *chart(series, width, height, utf8=utf8, x_label=x)]
    return "\n".join(lines) + "\n"
