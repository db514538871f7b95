"""`evaluate --task`: scores against plain computations, two models, predictions, thresholds, bad data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, Run
from scipy.stats import pearsonr, spearmanr
from small_model import make_model
from small_tokenizer import make_tokenizer
from small_tuning import go, make_base, tiny
from small_tuning import reviews as reviews_to_learn

from llmcli.cli.evaluate import evaluate as command
from llmcli.config import EvaluateConfig, ExportConfig, GenerateConfig, SamplingConfig, TextConfig
from llmcli.data.chatml import END, with_chatml
from llmcli.data.task_prompts import answer_prompt
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import CheckError, ConfigError, DataError, UsageError
from llmcli.models.folder import load_model
from llmcli.operations.classify import classify
from llmcli.operations.evaluate import EvaluateReport, Fitting, evaluate, second_model
from llmcli.operations.evaluate_labelled import TaskReport
from llmcli.operations.evaluate_model import EvaluatedModel
from llmcli.operations.export import export
from llmcli.operations.generate import Generated, open_generator

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 64
CHOICES: list[dict[str, Any]] = [
    {"query": "The list type is", "choices": ["a mutable sequence.", "a class", "of any type"], "gold": 0},
    {"query": "Objects of", "choices": ["two", "a function and of a module, each with a name of its own"], "gold": 1},
    {"query": "An exception", "choices": ["is raised", "is an argument"], "gold": 1},
]
PAIRS = [
    ("The lists are long.", "The lists is long."),
    ("She sees it.", "She see it."),
    ("He is here.", "He are here."),
]
TURNS = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one tokenizer."""
    place = tmp_path_factory.mktemp("tasks")
    tokenizer = make_tokenizer(place / "tokenizer")
    return (
        make_model(place / "one", tokenizer, context=CONTEXT),
        make_model(place / "two", tokenizer, context=CONTEXT, seed=1),
    )


@pytest.fixture
def model(models: tuple[Path, Path]) -> Path:
    return models[0]


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def minimal_pairs(path: Path, pairs: Sequence[tuple[str, str]] = PAIRS) -> Path:
    return lines(path, [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs])


def run(model: Path, *paths: Path, task: str, more: dict[str, Any] | None = None, **settings: Any) -> TaskReport:
    config = EvaluateConfig(task=task, threads=1, **settings)
    *_, report = evaluate(model, [str(path) for path in paths], config, **(more or {}))
    assert isinstance(report, TaskReport)
    return report


def predicted(model: Path, *paths: Path, task: str, **settings: Any) -> list[dict[str, Any]]:
    place = paths[0].parent / "predictions.jsonl"
    run(model, *paths, task=task, more={"predictions": place, "overwrite": True}, **settings)
    return [json.loads(line) for line in place.read_text().splitlines()]


def plain(model: Path, ids: Sequence[int], begin: int) -> float:
    """The log-probability of ids from number `begin` on; each is given all that precede it and fit the context."""
    decoder, total = load_model(model), 0.0
    for place in range(begin, len(ids)):
        with torch.no_grad():
            logits = decoder(torch.tensor([ids[max(0, place - CONTEXT) : place]]))[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[ids[place]])
    return total


# ----------------------------------------------------------------------------------------------------------------
# Choices


def test_each_end_is_scored_given_its_prompt(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    found = predicted(model, lines(tmp_path / "a.jsonl", CHOICES), task="choice")
    accuracy = []
    for row, record in zip(CHOICES, found, strict=True):
        before = [tokenizer.eos_id, *tokenizer.encode(row["query"])]
        ends = [tokenizer.encode(f"{row['query']} {end}")[len(before) - 1 :] for end in row["choices"]]
        expected = [plain(model, [*before, *end], len(before)) for end in ends]
        assert record["log_probabilities"] == pytest.approx(expected, rel=1e-4)
        assert record["predicted"] == expected.index(max(expected))
        by_byte = [value / len(end) for value, end in zip(expected, row["choices"], strict=True)]
        assert record["predicted_norm"] == by_byte.index(max(by_byte))
        assert record["where"] == f"{tmp_path / 'a.jsonl'}:{len(accuracy) + 1}"
        accuracy.append(record["predicted"] == row["gold"])
    report = run(model, tmp_path / "a.jsonl", task="choice")
    assert report.metrics["accuracy"] == pytest.approx(sum(accuracy) / 3)
    assert any(record["predicted"] != record["predicted_norm"] for record in found)


def test_an_end_that_runs_into_its_prompt_is_scored_from_where_the_first_one_leaves_it(model: Path) -> None:
    opened = EvaluatedModel(model, EvaluateConfig())
    encode = opened.tokenizer.encode
    before, ends = encode("The l"), ["ist", " of", "."]
    assert encode("The list")[: len(before)] != before
    ids, begin = opened.ends("The l", ends)
    assert ids == [[*opened.begin, *encode("The l" + end)] for end in ends]
    assert begin == 1 + len(before) - 1
    assert opened.ends("The l", ends[1:])[1] == 1 + len(before)
    assert opened.ends("", ends)[1] == 1


def test_minimal_pairs_are_scored_whole_and_beyond_the_context_too(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    pairs = [*PAIRS, ("The list type is a mutable sequence. " * 14, "The list type are a mutable sequence. " * 14)]
    found = predicted(model, minimal_pairs(tmp_path / "a.jsonl", pairs), task="choice")
    for pair, record in zip(PAIRS, found[:3], strict=True):
        expected = [plain(model, [tokenizer.eos_id, *tokenizer.encode(text)], 1) for text in pair]
        assert record["log_probabilities"] == pytest.approx(expected, rel=1e-4)
    assert len(tokenizer.encode(pairs[3][0])) > 2 * CONTEXT
    # Windows overlap, so a token has a different past than in `plain`; of so many they come close.
    expected = [plain(model, [tokenizer.eos_id, *tokenizer.encode(text)], 1) for text in pairs[3]]
    assert found[3]["log_probabilities"] == pytest.approx(expected, rel=0.1)


def test_the_size_of_a_batch_changes_nothing(model: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", CHOICES)
    first, second = (predicted(model, path, task="choice", batch_size=size) for size in (1, None))
    for one, other in zip(first, second, strict=True):
        assert one["log_probabilities"] == pytest.approx(other["log_probabilities"], rel=1e-5)


def test_a_model_that_finds_all_equal_has_the_accuracy_of_guessing(tmp_path: Path) -> None:
    place = make_model(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"), context=CONTEXT, scale=0.0)
    pairs = [("a b", "b a"), ("c d e", "d c e")]
    report = run(place, minimal_pairs(tmp_path / "a.jsonl", pairs), task="choice")
    assert report.metrics == {"accuracy": 0.5, "accuracy_norm": 0.5}


def test_files_have_their_own_figures_and_the_limit_is_of_each(model: Path, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    for name in ("one", "other"):
        minimal_pairs(tmp_path / "sets" / f"{name}.jsonl")
    report = run(model, tmp_path / "sets", task="choice", limit=2)
    assert [(Path(file.file).name, file.examples) for file in report.files] == [("one.jsonl", 2), ("other.jsonl", 2)]
    assert report.examples == 4
    assert report.metrics["accuracy"] == report.files[0].metrics["accuracy"] == report.files[1].metrics["accuracy"]


def test_of_a_folder_with_parts_the_test_part_is_measured(model: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("train", "dev", "test"):
        minimal_pairs(tmp_path / "set" / f"{name}.jsonl")
    assert [Path(file.file).name for file in run(model, tmp_path / "set", task="choice").files] == ["test.jsonl"]
    assert run(model, tmp_path / "set" / "train.jsonl", task="choice").examples == 3


def test_a_graph_in_int8_is_measured_and_in_float_has_the_models_figures(model: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", CHOICES)
    expected = predicted(model, path, task="choice")
    for precision, near in (("fp32", 1e-4), ("int8", 0.05)):
        folder = tmp_path / precision
        list(export(model, folder, ExportConfig(precision=precision, check=False, threads=1)))
        for one, other in zip(predicted(folder, path, task="choice"), expected, strict=True):
            assert one["log_probabilities"] == pytest.approx(other["log_probabilities"], rel=near)


@pytest.mark.parametrize("task", ["answer", "summarize", "prefer"])
def test_every_task_is_measured_on_a_graph_as_on_its_model(model: Path, tmp_path: Path, task: str) -> None:
    rows = {
        "answer": [{"id": "q", "context": "A list holds objects.", "question": "What?", "answers": ["objects"]}],
        "summarize": [{"source": "A list holds objects. " * 9, "target": "A list."}],
        "prefer": PREFERENCES,
    }
    path = lines(tmp_path / "a.jsonl", rows[task])
    list(export(model, tmp_path / "fp32", ExportConfig(precision="fp32", check=False, threads=1)))
    found = [predicted(place, path, task=task, max_new_tokens=4) for place in (model, tmp_path / "fp32")]
    for one, other in zip(*found, strict=True):
        for name, value in one.items():
            if name != "model":
                assert other[name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name


# ----------------------------------------------------------------------------------------------------------------
# Labels


REVIEWS = [("good film", "1"), ("bad film", "0"), ("not so long", "0"), ("a list of words", "1")]


def reviews(path: Path) -> Path:
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in REVIEWS))
    return path


def test_a_decoder_is_asked_which_labels_name_goes_on_best(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    names = {"0": "bad", "1": "good"}
    path = reviews(tmp_path / "a.tsv")
    found = predicted(model, path, task="classify", label_names="0=bad,1=good")
    for (text, label), record in zip(REVIEWS, found, strict=True):
        before = [tokenizer.eos_id, *tokenizer.encode(f"{text}\n\nlabel:")]
        scores = {
            key: plain(model, [*before, *tokenizer.encode(f" {name}")], len(before)) for key, name in names.items()
        }
        best = max(scores, key=lambda key: scores[key])
        assert (record["labels"], record["predicted"]) == ([label], [best])
        share = torch.softmax(torch.tensor(list(scores.values())), 0).max()
        assert record["probability"] == pytest.approx(float(share), abs=1e-4)
    report = run(model, path, task="classify", label_names="0=bad,1=good")
    right = [record["labels"] == record["predicted"] for record in found]
    assert report.metrics["accuracy"] == sum(right) / 4
    assert sum(map(sum, report.details["confusion"]["matrix"])) == 4
    assert set(report.details["per_class"]) == {"0", "1"}


def test_a_text_that_does_not_fit_loses_its_end_and_is_counted(model: Path, tmp_path: Path) -> None:
    rows = [{"text": "The list type is a mutable sequence. " * 9, "label": "a"}, {"text": "short", "label": "b"}]
    assert run(model, lines(tmp_path / "a.jsonl", rows), task="classify").cut == 1


def test_a_classifier_is_measured_by_its_own_labels(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    data = reviews_to_learn(tmp_path / "learn.tsv")
    go("classify", base, data, tmp_path / "run", config=tiny(max_steps=16, learning_rate=0.02))
    rows = [line.split("\t") for line in data.read_text().splitlines()[1:]]
    expected = list(classify(tmp_path / "run", [text for text, _ in rows]))
    found = predicted(tmp_path / "run", data, task="classify")
    assert [record["predicted"] for record in found] == [[each.label] for each in expected]
    assert [record["probability"] for record in found] == pytest.approx(
        [each.probability for each in expected], abs=1e-5
    )
    right = [each.label == label for each, (_, label) in zip(expected, rows, strict=True)]
    report = run(tmp_path / "run", data, task="classify", more={"other": base})
    assert report.metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert report.metrics["accuracy"] > 0.8
    assert report.other is not None
    assert report.other.metrics["accuracy"] < report.metrics["accuracy"]
    unseen = lines(tmp_path / "b.jsonl", [{"text": "a thing", "label": "neg"}, {"text": "a thing", "label": "neutral"}])
    with pytest.raises(DataError, match=r"b\.jsonl:2: the label 'neutral' is none of the model's: 'neg', 'pos'"):
        run(tmp_path / "run", unseen, task="classify")


@pytest.mark.parametrize(
    ("names", "message"),
    [("0=bad", "label '1' has no text"), ("0=bad,1=good,2=so", "'2' is no label"), ("good", "LABEL=TEXT")],
)
def test_names_that_do_not_fit_the_labels_are_refused(model: Path, tmp_path: Path, names: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(model, reviews(tmp_path / "a.tsv"), task="classify", label_names=names)


def test_the_confusion_matrix_is_drawn(model: Path, tmp_path: Path) -> None:
    path = reviews(tmp_path / "a.tsv")
    words = [str(model), str(path), "--task", "classify", "--threads", "1", "--plot"]
    for name in ("a.svg", "b.svg"):
        shown = CliRunner().invoke(command, [*words, str(tmp_path / name)])
        assert shown.exit_code == 0, shown.output
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ">predicted<" in (tmp_path / "a.svg").read_text()
    assert "label \\ predicted  0  1" in shown.output
    for wrong in (["--plot", str(tmp_path / "a.svg")], ["--plot", str(tmp_path / "a.txt")]):
        assert isinstance(CliRunner().invoke(command, [*words[:-1], *wrong]).exception, UsageError)


# ----------------------------------------------------------------------------------------------------------------
# Texts that are written


def test_answers_are_what_the_model_writes_after_the_prompt(model: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "q1", "context": "A list holds objects.", "question": "What?", "answers": ["objects", "A list"]},
        {"id": "q2", "context": "A list.", "question": "Who?", "answers": []},
        {"id": "q3", "context": "The list type is a sequence. " * 9, "question": "What?", "answers": ["sequence"]},
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    found = predicted(model, path, task="answer", max_new_tokens=4)
    assert [record["id"] for record in found] == ["q1", "q2", "q3"]
    settings = GenerateConfig(max_new_tokens=4, stop=("\n",), seed=0)
    asked = answer_prompt("A list holds objects.", "What?")
    (written,) = [
        record.text
        for record in open_generator(model, threads=1).generate([asked], settings, SamplingConfig(temperature=0.0))
        if isinstance(record, Generated)
    ]
    assert found[0]["predicted"] == written.strip()
    report = run(model, path, task="answer", max_new_tokens=4)
    assert report.cut == 1
    assert set(report.metrics) >= {"exact_match", "f1", "has_answer_f1", "no_answer_exact_match"}
    assert report.metrics["no_answer_f1"] == float(not found[1]["predicted"])
    tight = [{"context": "A list.", "question": "What " * 60, "answers": []}]
    with pytest.raises(DataError, match=r"b\.jsonl:1: has .* tokens without the text that could be cut"):
        run(model, lines(tmp_path / "b.jsonl", tight), task="answer")


def test_summaries_are_scored_against_the_best_of_their_targets(model: Path, tmp_path: Path) -> None:
    rows = [{"source": ["A list holds", "objects."], "target": ["nothing"]}]
    path = lines(tmp_path / "a.jsonl", rows)
    (first,) = predicted(model, path, task="summarize", max_new_tokens=6)
    said = "word" if not first["predicted"] else first["predicted"]
    lines(path, [{**rows[0], "target": ["nothing", said]}])
    (second,) = predicted(model, path, task="summarize", max_new_tokens=6)
    assert second["predicted"] == first["predicted"]
    assert second["rouge1"] >= first["rouge1"]
    assert set(run(model, path, task="summarize").metrics) == {"rouge1", "rouge2", "rougeL"}


# ----------------------------------------------------------------------------------------------------------------
# Preferences


PREFERENCES = [
    {"prompt": "What is it?", "chosen": "A list.", "rejected": "Nothing at all of any type."},
    {"prompt": "Which type?", "chosen": "Any", "rejected": "the same"},
]


def test_the_answers_tokens_are_scored_as_a_transcript_without_a_template(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    found = predicted(model, lines(tmp_path / "a.jsonl", PREFERENCES), task="prefer")
    margins = []
    for row, record in zip(PREFERENCES, found, strict=True):
        before = [tokenizer.eos_id]
        for piece in ("\n\nHuman:", f" {row['prompt']}", "\n\nAssistant:"):
            before += tokenizer.encode(piece)
        for side in ("chosen", "rejected"):
            said = tokenizer.encode(f" {row[side]}")
            assert record[f"{side}_tokens"] == len(said)
            assert record[f"{side}_log_probability"] == pytest.approx(
                plain(model, [*before, *said], len(before)), rel=1e-4
            )
        margins.append(record["chosen_log_probability"] - record["rejected_log_probability"])
    report = run(model, tmp_path / "a.jsonl", task="prefer")
    assert report.metrics["margin"] == pytest.approx(sum(margins) / 2, rel=1e-4)
    assert report.metrics["accuracy"] == sum(margin > 0 for margin in margins) / 2


def test_a_template_of_the_model_is_used_and_its_end_token_scored(tmp_path: Path) -> None:
    place = make_model(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"), context=64)
    (place / "chat_template.jinja").write_text(TURNS)
    tokenizer = load_tokenizer(place)
    record = predicted(place, lines(tmp_path / "a.jsonl", PREFERENCES), task="prefer")[1]
    text = f"<user>{PREFERENCES[1]['prompt']}<|endoftext|><assistant>"
    before = tokenizer.encode(text, parse_special=True)
    said = tokenizer.encode("Any<|endoftext|>", parse_special=True)
    assert record["chosen_tokens"] == len(said)
    assert record["chosen_log_probability"] == pytest.approx(plain(place, [*before, *said], len(before)), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------
# Conversations


def spoken(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]}


def test_what_the_assistant_says_is_scored_turn_by_turn(tmp_path: Path) -> None:
    place = make_model(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"), context=CONTEXT)
    (place / "chat_template.jinja").write_text(TURNS)
    tokenizer = load_tokenizer(place)
    talks = lines(tmp_path / "a.jsonl", [spoken("What?", "A list.", "Which type?", "Any type."), spoken("Who?", "He.")])
    ids: list[int] = []
    total, tokens = 0.0, 0
    for text, said in (
        ("<user>What?<|endoftext|><assistant>", False),
        ("A list.<|endoftext|>", True),
        ("<user>Which type?<|endoftext|><assistant>", False),
        ("Any type.<|endoftext|>", True),
    ):
        piece = tokenizer.encode(text, parse_special=True)
        if said:
            total += plain(place, [*ids, *piece], len(ids))
            tokens += len(piece)
        ids += piece
    first, second = predicted(place, talks, task="chat")
    assert first["log_probability"] == pytest.approx(total, rel=1e-4)
    assert first["tokens"] == tokens
    assert first["bytes"] == len("A list.Any type.")
    report = run(place, talks, task="chat")
    nats = -first["log_probability"] - second["log_probability"]
    count, size = first["tokens"] + second["tokens"], first["bytes"] + second["bytes"]
    assert report.metrics == pytest.approx(
        {"loss": nats / count, "perplexity": math.exp(nats / count), "bits_per_byte": nats / size / math.log(2)}
    )
    assert report.details == {"tokens": count, "bytes": size}


def test_chats_are_scored_as_fine_tuning_validates_them(tmp_path: Path) -> None:
    """The loss that `finetune chat` reports last is that of `evaluate --task chat` on the same file."""
    talks = [spoken(f"Say {word}.", f"It is {word}, a list.") for word in ("this", "that", "one", "two")]
    train = lines(tmp_path / "train.jsonl", talks)
    held = lines(tmp_path / "held.jsonl", [spoken("Say three.", "It is three."), spoken("Say it.", "An object.")])
    config = tiny(validation=str(held))
    events = go("chat", make_base(tmp_path / "base"), train, tmp_path / "run", config=config)
    best = next(event for event in reversed(events) if event.event == "validation" and event.best)
    found = run(tmp_path / "run", held, task="chat").metrics
    assert found["loss"] == pytest.approx(best.loss, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(best.bits_per_byte, rel=1e-4)


def test_completions_and_a_model_without_template_are_scored(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    (record,) = predicted(
        model, lines(tmp_path / "a.jsonl", [{"prompt": "The list", "completion": " is"}]), task="chat"
    )
    before, said = tokenizer.encode("The list"), [*tokenizer.encode(" is"), tokenizer.eos_id]
    assert record["log_probability"] == pytest.approx(plain(model, [*before, *said], len(before)), rel=1e-4)
    (record,) = predicted(model, lines(tmp_path / "b.jsonl", [spoken("What?", "A list.")]), task="chat")
    assert record["tokens"] == len(tokenizer.encode(" A list."))
    long = "a list of any type " * CONTEXT
    report = run(model, lines(tmp_path / "c.jsonl", [spoken("What?", long)]), task="chat")  # in windows
    assert report.details["bytes"] == len(" " + long)


def test_conversations_are_not_taken_for_text(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds conversations \(messages\); measure with --task chat"):
        list(evaluate(model, [str(lines(tmp_path / "a.jsonl", [spoken("What?", "A list.")]))]))
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        run(model, lines(tmp_path / "a.jsonl", [spoken("What?")]), task="chat")


@pytest.mark.parametrize("field", ["text", "body", "completion"])
def test_a_field_that_is_named_is_read_as_text_beside_a_conversation(model: Path, tmp_path: Path, field: str) -> None:
    row = {"prompt": "What?", "completion": " A list.", "body": "Any type.", "text": "An object of a class."}
    path = lines(tmp_path / "a.jsonl", [row])
    config = EvaluateConfig(threads=1)
    *before, report = evaluate(model, [str(path)], config, TextConfig(text_field=field))
    assert not any(isinstance(record, Fitting) for record in before)
    assert isinstance(report, EvaluateReport)
    assert report.bytes == len(row[field])


# ----------------------------------------------------------------------------------------------------------------
# Two models, thresholds, bad input


def test_two_models_are_compared_on_the_same_examples(models: tuple[Path, Path], tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", PREFERENCES * 4)
    alone = [run(each, path, task="prefer") for each in models]
    both = run(models[0], path, task="prefer", more={"other": models[1], "predictions": tmp_path / "p.jsonl"})
    assert both.other is not None
    assert both.differences is not None
    assert (both.metrics, both.other.metrics) == (alone[0].metrics, alone[1].metrics)
    margin = both.differences["margin"]
    assert margin.difference == pytest.approx(alone[1].metrics["margin"] - alone[0].metrics["margin"])
    assert margin.interval is not None
    assert margin.interval[0] <= margin.difference <= margin.interval[1]
    assert 0 < margin.p_value <= 1
    written = [json.loads(line)["model"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert written == [str(models[0])] * 8 + [str(models[1])] * 8
    same = run(models[0], path, task="prefer", more={"other": models[0]})
    assert same.differences is not None
    assert {each.p_value for each in same.differences.values()} == {1.0}
    assert second_model([str(models[1]), str(path)]) == (str(models[1]), (str(path),))
    assert second_model([str(tmp_path), str(path)]) == (None, (str(tmp_path), str(path)))
    with pytest.raises(UsageError, match="data to measure on are missing"):
        second_model([str(models[1])])


def test_the_command_tells_of_a_missed_bar_with_exit_3_and_gives_json(llmcli: Run, model: Path, tmp_path: Path) -> None:
    minimal_pairs(tmp_path / "a.jsonl")
    words = ("evaluate", model, "a.jsonl", "--task", "choice", "--threads", 1, "--json")
    shown = llmcli(*words, "--fail-under", "accuracy=1.5,accuracy_norm=0", cwd=tmp_path)
    assert shown.returncode == 3
    found = json.loads(shown.stdout)
    told = (ROOT / "docs" / "files.md").read_text("utf-8")
    assert [key for key in found if f"`{key}`" not in told] == []
    assert set(found["metrics"]) == set(found["intervals"]) == {"accuracy", "accuracy_norm"}
    message = json.loads(shown.stderr)["error"]["message"]
    assert message == f"{model}: accuracy is {found['metrics']['accuracy']:.4f}, below 1.5"


def test_bars_hold_for_text_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The list type is a mutable sequence.\n" * 4)
    words = [str(model), str(tmp_path / "a.txt"), "--threads", "1", "--fail-under"]
    missed = CliRunner().invoke(command, [*words, "perplexity=1"])
    assert isinstance(missed.exception, CheckError)
    assert "above 1" in str(missed.exception)
    assert "bits/byte" in missed.output
    assert CliRunner().invoke(command, [*words, "perplexity=1e9"]).exit_code == 0
    assert isinstance(CliRunner().invoke(command, [*words, "accuracy=1"]).exception, ConfigError)


def test_two_models_are_compared_on_text_by_bits_per_byte(models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The list type is a mutable sequence. It holds objects of any type.\n" * 60)
    config = EvaluateConfig(threads=1)
    *_, report = evaluate(models[0], [str(tmp_path / "a.txt")], config, other=models[1])
    *_, alone = evaluate(models[1], [str(tmp_path / "a.txt")], config)
    assert isinstance(report, EvaluateReport)
    assert isinstance(alone, EvaluateReport)
    assert report.other is not None
    assert report.other.metrics == alone.metrics
    assert report.differences is not None
    found = report.differences["bits_per_byte"]
    assert found.difference == pytest.approx(alone.metrics["bits_per_byte"] - report.metrics["bits_per_byte"])
    assert found.interval is not None
    assert found.interval[0] <= found.difference <= found.interval[1]
    *_, same = evaluate(models[0], [str(tmp_path / "a.txt")], config, other=models[0])
    assert isinstance(same, EvaluateReport)
    assert same.differences is not None
    assert same.differences["bits_per_byte"].p_value == 1.0
    words = [str(models[0]), str(models[1]), str(tmp_path / "a.txt"), "--threads", "1"]
    assert "bits_per_byte" in CliRunner().invoke(command, words).output


def test_labelled_data_without_a_task_say_which_would_fit(model: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(threads=1)
    with pytest.raises(UsageError, match=r"labelled examples \(multiple choice\); measure with --task choice"):
        list(evaluate(model, [str(lines(tmp_path / "a.jsonl", CHOICES))], config))
    rows = [{"text": "A list.", "label": "a"}, {"text": "A tuple.", "label": "b"}]
    first, *_, last = evaluate(model, [str(lines(tmp_path / "b.jsonl", rows))], config)
    assert first == Fitting("classify", "text/label")
    assert isinstance(last, EvaluateReport)
    plain_text = lines(tmp_path / "c.jsonl", [{"text": "A list."}, {"text": "A tuple."}])
    assert not any(isinstance(record, Fitting) for record in evaluate(model, [str(plain_text)], config))


def test_predictions_do_not_replace_a_file_unasked(model: Path, tmp_path: Path) -> None:
    path = minimal_pairs(tmp_path / "a.jsonl")
    (tmp_path / "p.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        run(model, path, task="choice", more={"predictions": tmp_path / "p.jsonl"})
    assert (tmp_path / "p.jsonl").read_text() == "mine"


ALIKE = [
    ("The list type is a mutable sequence.", "The lists are mutable.", 4.5),
    ("Objects of a class", "An instance of a class", 4.0),
    ("An exception is raised.", "A function returns.", 1.0),
    ("A module has a name.", "A module has a name.", 5.0),
    ("A string of bytes", "The sea is blue.", 0.0),
    ("A dictionary maps keys.", "Keys map to values.", 4.0),
]


def alike(path: Path, rows: Sequence[tuple[str, str, float]] = ALIKE) -> Path:
    return lines(path, [{"sentence1": one, "sentence2": other, "score": score} for one, other, score in rows])


def test_embeddings_are_compared_with_scores(model: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    path, second = alike(tmp_path / "a.jsonl"), alike(tmp_path / "b.jsonl", ALIKE[::-1][:3])
    tokenizer, decoder = load_tokenizer(model), load_model(model)

    def vector(text: str) -> Any:
        with torch.no_grad():
            return decoder.hidden(torch.tensor([tokenizer.encode(text, special=True)]))[0].mean(0)

    expected = [float(torch.cosine_similarity(vector(one), vector(other), 0)) for one, other, _ in ALIKE]
    found = predicted(model, path, task="embed")
    assert [record["cosine"] for record in found] == pytest.approx(expected, abs=1e-5)
    report = run(model, path, second, task="embed", more={"other": models[1]})
    scores = [score for *_, score in ALIKE]
    for file, rows in zip(report.files, (slice(None), slice(3, None)), strict=True):
        assert file.metrics["spearman"] == pytest.approx(spearmanr(scores[rows], expected[rows]).statistic, abs=1e-4)
        assert file.metrics["pearson"] == pytest.approx(pearsonr(scores[rows], expected[rows]).statistic, abs=1e-4)
    assert report.differences is not None
    assert set(report.differences) == set(report.intervals) == {"spearman", "pearson"}
    words = [str(model), str(path), "--task", "embed", "--threads", "1", "--json", "--fail-under"]
    assert CliRunner().invoke(command, [*words, "spearman=-1"]).exit_code == 0
    with pytest.raises(CheckError, match="spearman is"):
        CliRunner().invoke(command, [*words, "spearman=0.9999"], catch_exceptions=False)


def test_data_that_do_not_fit_the_task_are_refused(model: Path, tmp_path: Path) -> None:
    pairs = minimal_pairs(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl:1: its fields are no layout of classify"):
        run(model, pairs, task="classify")
    with pytest.raises(DataError, match="no layout of answer"):
        run(model, lines(tmp_path / "b.jsonl", [{"text": "A list."}]), task="answer")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: is empty"):
        run(model, tmp_path / "empty.jsonl", task="choice")
    with pytest.raises(DataError, match="no such file"):
        run(model, tmp_path / "missing.jsonl", task="choice")
    with pytest.raises(DataError, match=r"d\.jsonl:1: has no score"):
        run(model, lines(tmp_path / "d.jsonl", [{"anchor": "A list.", "positive": "Lists."}]), task="embed")
    with pytest.raises(DataError, match="has the label"):
        run(model, lines(tmp_path / "c.jsonl", [{"text": "A list.", "label": "a"}]), task="classify")
    for more in ({"predictions": tmp_path / "p"}, {"columns": "text=a"}):
        with pytest.raises(UsageError, match="goes with labelled examples"):
            list(evaluate(model, [str(pairs)], EvaluateConfig(task="lm", threads=1), **more))


def test_chatml_ends_are_scored(tmp_path: Path) -> None:
    """The tokenizer that fine-tuning gives a model: its end token is one of the answer's."""
    tokenizer = with_chatml(load_tokenizer(make_tokenizer(tmp_path / "tokenizer")))
    (tmp_path / "chatml").mkdir()
    tokenizer.save(tmp_path / "chatml")
    place = make_model(tmp_path / "model", tmp_path / "chatml", context=64)
    record = predicted(place, lines(tmp_path / "a.jsonl", PREFERENCES), task="prefer")[0]
    assert record["chosen_tokens"] == len(tokenizer.encode(f"A list.{END}", parse_special=True))
