"""Fine-tuning encoders: labels and spans, read by transformers too; stopped runs; what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_run import fingerprint
from small_tuning import go, make_encoder, questions, reviews, tiny, until_step

from llmcli.cli.answer import answer as command
from llmcli.config import AnswerConfig, AnswerTuneConfig, EvaluateConfig, ExportConfig, LabelledConfig, LoraConfig
from llmcli.data.framed import fitted
from llmcli.data.span_windows import best_span, best_threshold, place_of, span_windows
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import ConfigError, DataError, UsageError
from llmcli.files.artefacts import read_json
from llmcli.operations.answer import answer
from llmcli.operations.answer_span import SpanAnswerer
from llmcli.operations.classify import classify
from llmcli.operations.evaluate import evaluate
from llmcli.operations.evaluate_labelled import TaskReport
from llmcli.operations.export import export
from llmcli.operations.finetune import plan_finetuning

pytestmark = pytest.mark.usefixtures("one_thread")

COLOUR = "which colour is the sea"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here cuts the power, so nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _handle: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture(scope="module")
def spans(base: Path) -> Path:
    """A run that learnt to tell the sea's colour."""
    data = questions(base.with_name("questions.json"), 40)
    config = tiny(max_steps=80, batch_size=8, eval_every=40, save_every=80, val_split=0.3)
    go("answer", base, data, base.with_name("spans"), config=config)
    return base.with_name("spans")


# ----------------------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_labels_are_learnt_and_transformers_reads_the_encoder(tmp_path: Path, family: str) -> None:
    base = make_encoder(tmp_path / family, family, hidden_dropout=0.0, attention_dropout=0.0)
    data = reviews(tmp_path / "reviews.tsv")
    rate = 0.004 if family == "distilbert" else 0.01  # its head begins with a ReLU, which a long step kills
    config = tiny(max_steps=60, batch_size=8, eval_every=60, save_every=60, learning_rate=rate, decay_fraction=0.0)
    last = [each for each in go("classify", base, data, tmp_path / "run", config=config) if each.event == "validation"]
    assert last[-1].figures is not None
    assert last[-1].figures["accuracy"] == 1.0
    texts = ["a good thing, number 7", "a bad thing", ("a poor thing", "and more")]
    found = list(classify(tmp_path / "run", texts))
    assert [record.label for record in found[:2]] == ["pos", "neg"]
    assert found[2].text == "a poor thing\nand more"

    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    assert theirs.config.id2label == {0: "neg", 1: "pos"}
    tokenizer = load_tokenizer(tmp_path / "run")
    for text, record in zip(texts, found, strict=True):
        framed = tokenizer.encode_framed(*([text] if isinstance(text, str) else text))
        types = {} if family == "distilbert" else {"token_type_ids": torch.tensor([framed.types])}
        with torch.no_grad():
            scores = theirs(torch.tensor([framed.ids]), **types).logits.softmax(-1)[0]
        assert record.probability == pytest.approx(float(scores.max()), abs=1e-4)
    *_, report = evaluate(tmp_path / "run", [str(data)], EvaluateConfig(task="classify", threads=1))
    assert isinstance(report, TaskReport)
    assert report.metrics["accuracy"] > 0.9


def test_of_a_pair_the_longer_text_is_cut_and_the_frame_stays(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    framed = tokenizer.encode_framed("the sea is blue the sea", "good thing")
    short = fitted(framed, 8)
    assert short is not None
    words = [tokenizer.token(number) for number in short.ids]
    assert words == ["[CLS]", "the", "sea", "is", "[SEP]", "good", "thing", "[SEP]"]
    assert short.types == [0, 0, 0, 0, 0, 1, 1, 1]
    assert fitted(framed, 3) is None
    assert fitted(framed, len(framed.ids)) == framed


# ----------------------------------------------------------------------------------------------------------------
# Spans


def test_windows_hold_every_token_of_the_text_and_the_whole_question(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    text = " ".join(f"the sea is {word}" for word in ("red", "blue", "fine", "good", "bad", "poor")) + "   blue "
    whole = tokenizer.encode_in_detail(text)
    asked = tokenizer.encode(COLOUR)
    windows = span_windows(tokenizer, COLOUR, text, longest=18, shared=3)
    seen: list[tuple[int, int]] = []
    for window in windows:
        assert len(window.ids) <= 18
        assert window.ids[1 : window.first - 1].tolist() == asked
        piece = window.ids[window.first : window.first + len(window.offsets)].tolist()
        begin = whole.offsets.index(tuple(window.offsets[0].tolist()))
        assert piece == whole.ids[begin : begin + len(piece)]
        assert not seen or begin == len(seen) - 3
        seen = whole.offsets[: begin + len(piece)]
    assert seen == whole.offsets
    with pytest.raises(DataError, match=r"f:1: the question takes 8 tokens"):
        span_windows(tokenizer, COLOUR, text, longest=12, shared=3, where="f:1")


def test_the_best_span_is_the_best_of_all_pairs(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    text = "the sea is blue and the thing is red and good"
    (window,) = span_windows(tokenizer, COLOUR, text, longest=64, shared=0)
    drawn = np.random.default_rng(0)
    for longest in (1, 3, 40):
        starts, ends = drawn.normal(size=(2, len(window.ids)))
        found = best_span(window, starts, ends, longest, text)
        places = range(window.first, window.first + len(window.offsets))
        score, i, j = max((starts[i] + ends[j], i, j) for i in places for j in places if i <= j < i + longest)
        assert found.score == pytest.approx(score)
        assert place_of(window, found.begin, found.end) == (i, j)
        assert found.null == pytest.approx(starts[0] + ends[0])
    assert place_of(window, 11, 15) == (window.first + 3, window.first + 3)  # blue
    assert place_of(window, 12, 14) == (window.first + 3, window.first + 3)  # a part of a token stands for all of it


def test_the_threshold_gives_the_best_mean() -> None:
    drawn = np.random.default_rng(1)
    for _ in range(20):
        doubts, said, silent = drawn.normal(size=12).round(1), drawn.random(12).round(1), drawn.integers(0, 2, 12)
        at = best_threshold(doubts, said, silent.astype(float))
        tried = [np.where(doubts <= each, said, silent).mean() for each in (-9.0, *doubts.tolist())]
        assert np.where(doubts <= at, said, silent).mean() == pytest.approx(max(tried))


def texts_of(run: Path) -> list[str]:
    """The texts that it was trained on."""
    paragraphs = json.loads(run.with_name("questions.json").read_text())["data"][0]["paragraphs"]
    return [paragraph["context"] for paragraph in paragraphs]


def test_spans_are_learnt_and_are_transformers(spans: Path) -> None:
    values = read_json(spans / "model" / "config.json")
    assert isinstance(values["no_answer_threshold"], float)
    silent, text = texts_of(spans)[:2]
    found = answer(spans, text, COLOUR, AnswerConfig(threads=1))
    colour, begin = text[:-1].split()[-1], text.rindex(" ") + 1
    assert (found.answer, found.start, found.end) == (colour, begin, len(text) - 1)
    assert answer(spans, silent, COLOUR, AnswerConfig(threads=1)).answer is None
    assert answer(spans, text, COLOUR, AnswerConfig(threads=1, no_answer_threshold=-1000.0)).answer is None

    from transformers import AutoModelForQuestionAnswering

    theirs = AutoModelForQuestionAnswering.from_pretrained(spans / "model").eval()
    framed = load_tokenizer(spans).encode_framed(COLOUR, text)
    place = [framed.offsets[at] if framed.texts[at] == 1 else None for at in range(len(framed.ids))].index(
        (begin, len(text) - 1)
    )
    with torch.no_grad():
        scores = theirs(torch.tensor([framed.ids]), token_type_ids=torch.tensor([framed.types]))
    seen = [0, *(at for at, text in enumerate(framed.texts) if text == 1)]
    share = [float(each[0][seen].softmax(0)[seen.index(place)]) for each in (scores.start_logits, scores.end_logits)]
    assert found.probability == pytest.approx(share[0] * share[1], abs=1e-4)


def test_the_loss_of_spans_is_transformers(spans: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    from llmcli.data.examples import AnswerExample
    from llmcli.models.encoder_folder import load_encoder
    from llmcli.operations.task_span import SpanTask

    task, tokenizer = SpanTask(AnswerTuneConfig(doc_stride=4)), load_tokenizer(spans)
    task.longest(24)
    text = "the thing 7 is red. the sea is blue. the thing is fine."
    examples = [AnswerExample("1", text, COLOUR, (("blue", 31),), "f:1"), AnswerExample("2", text, COLOUR, (), "f:2")]
    rows = list(task.encoded(examples, tokenizer))
    assert {row.wanted for row in rows} > {(0, 0)}
    packed, targets = task.batch(rows)
    theirs = AutoModelForQuestionAnswering.from_pretrained(spans / "model").eval()
    model = load_encoder(spans / "model", kind="span")
    expected = 0.0
    with torch.no_grad():
        found = float(task.loss(model, packed, targets, torch.tensor(1.0)))
        for row in rows:
            begin, end = (torch.tensor([place]) for place in row.wanted)
            types = torch.from_numpy(row.window.types.astype("int64"))[None]  # type: ignore[attr-defined]
            ids = torch.from_numpy(row.ids.astype("int64"))[None]
            expected += float(theirs(ids, token_type_ids=types, start_positions=begin, end_positions=end).loss)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_long_text_is_read_in_windows_and_an_evaluation_agrees(spans: Path, tmp_path: Path) -> None:
    long = "the thing 5 is red. " * 8 + "the sea is blue. " + "the thing 6 is fine. " * 8
    config = AnswerConfig(threads=1)
    found = answer(spans, long, COLOUR, config)
    assert found.windows > 2
    from llmcli.files.artefacts import find_model

    answerer = SpanAnswerer(find_model(spans), config)
    alone = [answer(spans, text, COLOUR, config) for text in (long, "the sea is red. the thing is blue.")]
    together = list(answerer.answers([(long, COLOUR, None), ("the sea is red. the thing is blue.", COLOUR, None)]))
    for one, other in zip(alone, together, strict=True):
        assert (one.answer, one.start, one.windows) == (other.answer, other.start, other.windows)
        assert one.probability == pytest.approx(other.probability, abs=1e-5)
    *_, report = evaluate(spans, [str(spans.with_name("questions.json"))], EvaluateConfig(task="answer", threads=1))
    assert isinstance(report, TaskReport)
    assert report.metrics["f1"] > 0.9
    assert set(report.metrics) >= {"has_answer_f1", "no_answer_f1"}


def test_an_exported_encoder_answers_as_the_model_does(spans: Path, tmp_path: Path) -> None:
    list(export(spans, tmp_path / "graph", ExportConfig(precision="fp32", threads=1)))
    for text in (*texts_of(spans)[:3], "the thing 5 is red. " * 8 + "the sea is blue. "):
        mine = answer(tmp_path / "graph", text, COLOUR, AnswerConfig(threads=1))
        other = answer(spans, text, COLOUR, AnswerConfig(threads=1))
        assert (mine.answer, mine.start, mine.end, mine.windows) == (
            other.answer,
            other.start,
            other.end,
            other.windows,
        )
        assert mine.probability == pytest.approx(other.probability, abs=1e-4)
    data = [str(spans.with_name("questions.json"))]
    config = EvaluateConfig(task="answer", threads=1)
    first, second = ([*evaluate(model, data, config)][-1] for model in (spans, tmp_path / "graph"))
    assert isinstance(first, TaskReport)
    assert isinstance(second, TaskReport)
    assert first.metrics == second.metrics


def test_the_command_gives_the_place_or_says_no_answer(spans: Path, tmp_path: Path) -> None:
    text = texts_of(spans)[1]
    (tmp_path / "text.txt").write_text(text)
    words = ["-m", str(spans), "--context", str(tmp_path / "text.txt"), "--threads", "1", COLOUR]
    shown = json.loads(CliRunner().invoke(command, [*words, "--json"]).stdout)
    assert (shown["answer"], shown["start"]) == (text[shown["start"] : shown["end"]], text.rindex(" ") + 1)
    assert CliRunner().invoke(command, [*words, "--no-answer-threshold", "-1000"]).stdout == "no answer\n"


# ----------------------------------------------------------------------------------------------------------------
# Stopped and gone on with; what is refused


@pytest.mark.parametrize("task", ["classify", "answer"])
def test_a_stopped_run_of_an_encoder_goes_on_bit_for_bit(tmp_path: Path, base: Path, task: str) -> None:
    data = reviews(tmp_path / "r.tsv") if task == "classify" else questions(tmp_path / "q.json")
    go(task, base, data, tmp_path / "straight")
    until_step(5, task, base, data, tmp_path / "broken")
    go(task, base, data, tmp_path / "broken", resume="auto")
    assert fingerprint(tmp_path / "broken") == fingerprint(tmp_path / "straight")
    said = [read_json(tmp_path / name / "model" / "config.json") for name in ("broken", "straight")]
    assert said[0] == said[1]


def test_windows_of_a_question_are_held_out_together(tmp_path: Path, base: Path) -> None:
    from llmcli.operations.finetune_data import TuningData, read_data
    from llmcli.operations.task_span import SpanTask, WindowRow

    data = questions(tmp_path / "q.json", 12)
    task = SpanTask(AnswerTuneConfig(doc_stride=4))
    *_, found = read_data([str(data)], task, load_tokenizer(base), 20, tiny(val_split=0.4), LabelledConfig())
    assert isinstance(found, TuningData)
    asked: list[set[str]] = [
        {row.example.id for row in rows if isinstance(row, WindowRow)} for rows in (found.train, found.validation)
    ]
    assert asked[0] | asked[1] == {str(number) for number in range(12)}
    assert not asked[0] & asked[1]
    assert len(found.train) + len(found.validation) > 12


def test_what_an_encoder_cannot_do_is_refused(tmp_path: Path, base: Path, spans: Path) -> None:
    labels = reviews(tmp_path / "r.tsv")
    for task in ("chat", "summarize", "prefer"):
        with pytest.raises(UsageError, match="is an encoder, which writes no text; it learns to classify, answer"):
            plan_finetuning(task, base, labels, tiny())
    with pytest.raises(ConfigError, match="adapters go on decoders"):
        plan_finetuning("classify", base, labels, tiny(), LoraConfig(lora=True))
    with pytest.raises(DataError, match="has no sequence-classification head"):
        list(classify(base, ["a"]))
    with pytest.raises(DataError, match="has no question-answering head"):
        answer(base, "the sea", COLOUR, AnswerConfig(threads=1))
    config: Any = EvaluateConfig(task="choice", threads=1)
    (tmp_path / "c.jsonl").write_text(json.dumps({"sentence_good": "a", "sentence_bad": "b"}) + "\n")
    with pytest.raises(DataError, match="is an encoder, which gives texts no probability"):
        list(evaluate(base, [str(tmp_path / "c.jsonl")], config))
