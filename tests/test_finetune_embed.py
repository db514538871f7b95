"""Vectors of texts: losses by their formulae, what a run learns and leaves, stopped runs, bad data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import fingerprint
from small_tuning import go, make_base, make_encoder, tiny, until_step

from llmcli.config import EmbedTuneConfig, EvaluateConfig, LabelledConfig, LoraConfig
from llmcli.data.examples import ScoredPairExample, TripletExample
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import ConfigError, DataError
from llmcli.models.encoder_folder import load_encoder
from llmcli.models.pooling import read_pooling
from llmcli.operations.evaluate import evaluate
from llmcli.operations.finetune import plan_finetuning
from llmcli.operations.task_embed import EmbedTask, nearest_share
from llmcli.training.embedding_losses import cosent_loss, ranking_losses, same_text

pytestmark = pytest.mark.usefixtures("one_thread")
STSB = Path(__file__).resolve().parents[2] / "shared" / "data" / "stsb" / "stsb-en-test.csv"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here cuts the power, so nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _handle: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoders") / "bert")


def scored(path: Path, count: int = 40) -> Path:
    """Pairs whose score is the share of words that both have."""
    words = ["good", "bad", "sea", "red", "blue", "thing"]
    lines = ["sentence1,sentence2,score"]
    for number in range(count):
        first = [words[(number + at) % 6] for at in range(4)]
        second = [words[(number + at * (number % 4 + 1)) % 6] for at in range(4)]
        lines.append(f"{' '.join(first)} {number},{' '.join(second)},{len({*first} & {*second})}")
    path.write_text("\n".join(lines) + "\n")
    return path


def triplets(path: Path, *, negatives: bool = True) -> Path:
    rows = []
    for number in range(40):
        word, other = ("red", "blue") if number % 2 else ("good", "bad")
        row = {"anchor": f"the {word} {number}", "positive": f"{word} thing {number * 7}"}
        rows.append(row | ({"negative": f"{other} thing {number}"} if negatives and number % 3 else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


# ----------------------------------------------------------------------------------------------------------------
# Losses


def test_cosent_is_its_formula() -> None:
    drawn = torch.Generator().manual_seed(0)
    first, second = (torch.randn(7, 5, generator=drawn, dtype=torch.float64) for _ in range(2))
    scores = [1.0, 4.0, 4.0, 0.0, 2.5, 5.0, 0.0]
    cosines = (unit(first) * unit(second)).sum(1).tolist()
    total = 1.0
    for i in range(7):
        for j in range(7):
            if scores[i] < scores[j]:
                total += float(np.exp(20 * (cosines[i] - cosines[j])))
    assert float(cosent_loss(first, second, torch.tensor(scores))) == pytest.approx(np.log(total), rel=1e-9)


def test_ranking_is_its_formula_and_counts_no_text_against_itself() -> None:
    drawn = torch.Generator().manual_seed(1)
    anchors = torch.randn(3, 5, generator=drawn, dtype=torch.float64)
    candidates = torch.randn(5, 5, generator=drawn, dtype=torch.float64)
    numbers = torch.tensor([[10, 20], [11, 21], [12, 22]])
    others = torch.tensor([20, 21, 22, 30, 31])
    none = same_text(numbers[:, 0], numbers[:, 1], others)
    assert not none.any()
    cosines = 20 * unit(anchors) @ unit(candidates).T
    expected = [float(cosines[row].logsumexp(0) - cosines[row, row]) for row in range(3)]
    assert ranking_losses(anchors, candidates, none).tolist() == pytest.approx(expected)
    # The third anchor is the first one again; the second one's positive stands among the negatives; and its own text.
    ours = same_text(torch.tensor([10, 11, 10]), numbers[:, 1], torch.tensor([20, 21, 22, 21, 11]))
    assert ours.int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 0]]
    left = cosines[1, [0, 1, 2]]
    assert float(ranking_losses(anchors, candidates, ours)[1]) == pytest.approx(float(left.logsumexp(0) - left[1]))


def test_an_anchor_whose_own_text_is_the_nearest_is_right() -> None:
    anchors = torch.eye(3)
    candidates = torch.tensor([[1.0, 0.1, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert nearest_share(anchors, candidates, nothing) == pytest.approx(2 / 3)
    nothing[1, 3] = True
    assert nearest_share(anchors, candidates, nothing) == 1.0


def test_the_loss_is_of_pooled_states_and_of_their_first_dimensions(base: Path) -> None:
    tokenizer, model = load_tokenizer(base), load_encoder(base)

    def vector(text: str) -> torch.Tensor:
        return model.hidden(torch.tensor([tokenizer.encode(text, special=True)]))[0].mean(0)

    texts = [("the sea", "blue"), ("red thing", "good thing"), ("bad", "poor sea")]
    pairs = [ScoredPairExample(*both, float(score), "f:1") for score, both in enumerate(texts)]
    task = EmbedTask(EmbedTuneConfig(dimensions="16,4:0.5"))
    rows = list(task.encoded(pairs, tokenizer))
    task.settle(rows, [])
    packed, targets = task.batch(rows)
    with torch.no_grad():
        first, second = (torch.stack([vector(both[side]) for both in texts]) for side in (0, 1))
        expected = cosent_loss(first, second, targets) + 0.5 * cosent_loss(first[:, :4], second[:, :4], targets)
        found = task.loss(model, packed, targets, torch.tensor(1 / 3))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)

    triple = [
        TripletExample(*both, negative, "f:1") for both, negative in zip(texts, ("poor", None, "sea"), strict=True)
    ]
    task = EmbedTask()
    rows = list(task.encoded(triple, tokenizer))
    task.settle(rows, [])
    packed, targets = task.batch(rows)
    with torch.no_grad():
        candidates = torch.stack([vector(text) for text in ("blue", "good thing", "poor sea", "poor", "sea")])
        cosines = 20 * unit(first) @ unit(candidates).T
        expected = torch.nn.functional.cross_entropy(cosines, torch.arange(3))
        found = task.loss(model, packed, targets, torch.tensor(1 / 3))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------
# Runs


def last(events: list[Any]) -> tuple[dict[str, float], dict[str, float]]:
    figures = [dict(event.figures or {}) for event in events if event.event == "validation"]
    return figures[0], figures[-1]


def test_scores_are_learnt_and_the_result_is_a_sentence_transformers_folder(tmp_path: Path, base: Path) -> None:
    data = scored(tmp_path / "scores.csv")
    own = (LoraConfig(), LabelledConfig(), EmbedTuneConfig(dimensions="16,8", pooling="max"))
    config = tiny(max_steps=30, batch_size=8, eval_every=1, save_every=30, val_split=0.4)
    before, after = last(go("embed", base, data, tmp_path / "run", *own, config=config))
    assert after["spearman"] > before["spearman"]
    assert set(after) == {"spearman", "pearson", "spearman_8", "pearson_8"}
    assert read_pooling(tmp_path / "run" / "model").mode == "max"  # type: ignore[union-attr]
    assert load_encoder(tmp_path / "run" / "model").body.pooler is not None


@pytest.mark.parametrize("negatives", [False, True])
def test_pairs_and_triplets_are_ranked(tmp_path: Path, base: Path, negatives: bool) -> None:
    data = triplets(tmp_path / "t.jsonl", negatives=negatives)
    config = tiny(max_steps=30, batch_size=8, eval_every=1, save_every=30, val_split=0.4)
    before, after = last(go("embed", base, data, tmp_path / "run", config=config))
    assert set(after) == {"accuracy"}
    assert after["accuracy"] >= before["accuracy"]


def test_a_decoder_learns_vectors_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for name, lora in (("whole", LoraConfig()), ("adapter", LoraConfig(lora=True, lora_rank=2))):
        events = go("embed", base, scored(tmp_path / "s.csv"), tmp_path / name, lora, config=tiny(max_steps=4))
        assert any(event.figures and "spearman" in event.figures for event in events)
        assert read_pooling(tmp_path / name / "model").mode == "mean"  # type: ignore[union-attr]
    *_, report = evaluate(tmp_path / "whole", [str(tmp_path / "s.csv")], EvaluateConfig(task="embed", threads=1))
    assert set(report.metrics) == {"spearman", "pearson"}  # type: ignore[union-attr]


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, base: Path) -> None:
    data = scored(tmp_path / "s.csv")
    go("embed", base, data, tmp_path / "straight")
    until_step(5, "embed", base, data, tmp_path / "broken")
    go("embed", base, data, tmp_path / "broken", resume="auto")
    assert fingerprint(tmp_path / "broken") == fingerprint(tmp_path / "straight")


def test_data_and_settings_that_do_not_fit_are_refused(tmp_path: Path, base: Path) -> None:
    def plan(data: Path, **settings: Any) -> None:
        plan_finetuning("embed", base, str(data), tiny(), own=EmbedTuneConfig(**settings))

    data = scored(tmp_path / "s.csv")
    for dimensions in ("0", "a", "8,8", "8:x"):
        with pytest.raises(ConfigError, match="dimensions"):
            plan(data, dimensions=dimensions)
    with pytest.raises(ConfigError, match="17 is more than the model's 16"):
        plan(data, dimensions="17")
    same = tmp_path / "same.csv"
    same.write_text("sentence1,sentence2,score\na,b,1\nc,d,1\n")
    with pytest.raises(DataError, match="the same score"):
        plan(same)
    task, tokenizer = EmbedTask(), load_tokenizer(base)
    mixed = [ScoredPairExample("a", "b", 1.0, "f:1"), TripletExample("a", "b", None, "f:2")]
    with pytest.raises(DataError, match="f:2: the first example has a score, this one has none"):
        task.settle(list(task.encoded(mixed, tokenizer)), [])
    (row,) = task.encoded([TripletExample("the sea is blue", "a", None, "f:1")], tokenizer)
    cut = task.cut(row, 4)
    assert cut is not None
    assert [tokenizer.token(int(number)) for number in cut.ids[:4]] == ["[CLS]", "the", "sea", "[SEP]"]


@pytest.mark.slow
def test_the_real_encoder_has_its_published_figure() -> None:
    from small_encoder import real_encoder

    if not STSB.is_file():
        pytest.skip("there are no shared data")
    *_, report = evaluate(real_encoder(), [str(STSB)], EvaluateConfig(task="embed"))
    assert report.metrics["spearman"] == pytest.approx(0.8629, abs=1e-4)  # type: ignore[union-attr]
