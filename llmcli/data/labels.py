"""Labels: texts with one label or several, and tables without names, whose columns are told by what they hold.

Invariant: a table without names is only recognised where its rows leave one reading; where they do not, or where the
first row may be names that are not known, it is an error that says how to name the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmcli.data.examples import LabelExample
from llmcli.data.fields import Fields
from llmcli.errors import DataError

SAMPLE = 64  # rows that are looked at
_LONGEST_LABEL = 40  # characters


def from_labelled(fields: Fields) -> LabelExample:
    """A text, perhaps a second one, and its label or labels."""
    pair = fields.text("text_pair") if fields.has("text_pair") else None
    return LabelExample(fields.text("text"), fields.labels("label"), fields.where, pair)


def require_classes(counts: Mapping[str, int], where: str | None = None) -> None:
    """Raises DataError where there is but one label, since there is nothing to tell apart."""
    if len(counts) == 1:
        label = next(iter(counts))
        raise DataError(f"every one of its examples has the label {label!r:.60}; two at least are needed", where=where)


def label_columns(rows: Sequence[Sequence[str]], name: str) -> dict[str, tuple[str, ...]]:
    """Which column is the label and which the text, by number from 1. Raises DataError where it is not plain."""
    width = len(rows[0])
    if width == 1:
        raise DataError("its rows have one column; csv is cut at commas, tsv at tabs", where=f"{name}:1")
    like = [place for place in {0, width - 1} if _is_label(rows, place)]
    if len(like) == 2 and width == 2:  # both are short: numbers and single words are labels rather than texts
        words = [place for place in like if any(" " in row[place].strip() for row in rows)]
        like = [place for place in like if place not in words] if len(words) == 1 else like
    if len(like) != 1 or (width > 2 and like[0] != 0):
        raise DataError(
            "its first line has no names that are known, and its rows do not tell which column is the label; "
            f"say it: --columns text=1,label={width}",
            where=f"{name}:1",
        )
    label = like[0]
    _refuse_names(rows, label, name)
    texts = tuple(str(place + 1) for place in range(width) if place != label)
    return {"text": texts, "label": (str(label + 1),)}


def scored_columns(rows: Sequence[Sequence[str]], name: str) -> dict[str, tuple[str, ...]]:
    """Two columns of text and one of numbers, which stands first or last."""
    width = len(rows[0])
    if width == 3:
        for score, first, second in ((2, 0, 1), (0, 1, 2)):
            numbers = [_is_number(row[score]) for row in rows]
            texts = any(not _is_number(row[place]) for row in rows for place in (first, second))
            if texts and all(numbers[1:]) and (len(numbers) > 1 or numbers[0]):
                if not numbers[0]:
                    raise _names(rows[0], name, "first=1,second=2,score=3")
                return {"first": (str(first + 1),), "second": (str(second + 1),), "score": (str(score + 1),)}
    raise DataError(
        "its first line has no names that are known, and its rows are not two texts and a number; "
        "say it: --columns first=1,second=2,score=3",
        where=f"{name}:1",
    )


def _is_label(rows: Sequence[Sequence[str]], place: int) -> bool:
    """Whether a column holds labels: short, and the same ones again and again."""
    cells = [row[place].strip() for row in rows]
    if not all(cell and len(cell) <= _LONGEST_LABEL for cell in cells[1:] or cells):
        return False
    if len(cells) < 8:
        return all(" " not in cell for cell in cells)
    return len(set(cells)) <= len(cells) // 2


def _refuse_names(rows: Sequence[Sequence[str]], label: int, name: str) -> None:
    """Raises DataError where the first row looks like names: its label is none of the others'."""
    others = [row[label].strip() for row in rows[1:]]
    first = rows[0][label].strip()
    if first in others:
        return
    recurring = len(others) >= 8 and len(set(others)) <= len(others) // 4
    numeric = bool(others) and all(map(_is_number, others)) and not _is_number(first)
    if recurring or numeric:
        texts = [cell for place, cell in enumerate(rows[0]) if place != label]
        raise _names(rows[0], name, f"text={texts[-1]},label={first}")


def _names(row: Sequence[str], name: str, columns: str) -> DataError:
    shown = ", ".join(repr(cell[:30]) for cell in row[:12])
    return DataError(
        f"its first line ({shown}) looks like names, but none that are known; say which is which: --columns {columns}",
        where=f"{name}:1",
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
