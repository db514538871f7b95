"""Layouts of labelled data: each is recognised by what users' files hold, and what is wrong is told with its line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcli.config import LabelledConfig
from llmcli.data.examples import (
    AnswerExample,
    ChatExample,
    ChoiceExample,
    CompletionExample,
    Example,
    LabelExample,
    PreferenceExample,
    ScoredPairExample,
    SummaryExample,
    TextExample,
    TripletExample,
)
from llmcli.data.fields import read_columns
from llmcli.data.labels import require_classes
from llmcli.data.layouts import TASKS, Layout, find_splits, read_examples, recognise
from llmcli.errors import ConfigError, DataError, LlmcliError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}
PAIR = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
ARTICLE = {
    "title": "T",
    "paragraphs": [
        {
            "context": "The cat sat.",
            "qas": [{"id": "q1", "question": "Who?", "answers": [{"text": "cat", "answer_start": 4}]}],
        }
    ],
}


def lines(path: Path, *rows: Any) -> Path:
    """Writes JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path | Sequence[Path], task: str, columns: str | None = None) -> list[Example]:
    """The examples of a file, their places shortened to what follows its folder."""
    paths = [path] if isinstance(path, Path) else path
    return list(read_examples([str(each) for each in paths], task, LabelledConfig(columns)))


def only(path: Path, task: str, columns: str | None = None) -> Any:
    """The one example of a file."""
    (example,) = read(path, task, columns)
    return example


def problem(path: Path, task: str, columns: str | None = None) -> str:
    """The error that reading ends with, without the folder."""
    with pytest.raises(LlmcliError) as caught:
        read(path, task, columns)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{path.parent}/", "")


# ----------------------------------------------------------------------------------------------------------------
# One of each


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
CALLED = ({"role": "user", "content": "Look"}, {"role": "assistant", "content": "", "tool_calls": [CALL]})
ANSWERED = (*CALLED, {"role": "tool", "content": "blue"}, SAID)

CHATS: dict[str, tuple[dict[str, Any], str, tuple[dict[str, Any], ...]]] = {
    "openai": ({"messages": [SYSTEM, USER, SAID]}, "messages", (SYSTEM, USER, SAID)),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, SAID]},
        "messages",
        (USER, SAID),
    ),
    "sharegpt": ({"conversations": PAIR, "system": "Be kind"}, "sharegpt", (SYSTEM, USER, SAID)),
    "empty system": ({"conversations": PAIR, "system": ""}, "sharegpt", (USER, SAID)),
    "function_call": (
        {
            "conversations": [
                {"from": "human", "value": "Look"},
                {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sea"}}'},
                {"from": "observation", "value": "blue"},
                {"from": "gpt", "value": "Hello"},
            ],
            "tools": "[]",
        },
        "sharegpt",
        ANSWERED,
    ),
    "tool_calls": (
        {
            "messages": [
                {"role": "user", "content": "Look"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}],
                },
                {"role": "tool", "content": "blue"},
                SAID,
            ]
        },
        "messages",
        ANSWERED,
    ),
    "alpaca": (
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be kind", "history": [["Hi", "Hello"]]},
        "alpaca",
        (SYSTEM, USER, SAID, {"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}),
    ),
    "prompt as messages": ({"prompt": [USER], "completion": [SAID]}, "prompt/completion", (USER, SAID)),
}


@pytest.mark.parametrize("name", CHATS)
def test_conversations_come_out_in_one_form(tmp_path: Path, name: str) -> None:
    row, layout, messages = CHATS[name]
    path = lines(tmp_path / "a.jsonl", row)
    assert recognise(str(path), "chat").name == layout
    example = only(path, "chat")
    assert isinstance(example, ChatExample)
    assert example.messages == messages
    assert example.where == f"{path}:1"


def test_tools_are_read_from_json_and_put_into_one_form(tmp_path: Path) -> None:
    tool = {"name": "look", "parameters": {}}
    for given_as in (json.dumps([tool]), [tool], [{"type": "function", "function": tool}]):
        path = lines(tmp_path / "a.jsonl", {"messages": [USER, SAID], "tools": given_as})
        assert only(path, "chat").tools == [{"type": "function", "function": tool}]
    assert only(lines(tmp_path / "a.jsonl", {"messages": [USER, SAID], "tools": "[]"}), "chat").tools is None


OTHERS: list[tuple[str, dict[str, Any], str, Example]] = [
    ("chat", {"prompt": "2+2=", "response": " 4"}, "prompt/completion", CompletionExample("2+2=", " 4", "")),
    ("chat", {"text": "Once"}, "text", TextExample("Once", "")),
    ("classify", {"text": "Good", "label": 1}, "text/label", LabelExample("Good", ("1",), "")),
    ("classify", {"sentence": "Good", "labels": ["a", "b", "a"]}, "text/label", LabelExample("Good", ("a", "b"), "")),
    (
        "classify",
        {"premise": "A", "hypothesis": "B", "label": "yes"},
        "text pair/label",
        LabelExample("A", ("yes",), "", "B"),
    ),
    (
        "answer",
        {"id": "7", "context": "The cat sat.", "question": "Who?", "answers": {"text": ["cat"], "answer_start": [4]}},
        "context/question/answers",
        AnswerExample("7", "The cat sat.", "Who?", (("cat", 4),), ""),
    ),
    (
        "answer",
        {"id": 7, "context": "The cat sat.", "question": "Who?", "answer": "cat"},
        "context/question/answers",
        AnswerExample("7", "The cat sat.", "Who?", (("cat", 4),), ""),
    ),
    (
        "summarize",
        {"source": ["A b.", "C d."], "target": ["A.", "C."]},
        "source/target",
        SummaryExample("A b. C d.", ("A.", "C."), ""),
    ),
    ("summarize", {"article": "A b.", "highlights": "A."}, "source/target", SummaryExample("A b.", ("A.",), "")),
    (
        "embed",
        {"sentence1": "A", "sentence2": "B", "score": "4.5"},
        "pairs with scores",
        ScoredPairExample("A", "B", 4.5, ""),
    ),
    ("embed", {"anchor": "A", "positive": "B"}, "anchor/positive/negative", TripletExample("A", "B", None, "")),
    (
        "embed",
        {"query": "A", "positive": "B", "negative": "C"},
        "anchor/positive/negative",
        TripletExample("A", "B", "C", ""),
    ),
    (
        "prefer",
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        "prompt/chosen/rejected",
        PreferenceExample((USER,), (SAID,), ({"role": "assistant", "content": "No"},), ""),
    ),
    (
        "prefer",
        {"conversations": PAIR[:1], "chosen": PAIR[1], "rejected": {"from": "gpt", "value": "No"}},
        "messages/chosen/rejected",
        PreferenceExample((USER,), (SAID,), ({"role": "assistant", "content": "No"},), ""),
    ),
    (
        "prefer",
        {"prompt": "Hi", "chosen": [USER, SAID], "rejected": [USER, {"role": "assistant", "content": "No"}]},
        "prompt/chosen/rejected",
        PreferenceExample((USER,), (SAID,), ({"role": "assistant", "content": "No"},), ""),
    ),
    (
        "prefer",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        "hh-rlhf",
        PreferenceExample((USER,), (SAID,), ({"role": "assistant", "content": "No"},), ""),
    ),
    (
        "choice",
        {"query": "He", "choices": ["ran", "run"], "gold": 0},
        "multiple choice",
        ChoiceExample("He", (" ran", " run"), 0, ""),
    ),
    (
        "choice",
        {"question": "He", "choices": {"text": ["run", "ran"], "label": ["A", "B"]}, "answerKey": "B"},
        "multiple choice",
        ChoiceExample("He", (" run", " ran"), 1, ""),
    ),
    ("choice", {"sentence_good": "A", "sentence_bad": "B"}, "minimal pairs", ChoiceExample("", ("A", "B"), 0, "")),
]


@pytest.mark.parametrize(
    ("task", "row", "layout", "expected"), OTHERS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_layout_is_recognised_and_read(
    tmp_path: Path, task: str, row: dict[str, Any], layout: str, expected: Example
) -> None:
    path = lines(tmp_path / "a.jsonl", row)
    assert recognise(str(path), task).name == layout
    example = only(path, task)
    assert example.where == f"{path}:1"
    assert type(example) is type(expected)
    for name in type(expected).__slots__:
        assert name == "where" or getattr(example, name) == getattr(expected, name), name


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    rows = [{"text": f'a "{number}", é', "label": "xy"[number % 2]} for number in range(3)]
    lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1), "utf-8")
    (tmp_path / "c.json").write_text(json.dumps({"version": "1", "data": rows}), "utf-8")
    cells = ['"' + row["text"].replace('"', '""') + f'",{row["label"]}' for row in rows]
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["Text,Label", *cells, ""]).encode())
    (tmp_path / "e.tsv").write_text(
        "".join(f"{row['text']}\t{row['label']}\n" for row in [{"text": "text", "label": "label"}, *rows])
    )
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    expected = [(row["text"], (row["label"],)) for row in rows]
    for path in sorted(tmp_path.iterdir()):
        assert [(each.text, each.labels) for each in read(path, "classify")] == expected, path  # type: ignore[union-attr]


def test_parquet_rows_have_their_places(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"messages": [[USER, SAID]] * 2}), tmp_path / "a.parquet")
    examples = read(tmp_path / "a.parquet", "chat")
    assert [example.where for example in examples] == [f"{tmp_path}/a.parquet:row {row}" for row in (1, 2)]
    assert examples[0].messages == (USER, SAID)  # type: ignore[union-attr]


def test_records_on_one_line_are_told_apart_by_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a", "label": 1}, {"text": "b", "label": 1},\n{"text": "", "label": 1}]')
    with pytest.raises(DataError, match=r"a\.json:2: field 'text' is empty"):
        read(path, "classify")
    path.write_text('[{"text": "a", "label": 1}, {"text": "", "label": 1}]')
    with pytest.raises(DataError, match=r"a\.json:1:29: field 'text' is empty"):
        read(path, "classify")


def test_squad_tells_its_version_and_its_questions(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1.1", "data": [ARTICLE]}))
    assert recognise(str(path), "answer").name == "squad 1.1"
    assert only(path, "answer").answers == (("cat", 4),)
    content = json.loads(json.dumps(ARTICLE))
    content["paragraphs"][0]["qas"] = [
        {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True},
        {"id": "q3", "question": "Who?", "answers": [{"text": "cat", "answer_start": 5}], "is_impossible": False},
        {"id": "q4", "question": "Who?", "answers": [{"text": "dog", "answer_start": 0}], "is_impossible": False},
    ]
    path.write_text(json.dumps({"data": [content]}))
    assert recognise(str(path), "answer").name == "squad 2.0"
    problems: list[DataError] = []
    examples = list(read_examples([str(path)], "answer", on_problem=problems.append))
    assert [(example.id, example.answers) for example in examples] == [("q2", ())]  # type: ignore[union-attr]
    assert [str(each).replace(f"{tmp_path}/", "") for each in problems] == [
        "a.json:1 (question q3): the answer 'cat' is not in its context at 5; it stands at 4",
        "a.json:1 (question q4): the answer 'dog' is not in its context at 0, nor elsewhere in it",
    ]


# ----------------------------------------------------------------------------------------------------------------
# Tables without names, and --columns


def table(path: Path, rows: Sequence[Sequence[object]], separator: str = "\t") -> Path:
    path.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))
    return path


def test_a_table_without_names_is_told_by_what_its_columns_hold(tmp_path: Path) -> None:
    texts = [f"word {number} and more" for number in range(12)]
    path = table(tmp_path / "a.tsv", [(text, number % 2) for number, text in enumerate(texts)])
    assert recognise(str(path), "classify") == Layout("text/label", ("1", "2"), False)
    assert [(each.text, each.labels[0]) for each in read(path, "classify")][:2] == [(texts[0], "0"), (texts[1], "1")]  # type: ignore[union-attr]
    path = table(tmp_path / "b.csv", [(number % 3, text, f"more {number}") for number, text in enumerate(texts)], ",")
    assert read(path, "classify")[0].text == "word 0 and more\nmore 0"  # type: ignore[union-attr]
    path = table(tmp_path / "c.csv", [(text, text[::-1], number / 4) for number, text in enumerate(texts)], ",")
    assert read(path, "embed")[2].score == 0.5  # type: ignore[union-attr]


def test_names_that_are_not_known_are_never_taken_for_data(tmp_path: Path) -> None:
    rows = [("body", "stars"), *((f"word {number} and more", number % 2) for number in range(12))]
    path = table(tmp_path / "a.tsv", rows)
    assert "looks like names" in (found := problem(path, "classify"))
    assert "--columns text=body,label=stars" in found
    assert len(read(path, "classify", "text=body,label=stars")) == 12
    path = table(tmp_path / "b.csv", [("one", "two", "how"), ("a b", "c d", 1), ("e f", "g h", 2)], ",")
    assert "looks like names" in problem(path, "embed")
    path = table(tmp_path / "d.csv", [("review;stars",), ("good;1",)])
    assert "its rows have one column" in problem(path, "classify")
    path = table(tmp_path / "c.csv", [("one two", "three four")] * 9, ",")
    assert "do not tell which column is the label" in problem(path, "classify")


def test_columns_map_any_field_by_name_or_number(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"title": "T", "body, whole": "B", "stars": 5})
    example = only(path, "classify", 'text=title+"body, whole",label=stars')
    assert (example.text, example.labels) == ("T\nB", ("5",))
    path = table(tmp_path / "a.csv", [("x", "a b", "y")], ",")
    assert only(path, "classify", "text=2,label=3").labels == ("y",)
    assert "a.csv:1: field '4' is missing; found: '1', '2', '3'" in problem(path, "classify", "text=2,label=4")
    assert (
        only(lines(tmp_path / "b.jsonl", {"ask": "a", "say": "b"}), "chat", "prompt=ask,completion=say").prompt == "a"
    )


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ("text", "cannot be read from 'text' on"),
        ("", "names no field"),
        ("txet=a", "'txet' is not known here; did you mean text?"),
        ("text=a,text=b", "'text' is given twice"),
        ("text=,label=b", "cannot be read"),
        ('text="a,label=b', "cannot be read"),
    ],
)
def test_columns_that_cannot_be_read_are_refused(tmp_path: Path, columns: str, reason: str) -> None:
    path = lines(tmp_path / "a.jsonl", {"a": "T", "b": "B"})
    with pytest.raises(ConfigError, match="columns: ") as caught:
        read(path, "classify", columns)
    assert reason in str(caught.value)


NAMES = st.text(st.characters(exclude_characters='"', exclude_categories=("Cs",)), min_size=1)


@given(st.dictionaries(st.sampled_from(["text", "label", "score"]), st.lists(NAMES, min_size=1).map(tuple), min_size=1))
def test_columns_take_every_name_in_quotes(wanted: dict[str, tuple[str, ...]]) -> None:
    written = ", ".join(
        f"{name}={'+'.join(chr(34) + own + chr(34) for own in names)}" for name, names in wanted.items()
    )
    assert read_columns(written, ["text", "label", "score"]) == wanted


@given(st.text(alphabet='text=,+" label1'))
def test_columns_are_read_or_refused(given_as: str) -> None:
    try:
        found = read_columns(given_as, ["text", "label"])
    except ConfigError:
        return
    assert found
    assert all(own for names in found.values() for own in names if own != "")


# ----------------------------------------------------------------------------------------------------------------
# What is wrong


WRONG: list[tuple[str, list[Any], str]] = [
    (
        "classify",
        [{"text": "a", "label": 1}, {"text": "b", "lable": 1}],
        "a.jsonl:2: field 'label' is missing; found: 'text', 'lable'; did you mean lable?",
    ),
    (
        "classify",
        [{"text": "b", "lable": 1}],
        "a.jsonl:1: its fields are no layout of classify: found 'text', 'lable' (is 'lable' meant for 'label'?)",
    ),
    ("classify", [{"text": " ", "label": 1}], "field 'text' is empty"),
    ("classify", [{"text": "a", "label": ""}], "field 'label' is empty"),
    ("classify", [{"text": "a", "label": {"x": 1}}], "field 'label' holds an object, not text"),
    ("classify", [{"text": 5, "label": 1}], "field 'text' holds a number, not text"),
    ("classify", ["text"], "is a text, not an object with fields"),
    ("chat", [{"messages": []}], "the conversation has no message"),
    ("chat", [{"messages": [SYSTEM]}], "nobody speaks in it"),
    ("chat", [{"messages": [USER]}], "ends with the user; nothing to learn follows"),
    ("chat", [{"messages": [SYSTEM, SYSTEM, USER, SAID]}], "has two system messages"),
    ("chat", [{"messages": [USER, SYSTEM, SAID]}], "the system message does not stand first"),
    ("chat", [{"messages": [SAID, USER, SAID]}], "begins with the assistant, not with the user"),
    ("chat", [{"messages": [USER, USER, SAID]}], "message 2 is the user's after the user: roles out of order"),
    (
        "chat",
        [{"messages": [SYSTEM, *CALLED, USER, SAID]}],
        "message 4 is the user's after the assistant, which calls a tool",
    ),
    (
        "chat",
        [{"messages": [USER, {"role": "assistent", "content": "a"}]}],
        "message 2 has the role 'assistent'; did you mean assistant?",
    ),
    ("chat", [{"messages": [USER, {"role": "assistant", "content": " "}]}], "message 2 (assistant) is empty"),
    (
        "chat",
        [{"messages": [USER, {"role": "assistant", "text": "a"}]}],
        "message 2 has neither 'content' nor 'value'; found: 'role', 'text'",
    ),
    ("chat", [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAID]}], "only text can be learnt"),
    ("chat", [{"messages": [USER, {"role": "assistant", "content": "\ud800"}]}], "half of a surrogate pair"),
    ("chat", [{"messages": [USER, SAID], "tools": "{"}], "field 'tools' is not valid JSON"),
    ("answer", [{"context": "a", "question": "b", "answer": "c"}], "the answer 'c' is not in its context"),
    (
        "answer",
        [{"context": "a", "question": "b", "answers": {"text": ["a"]}}],
        "field 'answer_start' is missing; found: 'text'",
    ),
    ("embed", [{"sentence1": "a", "sentence2": "b", "score": "high"}], "field 'score' holds 'high', not a number"),
    ("embed", [{"sentence1": "a", "sentence2": "b", "score": float("nan")}], "no finite number"),
    ("prefer", [{"prompt": "a", "chosen": "b", "rejected": "b"}], "chosen and rejected are the same"),
    (
        "prefer",
        [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}],
        "share no prompt",
    ),
    (
        "choice",
        [{"query": "a", "choices": ["b", "c"], "gold": 2}],
        "field 'gold' holds 2, which is none of the 2 choices",
    ),
    ("choice", [{"query": "a", "choices": ["b"], "gold": 0}], "a list of 1, not a list of two or more"),
]


@pytest.mark.parametrize(("task", "rows", "reason"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_a_bad_row_is_told_with_its_line_and_passed_over_where_asked(
    tmp_path: Path, task: str, rows: list[Any], reason: str
) -> None:
    path = lines(tmp_path / "a.jsonl", *rows)
    found = problem(path, task)
    assert reason in found
    assert found.startswith(f"a.jsonl:{len(rows)}: ")
    problems: list[DataError] = []
    assert len(list(read_examples([str(path)], task, on_problem=problems.append))) == len(rows) - 1
    assert len(problems) == 1


def test_a_row_of_another_width_and_broken_json_are_told_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,1\nb,c,1\nd,2\n")
    assert problem(path, "classify") == "a.csv:3: the row has 3 columns, the first one 2"
    problems: list[DataError] = []
    assert len(list(read_examples([str(path)], "classify", on_problem=problems.append))) == 2
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "a", "label": 1\n{"text": "a", "text": "b", "label": 1}\n')
    assert problem(path, "classify").startswith("a.jsonl:2:25: is not valid JSON")
    assert [each.where for each in read_all_problems(path)] == [f"{path}:2:25", f"{path}:3"]


def read_all_problems(path: Path) -> list[DataError]:
    problems: list[DataError] = []
    assert len(list(read_examples([str(path)], "classify", on_problem=problems.append))) == 1
    return problems


def test_an_object_of_two_lists_is_refused_and_a_plain_text_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"train": [{"text": "a", "label": 1}], "test": [{"text": "b", "label": 1}]}')
    assert "two lists of records, 'train' and 'test'" in problem(path, "classify")
    path.write_text('{"data": [{"text": "a", "label": 1}')
    assert "it ends inside its list" in problem(path, "classify")
    path = tmp_path / "a.txt"
    path.write_text("hello")
    assert "is plain text" in problem(path, "classify")
    with pytest.raises(ConfigError, match="did you mean classify"):
        read(path, "classifi")


def test_one_class_alone_is_nothing_to_learn() -> None:
    require_classes({"a": 1, "b": 2})
    with pytest.raises(DataError, match="the label 'a'; two at least"):
        require_classes({"a": 3})


# ----------------------------------------------------------------------------------------------------------------
# Parts


def test_parts_are_told_by_names_where_one_is_named_training(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl", "x-test.csv.gz", "readme.txt", "other.json"):
        (tmp_path / name).write_text("{}")
    found = find_splits([str(tmp_path)])
    assert found.train == (f"{tmp_path}/train.jsonl",)
    assert (found.validation, found.test) == ((f"{tmp_path}/dev.jsonl",), (f"{tmp_path}/x-test.csv.gz",))
    assert find_splits([f"{tmp_path}/dev.jsonl"]).train == (f"{tmp_path}/dev.jsonl",)
    nested = tmp_path / "nested"
    for part in ("train", "validation"):
        (nested / part).mkdir(parents=True)
        (nested / part / "0000.parquet").write_text("x")
    assert find_splits([str(nested)]).validation == (f"{nested}/validation/0000.parquet",)
    with pytest.raises(DataError, match="no such file"):
        find_splits([f"{tmp_path}/none"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="holds no jsonl"):
        find_splits([f"{tmp_path}/empty"])


REAL = [
    ("chat", "alpaca_demo", "alpaca", 999),
    ("chat", "dolly_hhrlhf", "prompt/completion", 1000),
    ("chat", "toolcall_demo", "sharegpt", 300),
    ("classify", "sst2/train.tsv", "text/label", 6920),
    ("classify", "ag_news/train.csv", "text/label", 6000),
    ("answer", "squad/dev-part.json", "squad 2.0", 1115),
    ("summarize", "scitldr/dev.jsonl", "source/target", 619),
    ("prefer", "hh_rlhf", "hh-rlhf", 600),
    ("prefer", "dpo_demo", "messages/chosen/rejected", 300),
    ("embed", "stsb/stsb-en-dev.csv", "pairs with scores", 625),
    ("choice", "multiple_choice/copa.jsonl", "multiple choice", 100),
    ("choice", "blimp/transitive.jsonl", "minimal pairs", 500),
]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
@pytest.mark.parametrize(("task", "name", "layout", "count"), REAL, ids=[name for _, name, _, _ in REAL])
def test_published_sets_are_read_whole(task: str, name: str, layout: str, count: int) -> None:
    path = DATA / name
    assert recognise(str(path), task).name == layout
    assert len(read(path, task)) == count


def test_the_tasks_are_the_ones_of_the_settings() -> None:
    assert {task for task, *_ in OTHERS} == set(TASKS)
