"""`llmcli data prepare` and `data check`, as a user runs them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT, Run
from small_tokenizer import make_tokenizer

from llmcli.cli.data import data
from llmcli.data.corpus import open_corpus

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a tokenizer in it."""
    monkeypatch.chdir(tmp_path)
    make_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def run(*words: str, code: int = 0, **details: object) -> str:
    """stdout of a command in this process; the error's text where one was raised."""
    found = CliRunner().invoke(data, list(words), **details)  # type: ignore[arg-type]
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        assert getattr(found.exception, "exit_code", None) == code, repr(found.exception)
        return str(found.exception)
    assert found.exit_code == code, found.output
    return found.stdout


PREPARE = ("-t", "tokenizer", "-o", "corpus")


def notes(place: Path) -> str:
    text = "".join(f"Note {number}: write to {number}@example.org.\n" for number in range(200))
    (place / "notes.txt").write_text(text)
    return text


def test_prepare_says_what_it_made(place: Path) -> None:
    text = notes(place)
    shown = run("prepare", "notes.txt", *PREPARE, "--scrub-pii")
    corpus = open_corpus("corpus")
    assert f"{corpus.train_tokens:,} tokens" in shown
    assert "200 EMAIL" in shown
    assert "the tail, from notes.txt:1" in shown
    assert corpus.train_bytes + corpus.val_bytes < len(text)
    record = json.loads(run("prepare", "notes.txt", *PREPARE, "--overwrite", "--split-on", "line", "--json", obj=None))
    assert set(record) == {
        *("corpus", "hash", "tokenizer_hash", "vocab_size", "dtype", "split", "split_place"),
        *("train_tokens", "train_bytes", "train_documents", "val_tokens", "val_bytes", "val_documents"),
        *("train_sentences", "dropped", "pii", "replaced", "sources", "encodings", "skipped"),
        *("engine", "workers", "input_bytes", "seconds"),
    }
    assert record["train_documents"] + record["val_documents"] == 200
    assert record["split"] == "hash"
    assert record["hash"] == open_corpus("corpus").hash
    shown = run("prepare", "notes.txt", *PREPARE, "--overwrite", "--sentences", "--val-fraction", "0")
    assert "1 document and 200 sentences of theirs" in shown


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (b"", (), "a.jsonl: is empty"),
        (b'{"text": "a"}\n{"text": }\n', (), "a.jsonl:2:10: is not valid JSON: Expecting value"),
        (b'{"text": "a"}\n{"body": "b"}\n', (), "a.jsonl:2: field 'text' is missing; found: 'body'"),
        (b'{"text": "\xff"}', ("--encoding", "utf-8"), "a.jsonl:1:byte 10: is not valid utf-8"),
        (b'{"text": "a"}', ("--encoding", "martian"), "there is no encoding 'martian'"),
        (gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-4], (), "a.jsonl: its gzip data end early"),
        (b'{"text": "  "}', (), "no text is left: 1 empty"),
        (b'{"text": "a b"}', ("--min-chars", "9"), "no text is left: 1 short"),
        (b'{"text": "a"}', ("--val-fraction", "2"), "val_fraction: must be at most 0.9"),
        (b'{"text": "a"}', ("-t", "nowhere"), "nowhere"),
        (b'{"text": "a"}', ("-o", "taken"), "taken: exists already"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(
    place: Path, content: bytes, words: tuple[str, ...], message: str
) -> None:
    (place / "a.jsonl").write_bytes(content)
    (place / "taken").mkdir()
    (place / "taken" / "mine.txt").write_text("mine")
    shown = run("prepare", "a.jsonl", *PREPARE, *words, code=2)
    assert message in shown
    assert "\n" not in shown
    assert sorted(path.name for path in place.iterdir()) == ["a.jsonl", "taken", "tokenizer"]
    assert [path.name for path in (place / "taken").iterdir()] == ["mine.txt"]


def test_the_whole_command_in_a_process(place: Path, llmcli: Run) -> None:
    notes(place)
    lines = [{"text": line} for line in (place / "notes.txt").read_text().splitlines()]
    piped = "".join(json.dumps(line) + "\n" for line in lines)
    done = llmcli("data", "prepare", "-", *PREPARE, "--json", cwd=place, input=piped)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["train_documents"] > 150
    assert sorted(path.name for path in place.iterdir()) == ["corpus", "notes.txt", "tokenizer"]
    assert llmcli("verify", "corpus", cwd=place).returncode == 0

    done = llmcli("data", "prepare", "nothing.txt", "-t", "tokenizer", "-o", "other", cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: nothing.txt: no such file or folder\n"
    closed = f"exec {sys.executable} -m llmcli data prepare - -t tokenizer -o other <&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(closed, shell=True, capture_output=True, text=True, cwd=place, env=environment)
    assert (done.returncode, done.stderr) == (2, "Error: <stdin>: is closed\n")
    done = llmcli("data", "prepare", "notes.txt", *PREPARE, "--json", cwd=place)
    assert (done.returncode, json.loads(done.stderr)["error"]["kind"]) == (2, "usage")


def test_the_settings_file_and_an_unknown_key(place: Path) -> None:
    notes(place)
    (place / "corpus.toml").write_text('split_on = "line"\nval_fraction = 0.2\n')
    record = json.loads(run("prepare", "notes.txt", *PREPARE, "-c", "corpus.toml", "--json"))
    assert record["train_documents"] + record["val_documents"] == 200
    (place / "corpus.toml").write_text("val_fractoin = 0.2\n")
    shown = run("prepare", "notes.txt", *PREPARE, "-c", "corpus.toml", code=2)
    assert "unknown key 'val_fractoin'; did you mean val_fraction?" in shown


@pytest.mark.skipif(not hasattr(os, "setuid") or os.name != "posix", reason="needs limits of POSIX")
def test_a_full_disk_leaves_nothing(place: Path, llmcli: Run) -> None:
    (place / "long.txt").write_text("Some text that goes on. " * 200_000)
    done = llmcli("data", "prepare", "long.txt", *PREPARE, "--workers", 1, cwd=place, limit=200_000)
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == ["long.txt", "tokenizer"]


# ----------------------------------------------------------------------------------------------------------------
# check


def test_check_reports_every_kind_with_its_place(place: Path) -> None:
    lines = ["a", "b", "", "a", "x" * 1_100_000]
    (place / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines) + "{oops\n")
    (place / "old.txt").write_bytes(("plain " * 30 + "café").encode("cp1252"))
    shown = run("check", "a.jsonl", "old.txt", "--min-chars", "2", code=3)
    for line in (
        "a.jsonl:3: is empty",
        "a.jsonl:1: has 1 characters",
        "a.jsonl:5: has 1,100,000 characters",
        "problem: a.jsonl:6:2: is not valid JSON",
        "prepare would drop: 1 empty, 3 short",
    ):
        assert line in shown
    assert "cp1252" in shown
    found = json.loads(run("check", "a.jsonl", "--json", code=3))
    assert (found["ok"], found["documents"], found["duplicates"], found["problem_count"]) == (False, 5, 1, 1)
    assert {"where": "a.jsonl:4", "what": "is equal to an earlier document"} in found["places"]
    assert (found["shortest"], found["longest"], found["very_long"]) == (0, 1_100_000, 1)
    assert found["files"][0] == {
        "name": "a.jsonl",
        "format": "jsonl",
        "compression": "",
        "encoding": "utf-8",
        "bytes": (place / "a.jsonl").stat().st_size,
        "documents": 5,
        "replaced": 0,
    }


def test_check_of_sound_files_exits_with_0(place: Path) -> None:
    notes(place)
    (place / "texts").mkdir()
    (place / "texts" / "a.csv.gz").write_bytes(gzip.compress(b"id,text\n1,hello\n"))
    shown = run("check", "texts", "notes.txt")
    assert "csv+gzip" in shown
    assert "prepare would drop: nothing" in shown
    assert "prepare would drop: 1 short" in run("check", "texts", "notes.txt", "--min-chars", "6")
    assert "nothing.txt: no such file" in run("check", "nothing.txt", code=2)


@needs_data
def test_real_data(place: Path) -> None:
    for words, documents in (
        (("chinese_poetry", "--text-field", "paragraphs"), 3000),
        (("c4_demo",), 300),
        (("sst2/*.tsv", "--text-field", "1"), 9613),
        (("ag_news/*.csv", "--text-field", "3"), 7600),
        (("state_union",), 66),
        (("blns",), 516),
        (("enterprise_pii", "--text-field", "query"), 1000),
    ):
        name, *options = words
        found = json.loads(run("check", str(DATA / name), *options, "--json"))
        assert (found["documents"], found["problems"]) == (documents, []), name
    record = json.loads(run("prepare", str(DATA / "state_union"), *PREPARE, "--scrub-pii", "--json"))
    assert (record["encodings"], record["train_documents"] + record["val_documents"]) == ({"cp1252": 6}, 66)
