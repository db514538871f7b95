"""`bench`: the keys that scripts rely on, what is measured, and what is said where int8 may be slow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Run
from forked import completed
from small_model import make_model, make_seven

from llmcli.cli.main import main
from llmcli.config import BenchConfig
from llmcli.errors import ConfigError, DataError, UsageError
from llmcli.operations import bench as operation
from llmcli.operations import doctor
from llmcli.operations.bench import BenchReport, bench

QUICK = ("--prompt-tokens", "5", "--new-tokens", "3", "--rounds", "2", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, of seven tokens and a context of 32."""
    place = tmp_path_factory.mktemp("bench")
    return make_model(place / "model", make_seven(place / "tokenizer"))


@pytest.fixture(scope="module")
def int8(model: Path) -> Path:
    """Its graph in int8."""
    place = model.parent / "int8"
    ended: Any = completed("export", model, "-o", place, "--precision", "int8", "--no-check")
    assert ended.returncode == 0, ended.stderr
    return place


@pytest.fixture(autouse=True)
def little_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "_COPIED", 1 << 16)


def reports(*models: Path, **values: Any) -> list[BenchReport]:
    config = BenchConfig(**{"prompt_tokens": 5, "new_tokens": 3, "rounds": 2, "threads": 1, **values})
    return [record for record in bench(models, config) if isinstance(record, BenchReport)]


def test_json_has_the_documented_keys(llmcli: Run, model: Path, int8: Path) -> None:
    found = llmcli("bench", "-m", model, "-m", int8, "--batch-size", 1, "--batch-size", 2, *QUICK, "--json")
    assert (found.returncode, found.stderr) == (0, "")
    told = [json.loads(line) for line in found.stdout.splitlines()]
    assert [item["model"] for item in told] == [str(model), str(int8)]
    for item in told:
        assert [(run["test"], run["tokens"], run["batch"]) for run in item["runs"]] == [
            ("prefill", 5, 1),
            ("decode", 3, 1),
            ("prefill", 5, 2),
            ("decode", 3, 2),
        ]
        for run in item["runs"]:
            assert set(run) == {"test", "tokens", "batch", "tokens_per_second", "spread"}
            assert run["tokens_per_second"] > 0
            assert run["spread"] >= 0
        assert item["first_token_seconds"] > item["load_seconds"] > 0
        assert item["weight_bytes"] > 0
        assert item["bandwidth"] == pytest.approx(item["runs"][1]["tokens_per_second"] * item["weight_bytes"], rel=0.01)
    # Of the matrices in float32 and in a byte each.
    assert told[1]["weight_bytes"] < told[0]["weight_bytes"] / 2
    documented = (Path(__file__).parent.parent / "docs" / "files.md").read_text("utf-8")
    for key in (*told[0], *told[0]["runs"][0]):
        assert f"`{key}`" in documented, key


def test_the_table_has_a_line_for_each_measurement(model: Path) -> None:
    found = CliRunner().invoke(main, ["bench", "-m", str(model), *QUICK], catch_exceptions=False)
    lines = found.stdout.splitlines()
    assert lines[0].split() == ["model", "test", "tokens", "batch", "tokens/s", "spread"]
    assert [line.split()[:4] for line in lines[1:3]] == [
        [str(model), "prefill", "5", "1"],
        [str(model), "decode", "3", "1"],
    ]
    assert "first token after" in lines[4]
    assert "of a copy's bandwidth" in lines[4]


def test_every_round_but_the_first_is_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one makes ready; of the others comes the median, and the spread as a share of it."""
    seconds = iter([(100.0, 100.0), (0.5, 1.0), (1.0, 2.0), (2.0, 4.0)])
    monkeypatch.setattr(operation, "_seconds", lambda *_: next(seconds))
    (report,) = reports(model, rounds=3, batch_size=(2,))
    prefill, decode = report.runs
    assert (prefill.tokens_per_second, prefill.spread) == (10.0, 1.5)  # 20, 10 and 5 tokens a second
    assert (decode.tokens_per_second, decode.spread) == (3.0, 1.5)
    assert report.bandwidth is None  # one row was not measured


def test_tokens_that_do_not_fit_the_context_are_told_before_a_round(model: Path) -> None:
    with pytest.raises(UsageError, match=r"30 and 3 tokens do not fit the model's context of 32; .*--prompt-tokens"):
        reports(model, prompt_tokens=30)
    assert len(reports(model, prompt_tokens=29)) == 1


def test_what_is_no_model_is_told_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    records = bench([model, tmp_path / "nowhere"], BenchConfig(threads=1))
    with pytest.raises(DataError, match="no such file or folder"):
        next(records)
    with pytest.raises(ConfigError, match="batch_size"):
        reports(model, batch_size=(1, 0))


@pytest.mark.parametrize(
    ("flags", "told"), [("sse2 avx2", True), ("avx2 avx512_vnni", False), ("avx_vnni", False), ("", False)]
)
def test_int8_on_a_processor_without_its_products_comes_with_a_note(
    model: Path, int8: Path, monkeypatch: pytest.MonkeyPatch, flags: str, told: bool
) -> None:
    monkeypatch.setattr(doctor, "_cpuinfo", lambda: {"flags": flags})
    words = ["bench", "-m", str(model), "-m", str(int8), *QUICK]
    found = CliRunner().invoke(main, words, catch_exceptions=False)
    notes = [line for line in found.stderr.splitlines() if "VNNI" in line]
    assert len(notes) == told
    assert all(line.startswith(f"{int8}: this processor has no int8 dot products") for line in notes)
    assert "VNNI" not in found.stdout


def test_a_folder_needs_no_tokenizer(model: Path, tmp_path: Path) -> None:
    """Speeds are of drawn ids."""
    shutil.copytree(model, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.unlink()
    assert reports(tmp_path / "bare")[0].runs[0].tokens_per_second > 0
