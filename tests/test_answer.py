"""Questions about texts and summaries: how they are learnt, windows, spans, sections, and what cannot be answered."""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizer import make_tokenizer
from small_tuning import go, make_base, tiny

from llmcli.cli.main import main
from llmcli.config import AnswerConfig, GenerateConfig, SamplingConfig, SummarizeConfig
from llmcli.data.examples import AnswerExample, ChatExample, SummaryExample
from llmcli.data.sections import sections_of
from llmcli.data.spans import find_span
from llmcli.data.task_prompts import NO_ANSWER, answer_prompt, summary_prompt
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import DataError, LlmcliError, UsageError
from llmcli.models.folder import load_model
from llmcli.operations.answer import answer, answer_by, windows_of
from llmcli.operations.generate import Generated, Generator, open_generator
from llmcli.operations.summarize import Summarized, summarize
from llmcli.operations.task_prompted import PromptedTask
from llmcli.operations.tasks import make_task
from llmcli.operations.verify import verify
from llmcli.runtime.open import open_session
from llmcli.runtime.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

CITIES = ("Rome", "Oslo", "Lima", "Kyiv")
WHERE: list[dict[str, Any]] = [
    {"id": f"{name}{who}{city}", "context": f"{name} is in {city}.", "question": f"{who}?", "answers": found}
    for name in ("Ann", "Bob")
    for who in ("Ann", "Bob")
    for city in CITIES
    for found in [{"text": [city] * (name == who), "answer_start": [10] * (name == who)}]
]


@pytest.fixture(scope="module", autouse=True)
def _no_waiting() -> Iterator[None]:
    """Nothing here cuts the power, so nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base", context=64)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> TextTokenizer:
    return load_tokenizer(base)


def task_of(name: str, tokenizer: TextTokenizer) -> PromptedTask:
    task = make_task(name)
    assert isinstance(task, PromptedTask)
    task.tokenizer(tokenizer)
    return task


# ----------------------------------------------------------------------------------------------------------------
# What is learnt


def test_a_question_is_put_as_it_is_asked_later_and_its_answer_alone_is_learnt(tokenizer: TextTokenizer) -> None:
    text = "Ann lives in Rome.\nBob too."
    examples = [
        AnswerExample("1", text, "Where does Ann live?", (("Rome", 13), ("in Rome", 10)), "x:1"),
        AnswerExample("2", text, "Where does Cid live?", (), "x:2"),
        AnswerExample("3", text, "What?", (("Rome.\nBob", 13),), "x:3"),
    ]
    rows = list(task_of("answer", tokenizer).encoded(examples, tokenizer))
    learnt = [tokenizer.decode([int(item) for item in row.ids[row.wanted.trained]]) for row in rows]
    assert learnt == [" Rome<|endoftext|>", f" {NO_ANSWER}<|endoftext|>", " Rome. Bob<|endoftext|>"]
    for row, example in zip(rows, examples, strict=True):
        prompt = tokenizer.encode(answer_prompt(text, example.question), special=True)
        assert row.ids[~row.wanted.trained].tolist() == prompt


def test_of_a_text_its_first_summary_is_learnt_as_one_paragraph(tokenizer: TextTokenizer) -> None:
    example = SummaryExample("The sea is wide.", ("It is wide.\n\nVery.", "Wide."), "x:1")
    task = task_of("summarize", tokenizer)
    (row,) = task.encoded([example], tokenizer)
    assert tokenizer.decode([int(item) for item in row.ids[row.wanted.trained]]) == " It is wide.\nVery.<|endoftext|>"
    assert row.ids[~row.wanted.trained].tolist() == tokenizer.encode(summary_prompt("The sea is wide."))
    assert task.ends(tokenizer) == (tokenizer.eos_id,)
    packed, targets = task.batch([row, row])
    assert targets.tolist() == row.ids[row.wanted.trained].tolist() * 2
    assert packed.chosen.tolist()[: len(targets) // 2] == (np.flatnonzero(row.wanted.trained) - 1).tolist()


@pytest.mark.parametrize("name", ["answer", "summarize"])
def test_an_example_of_another_task_is_refused(tokenizer: TextTokenizer, name: str) -> None:
    chat = ChatExample(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), None, "x:7")
    with pytest.raises(DataError, match=r"x:7: is no .*, but ChatExample"):
        list(task_of(name, tokenizer).encoded([chat], tokenizer))


def test_a_cut_takes_of_the_text_what_the_answer_does_not_need(tokenizer: TextTokenizer) -> None:
    text = "The sea is wide. " * 9 + "Ann lives in Rome. " + "The sky is blue. " * 9
    question = "Where does Ann live?"
    task = task_of("answer", tokenizer)
    examples = [
        AnswerExample("1", text, question, (("Rome", text.index("Rome")),), "x:1"),
        AnswerExample("2", text, question, (), "x:2"),
    ]
    known, unknown = task.encoded(examples, tokenizer)
    for row in (known, unknown):
        for length in range(2, len(row.ids)):
            shorter = task.cut(row, length)
            whole = tokenizer.decode([int(item) for item in shorter.ids]) if shorter else None
            if whole is None or shorter is None:
                assert length < 45  # question and answer have some 40
                continue
            said = "Rome" if row is known else NO_ANSWER
            middle, end = whole.split("\n\n", 1)
            assert middle in text
            assert end == f"question: {question}\nanswer: {said}<|endoftext|>"
            assert len(shorter.ids) <= length
            assert shorter.wanted.trained.sum() == row.wanted.trained.sum()
            if row is known:
                assert "Rome" in middle or len(middle) < len("Rome")
            else:
                assert text.startswith(middle)


def test_long_examples_are_cut_or_refused_by_the_run(tmp_path: Path, base: Path) -> None:
    lines = [{"source": f"The sea is wide, number {n}. " * 9, "target": f"sea {n}"} for n in range(6)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"6 of 6 examples have more than 65 tokens"):
        go("summarize", base, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    go("summarize", base, data, tmp_path / "run", config=tiny(on_long="cut", max_steps=2))
    assert list(verify(tmp_path / "run").problems) == []


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt to say who is where, and that a text does not say it."""
    folder = tmp_path_factory.mktemp("taught")
    data = folder / "squad.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in WHERE))
    config = tiny(max_steps=200, learning_rate=0.02, batch_size=8, val_split=0, save_every=1000)
    go("answer", make_base(folder / "base", context=96), data, folder / "run", config=config)
    return folder / "run"


@pytest.fixture(scope="module")
def answering(taught: Path) -> Iterator[Generator]:
    generator = open_generator(taught, threads=1)
    yield generator
    generator.session.close()


def test_a_model_learns_what_its_texts_say_and_where_they_say_nothing(answering: Generator) -> None:
    for example in WHERE:
        found = answer_by(answering, example["context"], example["question"])
        expected = example["answers"]["text"]
        assert found.answer == (expected[0] if expected else None), example
        assert (found.start, found.end) == ((10, 14) if expected else (None, None))
        assert found.probability > 0.5
        assert found.windows == 1


def test_the_probability_is_that_of_the_words_and_their_end(answering: Generator, taught: Path) -> None:
    found = answer_by(answering, "Ann is in Lima.", "Ann?")
    model, tokenizer = load_model(taught / "model"), answering.tokenizer
    before = tokenizer.encode(answer_prompt("Ann is in Lima.", "Ann?"))
    ids = [*before, *tokenizer.encode(" Lima"), tokenizer.eos_id]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
    expected = sum(float(logprobs[place - 1, ids[place]]) for place in range(len(before), len(ids)))
    assert found.probability == pytest.approx(math.exp(expected), rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------
# Windows, and the place that says it


def test_of_windows_the_one_that_is_surest_answers(answering: Generator) -> None:
    """A long text's answer is the most probable one of those that its windows give alone."""
    text = " ".join(f"{name} is in {city}." for name in ("Bob", "Ann") for city in CITIES * 3)
    config = AnswerConfig(max_new_tokens=4, batch_size=3)
    found = answer_by(answering, text, "Ann?", config)
    tokenizer = answering.tokenizer
    limit = len(tokenizer.encode(" no answer\n"))
    room = 96 - limit - len(tokenizer.encode(answer_prompt("", "Ann?")))
    spans = windows_of(tokenizer, text, room, config.overlap)
    alone = [answer_by(answering, text[begin:end], "Ann?", config) for begin, end in spans]
    assert found.windows == len(spans) > 3
    assert all(each.windows == 1 for each in alone)
    best = max((each for each in alone if each.answer is not None), key=lambda each: each.probability)
    assert (found.answer, found.probability) == (best.answer, pytest.approx(best.probability, rel=1e-4))
    assert found.start is not None
    assert text[found.start : found.end] == found.answer
    begin, end = spans[alone.index(best)]
    assert begin <= found.start < end
    nobody = answer_by(answering, " ".join(["Bob is in Oslo."] * 2), "Ann?", config)
    assert nobody.answer is None or nobody.start is not None


@given(st.text(alphabet="ab é猫.\n", min_size=1, max_size=200), st.integers(1, 40), st.floats(0, 0.9))
def test_windows_overlap_fit_and_leave_nothing_out(text: str, room: int, overlap: float) -> None:
    tokenizer = _tokenizer()
    found = windows_of(tokenizer, text, room, overlap)
    assert (found[0][0], found[-1][1]) == (0, len(text))
    offsets = tokenizer.encode_in_detail(text).offsets
    for begin, end in found:
        assert sum(begin < stop and start < end for start, stop in offsets) <= room + 6  # tokens of a cut character
    for (begin, end), (after, last) in itertools.pairwise(found):
        assert begin <= after <= end <= last
    assert len(found) == 1 or len(offsets) > room


@functools.cache
def _tokenizer() -> TextTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(make_tokenizer(Path(folder) / "tokenizer"))


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Rome, in the end.", "Rome", "Rome"),
        ("Carthage fought. Art is long.", "Art", "Art"),  # a whole word before a part of one
        ("Cartography", "art", "art"),
        ("THE  BLACK\nsea", "the black sea", "THE  BLACK\nsea"),
        ("It was on the 3rd of May, 1808.", "3rd May 1808", "3rd of May, 1808"),
        ("He met Dr. Miller there.", "Dr Muller", "Dr. Miller"),
        ("He met nobody there.", "Dr Muller", None),
        ("Zürich is in Switzerland", "zurich", "Zürich"),
        ("a b", "  ", None),
        ("a b", "?!", None),
        ("", "a", None),
    ],
)
def test_a_span_is_what_the_answer_says_or_nearly(text: str, answer: str, expected: str | None) -> None:
    found = find_span(text, answer)
    assert (None if found is None else text[found[0] : found[1]]) == expected


@given(st.text(alphabet="abAB .\n", max_size=60), st.data())
def test_what_stands_in_the_text_is_found_letter_for_letter(text: str, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(text)))
    answer = text[begin : data.draw(st.integers(begin, len(text)))]
    found = find_span(text, answer)
    if answer.strip():
        assert found is not None
        assert text[found[0] : found[1]] == answer.strip()
    else:
        assert found is None


@given(st.text(alphabet="abcé .,", max_size=60), st.text(alphabet="abcé .,", max_size=12))
def test_a_span_is_a_piece_of_the_text_much_like_the_answer(text: str, answer: str) -> None:
    found = find_span(text, answer)
    if found is not None:
        assert 0 <= found[0] < found[1] <= len(text)
        alike = difflib.SequenceMatcher(None, text[found[0] : found[1]].casefold(), answer.strip().casefold(), False)
        assert alike.ratio() >= 0.8 or text[found[0] : found[1]].split() == answer.split()


# ----------------------------------------------------------------------------------------------------------------
# Summaries


@given(st.text(alphabet="ab.# \n=猫", max_size=120), st.integers(1, 30))
def test_sections_are_the_text_and_fit(text: str, room: int) -> None:
    found = sections_of(text, len, room)
    assert "".join(found) == text
    assert all(0 < len(part) <= room for part in found)
    if len(text) <= room and text:
        assert found == [text]


def test_sections_end_where_a_reader_would_end_them() -> None:
    text = "# One\n\nA sea. A boat.\n\nA man.\n\n# Two\n\nA second man went. He came back.\nThe end.\n"
    assert sections_of(text, len, 45) == [
        "# One\n\nA sea. A boat.\n\nA man.\n\n",
        "# Two\n\n",
        "A second man went. He came back.\nThe end.\n",
    ]
    assert sections_of(text, len, 60)[1] == text[text.index("# Two") :]
    assert sections_of("A sea. A boat is on it.", len, 12) == ["A sea.", " A boat is", " on it."]
    assert sections_of("", len, 3) == []


def test_a_long_text_is_summarized_by_sections_and_then_their_summaries(base: Path) -> None:
    text = "".join(f"# Part {n}\n\nThe sea is wide, and the boat {n} is small.\n\n" for n in range(7))
    records = list(summarize(base, text, SummarizeConfig(max_new_tokens=6, threads=1)))
    last = records[-1]
    assert isinstance(last, Summarized)
    assert len(last.sections) == 7
    assert last.rounds > 1
    assert "".join(text[part.start : part.end] for part in last.sections) == text
    first = Generator(*opened(base)).generate(
        [summary_prompt(text[: last.sections[0].end].strip())],
        GenerateConfig(max_new_tokens=6, stop=("\n\n",), threads=1),
        SamplingConfig(temperature=0),
    )
    assert [each.text.strip() for each in first if isinstance(each, Generated)] == [last.sections[0].summary]
    assert [record.done for record in records[:7]] == list(range(1, 8))
    (short,) = summarize(base, "The sea is wide.", SummarizeConfig(max_new_tokens=6, threads=1))
    assert (short.sections, short.rounds) == ((), 1)


def test_summaries_as_long_as_their_text_come_to_an_end(base: Path) -> None:
    """Whatever is asked for, a round has fewer sections than the one before."""
    text = "a b c d e f g h\n" * 40
    for tokens in (1, 15, 1000):
        *_, last = summarize(base, text, SummarizeConfig(max_new_tokens=tokens, threads=1, batch_size=64))
        assert isinstance(last, Summarized)
        assert last.rounds <= len(last.sections)


# ----------------------------------------------------------------------------------------------------------------
# The commands, and bad input


def test_the_commands_answer_as_text_and_as_json(taught: Path, tmp_path: Path) -> None:
    (tmp_path / "ann.txt").write_text("Ann is in Lima.")
    asked = ["-m", taught, "--threads", 1, "--context"]
    assert invoke("answer", *asked, tmp_path / "ann.txt", "Ann?").stdout == "Lima\n"
    nobody = invoke("answer", *asked, tmp_path / "ann.txt", "Bob?")
    assert (nobody.exit_code, nobody.stdout) == (0, "no answer\n")
    found = json.loads(invoke("answer", *asked, tmp_path / "ann.txt", "Ann?", "--json").stdout)
    assert list(found) == ["answer", "start", "end", "probability", "windows"]
    assert (found["answer"], found["start"], found["end"]) == ("Lima", 10, 14)
    nobody = invoke("answer", *asked, "-", "Bob?", "--json", input="Ann is in Lima.")
    assert {**json.loads(nobody.stdout), "probability": 1} == {
        "answer": None,
        "start": None,
        "end": None,
        "probability": 1,
        "windows": 1,
    }
    words = ["summarize", "-m", taught, "--max-tokens", 4, "--threads", 1]
    named, piped = invoke(*words, "--input", tmp_path / "ann.txt"), invoke(*words, input="Ann is in Lima.")
    assert named.exit_code == 0
    assert named.stdout == piped.stdout == invoke(*words, "Ann is in Lima.").stdout
    found = json.loads(invoke(*words, "Ann is in Lima.", "--json").stdout)
    assert list(found) == ["summary", "tokens", "finish_reason", "sections", "rounds"]
    assert found["summary"] + "\n" == named.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["answer", "--context", "nowhere.txt", "Why?"], "nowhere.txt: no such file or"),
        (["answer", "--context", "empty.txt", "Why?"], "empty.txt: is empty"),
        (["answer", "--context", "blank.txt", "Why?"], "context: the text is empty"),
        (["answer", "--context", "text.txt", " "], "the question is empty"),
        (["answer", "--context", "text.txt", "why " * 99], "the question takes 2"),
        (["summarize", "--input", "nowhere.txt"], "nowhere.txt: no such file or"),
        (["summarize", "--input", "blank.txt"], "the text is empty"),
        (["summarize", "--input", "text.txt", "a text"], "there is a text and an --input"),
    ],
)
def test_bad_input_is_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Sequence[str], message: str
) -> None:
    for name, text in (("empty.txt", ""), ("blank.txt", " \n"), ("text.txt", "The sea.")):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    error = invoke(words[0], "-m", base, "--threads", 1, *words[1:]).exception
    assert isinstance(error, LlmcliError)
    assert (error.exit_code, str(error)[: len(message)]) == (2, message)
    assert "\n" not in str(error)


def test_a_context_without_room_is_named(tmp_path: Path) -> None:
    small = make_base(tmp_path / "small", context=12)
    with pytest.raises(UsageError, match="context of 12 tokens has no room for a text"):
        list(summarize(small, "The sea.", SummarizeConfig(threads=1)))
    with pytest.raises(UsageError, match="the model's context of 12 has no room"):
        answer(small, "The sea.", "What?", AnswerConfig(threads=1))


def opened(model: Path) -> tuple[Session, TextTokenizer]:
    return open_session(model, threads=1), load_tokenizer(model)


def invoke(*words: object, input: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], input=input)
