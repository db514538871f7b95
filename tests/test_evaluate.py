"""`evaluate`: the figures against a plain computation, whatever the windows; limits, files, intervals, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from small_model import make_model
from small_tokenizer import make_tokenizer

from llmcli.config import EvaluateConfig, TextConfig
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import ConfigError, DataError, LlmcliError
from llmcli.models.folder import load_model
from llmcli.operations.evaluate import EvaluateReport, evaluate

TEXT = "The list type is a mutable sequence. It holds objects of any type.\n" * 12
CONTEXT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("evaluate")
    return make_model(place / "model", make_tokenizer(place / "tokenizer"), context=CONTEXT)


def run(model: Path, *paths: Path, text: TextConfig = TextConfig(), **settings: object) -> EvaluateReport:  # noqa: B008
    config = EvaluateConfig(threads=1, **settings)  # type: ignore[arg-type]
    *_, report = evaluate(model, [str(path) for path in paths], config, text)
    assert isinstance(report, EvaluateReport)
    return report


def plain_nats(model: Path, text: str, stride: int) -> tuple[float, int]:
    """Each token scored by itself, from as many tokens before it as its window has."""
    decoder, tokenizer = load_model(model), load_tokenizer(model)
    assert tokenizer.eos_id is not None
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    nats = 0.0
    for place in range(1, len(ids)):
        if place <= CONTEXT:
            begin = 0
        else:
            end = CONTEXT + 1 + ((place - CONTEXT - 1) // stride + 1) * stride  # of the window that scores it
            begin = min(end, len(ids)) - CONTEXT - 1
        with torch.no_grad():
            logits = decoder(torch.tensor([ids[begin:place]]))[0, -1].double()
        nats -= float(torch.log_softmax(logits, -1)[ids[place]])
    return nats, len(ids) - 1


@pytest.mark.parametrize("stride", [None, 1, 7, CONTEXT])
def test_figures_are_those_of_scoring_each_token_by_itself(model: Path, tmp_path: Path, stride: int | None) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    report = run(model, tmp_path / "a.txt", stride=stride)
    nats, tokens = plain_nats(model, TEXT, stride or CONTEXT // 2)
    assert (report.tokens, report.bytes, report.documents) == (tokens, len(TEXT), 1)
    assert report.metrics["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert report.metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert report.metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-5)


def test_documents_are_scored_apart_and_their_order_changes_nothing(model: Path, tmp_path: Path) -> None:
    lines = [f"{word} is one of the {count} words." for count, word in enumerate(("Alpha", "Beta", "Gamma", "Delta"))]
    for name, order in (("a.txt", lines), ("b.txt", lines[::-1])):
        (tmp_path / name).write_text("\n".join(order))
    first, second = (run(model, tmp_path / name, text=TextConfig(split_on="line")) for name in ("a.txt", "b.txt"))
    assert first.documents == 4
    assert first.metrics["loss"] == pytest.approx(second.metrics["loss"], rel=1e-6)
    expected = sum(plain_nats(model, line, CONTEXT // 2)[0] for line in lines)
    assert first.metrics["loss"] * first.tokens == pytest.approx(expected, rel=1e-5)


def test_a_document_in_pieces_is_scored_as_a_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    whole = run(model, tmp_path / "a.txt", stride=1)
    monkeypatch.setattr("llmcli.data.readers.PIECE", 100)
    monkeypatch.setattr("llmcli.operations.evaluate._POOL", 30)
    pieces = run(model, tmp_path / "a.txt", stride=1)
    assert (pieces.tokens, pieces.documents) == (whole.tokens, 1)
    assert pieces.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)


def test_the_size_of_a_batch_changes_nothing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    losses = {size: run(model, tmp_path / "a.txt", batch_size=size).metrics["loss"] for size in (None, 1, 3)}
    assert losses[1] == pytest.approx(losses[None], rel=1e-6)
    assert losses[3] == pytest.approx(losses[None], rel=1e-6)


def test_a_limit_is_of_each_file_and_counts_its_bytes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("Größe: 3 µm. " * 20, "utf-8")
    report = run(model, tmp_path / "a.txt", tmp_path / "b.txt", limit=10)
    assert [file.tokens for file in report.files] == [10, 10]
    tokenizer = load_tokenizer(model)
    for file, text in zip(report.files, (TEXT, "Größe: 3 µm. " * 20), strict=True):
        decoded = tokenizer.decode(tokenizer.encode(text)[:10])
        assert abs(file.bytes - len(decoded.replace("\ufffd", "").encode())) <= 2  # a character may be cut in two
    assert report.tokens == 20


def test_files_make_up_the_total(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("A tuple is immutable. " * 9)
    report = run(model, tmp_path / "a.txt", tmp_path / "b.txt")
    nats = sum(file.loss * file.tokens for file in report.files)
    assert report.metrics["loss"] == pytest.approx(nats / report.tokens, rel=1e-9)
    assert report.bytes == sum(file.bytes for file in report.files)


def test_intervals_hold_the_figure_and_come_again(model: Path, tmp_path: Path) -> None:
    words = np.random.default_rng(0).choice(["list", "tuple", "of", "the", "object", "in"], 600)
    (tmp_path / "a.txt").write_text(" ".join(words))
    first, second = run(model, tmp_path / "a.txt"), run(model, tmp_path / "a.txt")
    assert first.intervals == second.intervals
    for name, value in first.metrics.items():
        interval = first.intervals[name]
        assert interval is not None
        assert interval[0] < value < interval[1]
    assert run(model, tmp_path / "a.txt", seed=1).intervals != first.intervals
    (tmp_path / "short.txt").write_text("the list")
    assert run(model, tmp_path / "short.txt").intervals["loss"] is None


def test_equal_probabilities_give_the_vocabularys_size_as_perplexity(tmp_path: Path) -> None:
    place = make_model(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"), context=CONTEXT, scale=0.0)
    (tmp_path / "a.txt").write_text(TEXT)
    vocabulary = load_tokenizer(place).vocab_size
    assert run(place, tmp_path / "a.txt").metrics["perplexity"] == pytest.approx(vocabulary, rel=1e-5)


def test_bad_input_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(ConfigError, match="at most the context, 24; is 25"):
        run(model, tmp_path / "a.txt", stride=CONTEXT + 1)
    with pytest.raises(DataError, match="no such file"):
        run(model, tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="is empty"):
        run(model, tmp_path / "empty.txt")
    with pytest.raises(DataError):
        run(tmp_path / "a.txt", tmp_path / "a.txt")


def test_weights_that_are_not_numbers_are_an_error(tmp_path: Path) -> None:
    place = make_model(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"), scale=math.nan)
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(LlmcliError, match="not finite"):
        run(place, tmp_path / "a.txt")


def test_the_command_shows_a_table_or_json(llmcli: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[:100])
    shown = llmcli("evaluate", model, "a.txt", "b.txt", "--threads", 1, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "bits/byte  (95 %:" in shown.stdout
    assert "2 documents" in shown.stdout
    found = json.loads(llmcli("evaluate", model, "-", "--threads", 1, "--json", input=TEXT).stdout)
    assert set(found["metrics"]) == set(found["intervals"]) == {"loss", "bits_per_byte", "perplexity"}
    assert found["task"] == "lm"
    wrong = llmcli("evaluate", model, "nothing.txt", "--json", cwd=tmp_path)
    assert wrong.returncode == 2
    assert json.loads(wrong.stderr)["error"]["kind"] == "data"
