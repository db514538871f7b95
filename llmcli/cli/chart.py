"""Curves as text: braille dots where the console is UTF-8, plain characters elsewhere. Standard library only.

Invariant: every line is at most `width` characters, and without UTF-8 every character is ASCII.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=+*%#"
_MARKS, _ASCII_MARKS = "●○■□▲△◆◇", "ox+*#@%&"
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of a braille cell


def sparkline(values: Sequence[float], width: int, *, utf8: bool = True) -> str:
    """One line: the values from left to right as heights of blocks; averaged where there are more than columns."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    columns = min(width, len(finite))
    edges = [round(index * len(finite) / columns) for index in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    blocks = _BLOCKS if utf8 else _ASCII_BLOCKS
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def chart(series: Mapping[str, Points], width: int, height: int, *, utf8: bool = True, x_label: str = "") -> list[str]:
    """Lines of text that draw the series over one pair of axes. One series is a fine curve, several have marks.

    Points that are not finite are left out; an empty list comes back when no point is left.
    """
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return []
    everything = [point for points in kept.values() for point in points]
    left, right = _span([x for x, _ in everything])
    bottom, top = _span([y for _, y in everything])
    labels = [short(top - (top - bottom) * row / (height - 1)) for row in range(height)] if height > 1 else [short(top)]
    margin = max(len(label) for label in labels)
    columns = max(width - margin - 2, 4)

    def place(x: float, y: float, across: int, down: int) -> tuple[int, int]:
        column = (x - left) / (right - left) * (across - 1)
        return round(column), round((top - y) / (top - bottom) * (down - 1))

    if len(kept) == 1 and utf8:
        rows = _braille([place(x, y, 2 * columns, 4 * height) for x, y in everything], columns, height)
    else:
        marks = _MARKS if utf8 else _ASCII_MARKS
        grid = [[" "] * columns for _ in range(height)]
        for index, points in enumerate(kept.values()):
            for column, row in _joined([place(x, y, columns, height) for x, y in points]):
                grid[row][column] = marks[index % len(marks)]
        rows = ["".join(line) for line in grid]
    bar, corner, rule = ("┤", "└", "─") if utf8 else ("|", "+", "-")
    step = max(1, (height - 1) // 4)
    lines = [
        f"{label if row % step == 0 or row == height - 1 else '':>{margin}} {bar}{line}"[:width].rstrip()
        for row, (label, line) in enumerate(zip(labels, rows, strict=True))
    ]
    lines.append((" " * (margin + 1) + corner + rule * columns)[:width])
    start, end = short(left), f"{short(right)} {x_label}".rstrip()
    lines.append((" " * (margin + 2) + start + end.rjust(columns - len(start)))[:width])
    if len(kept) > 1:
        marks = _MARKS if utf8 else _ASCII_MARKS
        lines += [f"{marks[index % len(marks)]} {name}"[:width] for index, name in enumerate(kept)]
    return lines


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest, apart even where all are equal."""
    low, high = min(values), max(values)
    pad = 0.0 if high > low else max(abs(high), 1.0) * 0.5
    return low - pad, high + pad


def _joined(dots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dots with straight lines between neighbours, so that a steep curve has no gaps."""
    drawn = list(dots[:1])
    for (x0, y0), (x1, y1) in itertools.pairwise(dots):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        drawn += [(x0 + round((x1 - x0) * i / steps), y0 + round((y1 - y0) * i / steps)) for i in range(1, steps + 1)]
    return drawn


def _braille(dots: Sequence[tuple[int, int]], columns: int, height: int) -> list[str]:
    cells = [[0] * columns for _ in range(height)]
    for x, y in _joined(dots):
        cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    return ["".join(chr(_BRAILLE + cell) if cell else " " for cell in line) for line in cells]


def short(value: float) -> str:
    """A number in few characters: 12,345,678 is 12.3M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.4g}"
