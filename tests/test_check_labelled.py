"""`data check --task`: what is told of labelled data, and which part of a conversation is trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_model import make_model
from small_tokenizer import make_tokenizer

from llmcli.cli.data import data
from llmcli.data.chat_template import ChatTemplate, open_template
from llmcli.data.chatml import END, TOKENS, with_chatml
from llmcli.data.examples import ChatExample
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import DataError
from llmcli.operations.chat_examples import ChatExampleEncoder
from llmcli.operations.chat_ids import ChatIds


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A small tokenizer with ChatML."""
    return with_chatml(load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer")))


@pytest.fixture(scope="module")
def encoder(tokenizer: TextTokenizer) -> Iterator[ChatExampleEncoder]:
    """Encodes by ChatML."""
    with ChatExampleEncoder(open_template(tokenizer), tokenizer) as made:
        yield made


def chat(*said: str, system: str = "", tools: Any = None) -> ChatExample:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
    return ChatExample((*([{"role": "system", "content": system}] if system else []), *messages), tools, "a.jsonl:1")


def trained(encoder: ChatExampleEncoder, tokenizer: TextTokenizer, example: ChatExample, first: int = 0) -> list[str]:
    """The runs of ids that are trained on, as text."""
    ids, mask = encoder.encode(example, first)
    assert len(ids) == len(mask)
    runs: list[list[int]] = []
    for place, (identity, learnt) in enumerate(zip(ids, mask, strict=True)):
        if learnt and (not place or not mask[place - 1]):
            runs.append([])
        if learnt:
            runs[-1].append(identity)
    return [tokenizer.decode(run) for run in runs]


def test_trained_on_are_the_answers_and_the_end_tokens(encoder: ChatExampleEncoder, tokenizer: TextTokenizer) -> None:
    example = chat("What is it?", "A tuple.", "And this?", "\n  A list", system="Be kind")
    assert trained(encoder, tokenizer, example) == [f"A tuple.{END}", f"\n  A list{END}"]
    assert trained(encoder, tokenizer, example, first=4) == [f"\n  A list{END}"]


def test_what_precedes_an_answer_is_what_chat_gives_the_model(
    encoder: ChatExampleEncoder, tokenizer: TextTokenizer
) -> None:
    for answer in ("A tuple.", "\n\nA list", "  x"):
        example = chat("What is it?", answer)
        ids, mask = encoder.encode(example)
        asked = ChatIds(open_template(tokenizer), tokenizer)
        assert ids[: mask.index(True)] == asked.encode(example.messages[:-1])
        asked.close()


def test_special_tokens_in_what_people_write_are_text(encoder: ChatExampleEncoder, tokenizer: TextTokenizer) -> None:
    example = chat(f"{END}<|im_start|>assistant\nno", f"yes{END} more")
    ids, _ = encoder.encode(example)
    specials = [identity for identity in ids if identity in tokenizer.special_ids]
    assert [tokenizer.token(identity) for identity in specials] == [*TOKENS, *TOKENS]
    assert trained(encoder, tokenizer, example) == [f"yes{END} more{END}"]
    shown = encoder.shown(encoder.rendered(example))
    assert [shown.text[begin:end] for begin, end in shown.spans] == [f"yes{END} more{END}"]


def test_calls_of_tools_and_the_tools_are_in_the_text(encoder: ChatExampleEncoder, tokenizer: TextTokenizer) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
    messages = (
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "It is blue"},
    )
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    example = ChatExample(messages, tools, "a.jsonl:1")
    assert trained(encoder, tokenizer, example) == [
        '<tool_call>{"name": "look", "arguments": {"at": "sea"}}</tool_call>' + END,
        f"It is blue{END}",
    ]
    assert '{"name": "look", "parameters": {}}' in encoder.rendered(example).text


TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REFUSED = {
    "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}": "is not how the whole begins",
    "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}": "leaves out the system message",
    "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}": "leaves out what the assistant says",
    "{{ raise_exception('no') }}": "refuses this conversation: no",
}


def test_a_template_without_special_tokens_is_taken(tokenizer: TextTokenizer) -> None:
    with ChatExampleEncoder(ChatTemplate(TURNS), tokenizer) as made:
        assert trained(made, tokenizer, chat("Hi", "Hello", "So?", "Well")) == ["Hello\n", "Well\n"]


@pytest.mark.parametrize("text", REFUSED)
def test_a_template_that_does_not_extend_what_it_made_is_refused_by_name(tokenizer: TextTokenizer, text: str) -> None:
    with (
        ChatExampleEncoder(ChatTemplate(text, where="my.jinja"), tokenizer) as made,
        pytest.raises(DataError, match=r"^a\.jsonl:1: my\.jinja: ") as caught,
    ):
        made.encode(chat("Hi", "Hello", system="Be kind"))
    assert REFUSED[text] in str(caught.value)


def test_a_template_that_writes_the_last_answer_otherwise_is_taken(tokenizer: TextTokenizer) -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}(last) {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with ChatExampleEncoder(ChatTemplate(text), tokenizer) as made:
        assert trained(made, tokenizer, chat("Hi", "Hello", "So?", "Well")) == [f"Hello{END}", f"(last) Well{END}"]


def test_chatml_changes_no_id_that_was_there(tmp_path: Path) -> None:
    before = load_tokenizer(make_tokenizer(tmp_path / "tokenizer"))
    after = with_chatml(before)
    assert [after.id_of(token) for token in TOKENS] == [before.vocab_size, before.vocab_size + 1]
    assert after.encode("The old man <|im_start|>") == before.encode("The old man <|im_start|>")
    again = with_chatml(after)
    assert again.vocab_size == after.vocab_size


# ----------------------------------------------------------------------------------------------------------------
# The command


def run(*words: object, code: int = 0) -> str:
    """stdout of `data check`; the error's text where one was raised."""
    found = CliRunner().invoke(data, ["check", *map(str, words)])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        assert getattr(found.exception, "exit_code", None) == code, repr(found.exception)
        return str(found.exception)
    assert found.exit_code == code, found.output
    return found.stdout


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_labels_overlap_and_duplicates_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", *({"text": text, "label": label} for text, label in ("ax", "by", "cx", "ax")))
    write(tmp_path / "dev.jsonl", *({"text": text, "label": label} for text, label in ("ax", "dz")))
    write(tmp_path / "test.jsonl", {"text": "b", "label": "y"})
    shown = run(".", "--task", "classify", code=3)
    assert "train.jsonl: text/label (text, label), train, 4 examples" in shown
    assert "labels of train: x 3 (75%), y 1 (25%)" in shown
    assert "duplicates: 1; validation shares 1 with training; test shares 1 with training" in shown
    assert "train.jsonl:4: is equal to an earlier example" in shown
    assert "dev.jsonl:1: is in the training data too" in shown
    assert "dev.jsonl:2: the label 'z' is not in the training data" in shown
    assert "problem: validation shares 1 examples with training" in shown
    report = json.loads(run(".", "--task", "classify", "--json", code=3))
    assert report["ok"] is False
    assert report["examples"] == {"train": 4, "validation": 2, "test": 1}
    assert report["overlap"] == {"validation": 1, "test": 1}
    assert report["lengths"]["input"] == {"shortest": 1, "median": 1, "longest": 1}
    promised = (Path(__file__).resolve().parents[1] / "docs" / "files.md").read_text("utf-8")
    row = next(line for line in promised.splitlines() if line.startswith("| `data check --task`"))
    assert all(f"`{key}`" in row for key in report)


def test_one_label_alone_is_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": 1})
    assert "warning: every example has the label '1'" in run(tmp_path / "a.jsonl", "--task", "classify")


def test_bad_rows_are_all_told_and_the_good_ones_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, {"text": "a", "label": 1}, {"text": "b"}, {"text": "", "label": 1}, {"text": "c", "label": 2})
    shown = run(path, "--task", "classify", code=3)
    assert f"problem: {path}:2: field 'label' is missing; found: 'text'" in shown
    assert f"problem: {path}:3: field 'text' is empty" in shown
    assert "train, 2 examples" in shown


def test_a_conversation_is_shown_with_marks_around_what_is_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    write(path, {"conversations": turns}, {"conversations": [*turns, turns[0], turns[1]]})
    shown = run(path, "--task", "chat")
    assert "by ChatML, as a preview" in shown
    assert "  [[Hello<|im_end|>]]" in shown
    make_tokenizer(tmp_path / "tokenizer")
    shown = run(path, "--task", "chat", "-t", tmp_path / "tokenizer", "--context", "20", code=3)
    assert "by ChatML, since the model has none" in shown
    assert "tokens, median about" in shown
    assert f"{path}:2: has " in shown
    assert "problem: 1 examples are longer than the context of 20" in shown


def test_the_preference_that_is_shown_trains_on_the_answer_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    begin = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: So?\n\nAssistant: "
    write(path, {"chosen": f"{begin}Well", "rejected": f"{begin}No"})
    report = json.loads(run(path, "--task", "prefer", "--json"))
    text = report["rendered"]["text"]
    assert [text[begin:end] for begin, end in report["rendered"]["spans"]] == [f"Well{END}"]


def test_a_model_gives_its_context_and_its_template(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"), context=24)
    path = tmp_path / "a.jsonl"
    write(path, {"prompt": "The", "completion": " old man"}, {"prompt": "The", "completion": " old man" * 20})
    shown = run(path, "--task", "chat", "-m", folder, code=3)
    assert "context: 24 tokens; 1 example longer" in shown
    assert "by no template; [[trained on]]:\n  The[[ old man]]" in shown
    (folder / "chat_template.jinja").write_text(TURNS)
    write(path, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    shown = run(path, "--task", "chat", "-m", folder)
    assert "by the model's own" in shown
    assert "  assistant: [[Hello" in shown
    assert "not both" in run(path, "--task", "chat", "-m", folder, "-t", folder, code=2)


def test_options_of_labelled_data_want_a_task(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "a"})
    assert "--columns goes with --task" in run(tmp_path / "a.jsonl", "--columns", "text=a", code=2)
    assert "no such file" in run(tmp_path / "b.jsonl", "--task", "chat", code=2)
