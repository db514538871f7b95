"""`llmcli tokenizer` as a user runs it: what stands on stdout, what an error says, and the exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from click.testing import CliRunner, Result
from conftest import Run

from llmcli.cli.tokenizer import tokenizer as command
from llmcli.config import TextConfig, TokenizerConfig
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import LlmcliError
from llmcli.operations.records import Progress
from llmcli.operations.tokenizer import TrainReport, parse_ids, train_tokenizer

TEXT = "".join(topics[name] for name in sorted(topics)[:30])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its tokenizer and one of BERT's kind."""
    place = tmp_path_factory.mktemp("tokenizers")
    (place / "text.txt").write_text(TEXT, "utf-8")
    for kind in ("bpe", "wordpiece"):
        config = TokenizerConfig(kind=kind, vocab_size=700)
        list(train_tokenizer([str(place / "text.txt")], place / kind, config=config))
    return place


def run(*words: object, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words], input=input)


def failed(result: Result) -> LlmcliError:
    assert isinstance(result.exception, LlmcliError), result.output
    return result.exception


# ----------------------------------------------------------------------------------------------------------------
# Train


def test_train_writes_a_folder_and_says_what_it_made(llmcli: Run, folder: Path, tmp_path: Path) -> None:
    words = ("tokenizer", "train", folder / "text.txt", "-o", tmp_path / "made", "--vocab-size", "400")
    ended = llmcli(*words, "--special-token", "<|user|>", "--special-token", "<|end|>")
    assert ended.returncode == 0, ended.stderr
    assert "400 tokens" in ended.stdout
    assert "<|endoftext|> <|user|> <|end|>" in ended.stdout
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    again = llmcli(*words)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    assert load_tokenizer(tmp_path / "made").id_of("<|user|>") == 1
    replaced = llmcli(*words, "--overwrite", "--json")
    assert replaced.returncode == 0
    record = json.loads(replaced.stdout)
    assert record["vocab_size"] == 400
    assert record["special_tokens"] == ["<|endoftext|>"]
    assert record["hash"] == load_tokenizer(tmp_path / "made").hash
    assert record["documents"] == 1
    assert 1 < record["bytes_per_token"] < 10
    assert replaced.stderr == ""


def test_training_reports_its_progress(folder: Path, tmp_path: Path) -> None:
    records = list(train_tokenizer([str(folder / "text.txt")], tmp_path / "made"))
    stages = [record.stage for record in records if isinstance(record, Progress)]
    assert set(stages) == {"count", "merge"}
    size = (folder / "text.txt").stat().st_size
    assert next((record.done, record.total) for record in records if isinstance(record, Progress)) == (size, size)
    assert isinstance(records[-1], TrainReport)


def test_stdin_trains_too(tmp_path: Path) -> None:
    result = run("train", "-", "-o", tmp_path / "made", "--kind", "char", input="abba\n")
    assert result.exit_code == 0, result.output
    assert [load_tokenizer(tmp_path / "made").id_of(letter) for letter in "\nab"] == [2, 3, 4]


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        (["nowhere.txt"], None, "no such file"),
        (["text.txt"], b"", "is empty"),
        (["text.txt"], b"abc\xff\xfe\n", "text.txt:1"),
        (["text.txt"], b"\x00\x01\x02\x03" * 100, "binary"),
        (["text.txt", "--vocab-size", "100"], b"abc", "at least 257"),
        (["text.txt", "--special-token", "x"], b"abc", "single character"),
        (["text.jsonl"], b'{"text": "a"}\n{"text": \n', "text.jsonl:2"),
        (["text.jsonl"], b'{"title": "a"}\n', "title"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: list[str], content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(words[0]).write_bytes(content)
    error = failed(
        run("train", *words, "-o", "made", *(["--encoding", "utf-8"] if content == b"abc\xff\xfe\n" else []))
    )
    assert error.exit_code == 2
    assert message in str(error)
    assert "\n" not in str(error)
    assert [path.name for path in tmp_path.iterdir() if path.name != words[0]] == []


def _characters(limits: TokenizerConfig, inputs: list[str], place: Path) -> int:
    *_, report = train_tokenizer(inputs, place, config=limits, overwrite=True)
    assert isinstance(report, TrainReport)
    return report.characters


def test_the_amount_of_text_can_be_limited(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"document {number} " + "word " * 2000}) for number in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    inputs = [str(tmp_path / "rows.jsonl")]
    whole = _characters(TokenizerConfig(), inputs, tmp_path / "made")
    assert _characters(TokenizerConfig(doc_cap=100), inputs, tmp_path / "made") == 5000
    for seed in (0, 1):
        some = _characters(TokenizerConfig(max_chars=100_000, seed=seed), inputs, tmp_path / "made")
        assert 60_000 < some <= 100_000 < whole
    assert _characters(TokenizerConfig(max_chars=10**9), inputs, tmp_path / "made") == whole


def test_the_seed_chooses_the_text_that_is_used(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{number * 7919 % 10007} of them\n" for number in range(20_000)))
    hashes = []
    for seed in (0, 0, 1):
        config = TokenizerConfig(max_chars=50_000, seed=seed, vocab_size=400)
        *_, report = train_tokenizer([str(tmp_path / "text.txt")], tmp_path / "made", config=config, overwrite=True)
        assert isinstance(report, TrainReport)
        hashes.append(report.hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_endless_input_is_read_no_further_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcli.data.readers import Document
    from llmcli.operations import tokenizer as operation

    def endless(*_: object) -> Iterator[Document]:
        while True:
            yield Document("some words and more words\n" * 10_000, "stdin", 1, final=False)

    monkeypatch.setattr(operation, "read_documents", endless)
    config = TokenizerConfig(max_chars=300_000, vocab_size=300)
    *_, report = train_tokenizer(["-"], tmp_path / "made", TextConfig(), config)
    assert isinstance(report, TrainReport)
    assert report.characters == 300_000


# ----------------------------------------------------------------------------------------------------------------
# Encode and decode


@pytest.mark.parametrize(
    "text", ["Hello world\n", "  two  spaces \t\r\n\r\n", "\n", "no end", "é中👩\u0000\u2028x", ""]
)
def test_not_a_byte_of_stdin_is_lost(llmcli: Run, folder: Path, text: str) -> None:
    options = {"text": False}
    encoded = llmcli("tokenizer", "encode", "-t", folder / "bpe", input=text.encode(), **options)
    assert encoded.returncode == 0, encoded.stderr
    assert encoded.stdout.decode() == " ".join(map(str, load_tokenizer(folder / "bpe").encode(text))) + "\n"
    decoded = llmcli("tokenizer", "decode", "-t", folder / "bpe", input=encoded.stdout, **options)
    assert decoded.stdout == text.encode()


def test_what_encode_shows(folder: Path) -> None:
    opened = load_tokenizer(folder / "bpe")
    ids = opened.encode("the 中")
    shown = {name: run("encode", "-t", folder / "bpe", "the 中", *words).stdout for name, words in SHOWN.items()}
    assert shown["ids"] == shown["plain"] == " ".join(map(str, ids)) + "\n"
    assert shown["count"] == f"{len(ids)}\n"
    assert shown["tokens"] == r'"the" " " "\xe4" "\xb8" "\xad"' + "\n"
    assert shown["offsets"].splitlines()[0] == f'{ids[0]}\t0\t3\t"the"'
    assert shown["offsets"].splitlines()[-1] == f'{ids[-1]}\t4\t5\t"\\xad"'
    assert json.loads(shown["json"]) == {"ids": ids, "tokens": ["the", " ", "\\xe4", "\\xb8", "\\xad"]}
    assert json.loads(shown["json count"]) == {"count": len(ids)}
    assert json.loads(shown["json offsets"])["offsets"][0] == [0, 3]


SHOWN = {
    "plain": [],
    "ids": ["--ids"],
    "count": ["--count"],
    "tokens": ["--tokens"],
    "offsets": ["--offsets"],
    "json": ["--json"],
    "json count": ["--json", "--count"],
    "json offsets": ["--json", "--offsets"],
}


def test_lines_are_texts_of_their_own(folder: Path) -> None:
    text = "one\r\n\n two \nthree"
    opened = load_tokenizer(folder / "bpe")
    rows = run("encode", "-t", folder / "bpe", "--lines", "--json", input=text).stdout.splitlines()
    expected = ["one", "", " two ", "three"]
    assert [json.loads(row)["ids"] for row in rows] == [opened.encode(line) for line in expected]
    back = run("decode", "-t", folder / "bpe", input="\n".join(rows)).stdout
    assert back == "".join(f"{line}\n" for line in expected)
    counts = run("encode", "-t", folder / "bpe", "--lines", "--count", input=text).stdout
    assert [int(count) for count in counts.split()] == [len(opened.encode(line)) for line in expected]


def test_special_tokens_of_the_template_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "wordpiece" / "tokenizer.json").read_text("utf-8"))
    added = content["added_tokens"][-1]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": added["content"], "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            added["content"]: {"id": added["content"], "ids": [added["id"]], "tokens": [added["content"]]}
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with_it = run("encode", "-t", tmp_path, "the").stdout.split()
    without = run("encode", "-t", tmp_path, "the", "--no-special").stdout.split()
    assert with_it == [*without, str(added["id"])]
    assert run("decode", "-t", tmp_path, *with_it, "--no-special").stdout == "the"


def test_decode_takes_numbers_and_lists(folder: Path) -> None:
    ids = load_tokenizer(folder / "bpe").encode("the words")
    for words in (map(str, ids), [json.dumps(ids)], [",".join(map(str, ids))], [json.dumps({"ids": ids})]):
        assert run("decode", "-t", folder / "bpe", *words).stdout.strip("\n") == "the words"
    assert json.loads(run("decode", "-t", folder / "bpe", "--json", input=json.dumps(ids)).stdout) == {
        "text": "the words"
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["12", "x3"], "'x3' is not a token id"),
        (["99999"], "the id 99999 is not below 700"),
        (["1.5"], "'1.5' is not a token id"),
        (['{"ids": "1"}'], "list of whole numbers"),
        (['{"idz": [1]}'], '"ids"'),
    ],
)
def test_what_is_no_id_is_refused_by_name(words: list[str], message: str, folder: Path) -> None:
    error = failed(run("decode", "-t", folder / "bpe", *words))
    assert error.exit_code == 2
    assert message in str(error)


def test_ids_are_parsed_wherever_they_stand() -> None:
    assert parse_ids("[1, 2,3]\n4 5") == [1, 2, 3, 4, 5]
    assert parse_ids("") == []


def test_bytes_that_are_no_utf8_are_named_by_their_place(llmcli: Run, folder: Path) -> None:
    ended = llmcli("tokenizer", "encode", "-t", folder / "bpe", input=b"good\nb\xffd", text=False)
    assert ended.returncode == 2
    assert b"<stdin>:2:byte 6" in ended.stderr
    assert ended.stdout == b""


def test_no_text_and_no_pipe_is_a_usage_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcli.cli.tokenizer.stdin_is_piped", lambda: False)
    assert failed(run("encode", "-t", folder / "bpe")).exit_code == 2
    assert failed(run("decode", "-t", folder / "bpe")).exit_code == 2


def test_a_missing_tokenizer_is_one_line(llmcli: Run, tmp_path: Path) -> None:
    for words in (("encode", "-t", tmp_path, "a"), ("decode", "-t", tmp_path, "1"), ("info", tmp_path)):
        ended = llmcli("tokenizer", *words)
        assert ended.returncode == 2
        assert ended.stderr.count("\n") == 1
        assert "holds no tokenizer" in ended.stderr


# ----------------------------------------------------------------------------------------------------------------
# Info


def test_info_compares_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chinese.txt").write_text("我们的国家\n" * 10, "utf-8")
    record = json.loads(run("info", folder / "bpe", folder / "text.txt", tmp_path / "chinese.txt", "--json").stdout)
    assert record["vocab_size"] == 700
    assert record["special_tokens"] == {"<|endoftext|>": 0}
    english, chinese = record["files"]
    assert english["bytes"] == (folder / "text.txt").stat().st_size
    assert english["bytes_per_token"] == english["bytes"] / english["tokens"] > 2
    assert english["tokens_per_word"] == english["tokens"] / english["words"]
    assert 0 <= english["unused_tokens"] < chinese["unused_tokens"] < 700
    assert chinese["tokens_per_word"] == 16  # five characters of three bytes that no merge knows, and the line end
    assert english["round_trip_failures"] == chinese["round_trip_failures"] == 0
    shown = run("info", "-t", folder / "bpe", tmp_path / "chinese.txt").stdout
    assert "bytes per token" in shown
    assert "tiktoken" in shown or "tokenizers" in shown


def test_info_names_what_is_not_given_back(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "the words"}\n{"text": "the  words"}\n{"text": "\\u00ff"}\n', "utf-8"
    )
    record = json.loads(run("info", folder / "wordpiece", tmp_path / "rows.jsonl", "--json").stdout)
    (figures,) = record["files"]
    assert figures["documents"] == 3
    assert figures["round_trip_failures"] == 2
    assert figures["first_failure"] == f"{tmp_path / 'rows.jsonl'}:2"
    assert figures["unknown_tokens"] == 1


def test_info_without_a_tokenizer_is_a_usage_error() -> None:
    assert failed(run("info")).exit_code == 2
