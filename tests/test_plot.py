"""Charts of text and images of curves."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st

from llmcli.cli.chart import chart, short, sparkline
from llmcli.errors import DataError, MissingExtraError, UsageError
from llmcli.operations.plot import draw, read_curves

POINTS = st.lists(st.tuples(st.floats(-1e12, 1e12), st.floats(allow_nan=True, allow_infinity=True)), max_size=40)


@given(
    st.dictionaries(st.sampled_from("abc"), POINTS, max_size=3), st.integers(12, 120), st.integers(1, 20), st.booleans()
)
def test_a_chart_keeps_to_its_width_and_to_ascii(
    series: dict[str, list[tuple[float, float]]], width: int, height: int, utf8: bool
) -> None:
    lines = chart(series, width, height, utf8=utf8, x_label="steps")
    assert all(len(line) <= width for line in lines)
    assert utf8 or all(line.isascii() for line in lines)
    drawn = any(math.isfinite(y) for points in series.values() for _, y in points)
    assert bool(lines) == drawn


@given(st.lists(st.floats(), max_size=50), st.integers(0, 30), st.booleans())
def test_a_sparkline_keeps_to_its_width(values: list[float], width: int, utf8: bool) -> None:
    line = sparkline(values, width, utf8=utf8)
    assert len(line) <= width
    assert utf8 or line.isascii()


def test_a_falling_curve_falls() -> None:
    assert sparkline([3, 2, 1], 3) == "█▅▁"
    lines = chart({"a": [(0, 2.0), (10, 1.0)]}, 20, 3, utf8=False, x_label="steps")
    assert lines == [
        "  2 |oooo",
        "1.5 |    ooooooo",
        "  1 |           oooo",
        "    +---------------",
        "     0      10 steps",
    ]


def test_numbers_are_short() -> None:
    assert [short(value) for value in (0.5, 1234, 12345, 12_345_678, 3e9)] == ["0.5", "1234", "12.3k", "12.3M", "3G"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text("max_steps = 3\n")
    records = [
        {"event": "step", "step": 1, "tokens": 64, "loss": 3.0, "elapsed_seconds": 0.5},
        {"event": "step", "step": 2, "tokens": 128, "loss": None, "elapsed_seconds": 1.0},
        {"event": "step", "step": 3, "tokens": 192, "loss": 2.0, "elapsed_seconds": 1.5},
        {"event": "validation", "step": 3, "tokens": 192, "loss": 2.1, "bits_per_byte": 1.4, "elapsed_seconds": 1.6},
        {"event": "end", "step": 3},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_curves_are_the_recorded_points(run: Path) -> None:
    (curve,) = read_curves([run])
    assert curve.training == ((1, 3.0), (3, 2.0))
    assert curve.validation == ((3, 2.1),)
    (curve,) = read_curves([run], "seconds", "bits_per_byte")
    assert (curve.training, curve.validation) == ((), ((1.6, 1.4),))


def test_a_run_without_metrics_is_an_error(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="yet"):
        read_curves([run])
    with pytest.raises(DataError, match="no such file"):
        read_curves([tmp_path / "nowhere"])


def test_images_are_written_and_equal_curves_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = read_curves([run, run])
    draw(curves, tmp_path / "a.svg")
    draw(curves, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert "first, validation" in (tmp_path / "a.svg").read_text()
    draw(curves, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        draw(curves, tmp_path / "a.pdf")


def test_without_matplotlib_the_extra_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llmcli\[plot\]'"):
        draw(read_curves([run]), tmp_path / "a.svg")


def test_the_command_draws_in_the_terminal_writes_and_refuses(llmcli: Run, run: Path, tmp_path: Path) -> None:
    plain = llmcli("plot", run, environment={"COLUMNS": "60"})
    assert plain.returncode == 0
    assert max(map(len, plain.stdout.splitlines())) <= 60 or "first" in plain.stdout.splitlines()[0]
    ascii_only = llmcli("plot", run, run, environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert ascii_only.stdout.isascii()
    assert ascii_only.returncode == 0
    found = json.loads(llmcli("plot", run, "--json").stdout)
    assert found["runs"][0]["training"] == [[1, 3.0], [3, 2.0]]
    written = llmcli("plot", run, "-o", tmp_path / "a.svg")
    assert (written.returncode, written.stdout) == (0, "")
    assert llmcli("plot", run, "-o", tmp_path / "a.svg").returncode == 2
    assert llmcli("plot", run, "-o", tmp_path / "a.svg", "--overwrite").returncode == 0
