"""`quickstart`: the whole way, from the user's text or from what Python brings, into one folder."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Run
from forked import Life, completed, until

from llmcli.data import python_text
from llmcli.data.corpus import open_corpus
from llmcli.data.python_text import function_pairs, help_topics, module_docstrings
from llmcli.operations.verify import verify

STAGES = ["tokenizer", "corpus", "model", "curve", "sample", "completion", "chat", "answer", "export", "int4"]
TEXT = "The function returns a list. The function takes a tuple, and the list is sorted.\n" * 400


WORDS = ("quickstart", "notes.txt", "-o", "first", "--seconds", 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a whole run under --json, and its records: the one whole run of these tests."""
    place = tmp_path_factory.mktemp("quickstart")
    (place / "notes.txt").write_text(TEXT)
    done = completed(*WORDS, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    return place, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_users_file_becomes_a_model_that_writes(
    whole: tuple[Path, list[dict[str, Any]]], llmcli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run is shown as: the command has the run's own records, told once more."""
    from llmcli.cli.quickstart import quickstart as command
    from llmcli.operations import quickstart as operation

    place, records = whole
    monkeypatch.chdir(place)
    monkeypatch.setattr(
        operation, "quickstart", lambda *_words, **_settings: (operation.StageDone(**record) for record in records)
    )
    done = CliRunner().invoke(command, list(map(str, WORDS[1:])), catch_exceptions=False)
    assert done.exit_code == 0
    for stage in STAGES:
        assert re.search(rf"^{stage} +.*\(\d+\.\d s\)$", done.stderr, re.MULTILINE)
    for stage in (*STAGES[:4], "chat", "export"):
        assert f"\n{stage} " in done.stdout
    assert "The model writes:\nThe " in done.stdout
    assert "It completes 'The func':" in done.stdout
    assert "It was taught what Python's functions do. What does " in done.stdout
    assert "In int4, on onnxruntime, it writes:\nThe " in done.stdout
    made = [("tokenizer", "tokenizer"), ("corpus", "corpus"), ("run", "run"), ("model", "run/model"), ("onnx", "int4")]
    for kind, name in (*made, ("run", "chat"), ("model", "chat/model")):
        verdict = verify(place / "first" / name, values=True)
        assert (verdict.kind, verdict.problems) == (kind, ())
    assert (place / "first" / "run" / "loss.svg").read_text().startswith("<?xml")
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("  llmcli info")]
    assert told
    for line in told:  # what it says to go on with, works
        assert llmcli(*line[1:], cwd=place).returncode == 0


def test_as_json_it_is_a_record_a_stage_and_an_output_that_exists_is_refused(
    whole: tuple[Path, list[dict[str, Any]]], llmcli: Run
) -> None:
    place, records = whole
    assert [record["stage"] for record in records] == STAGES
    assert all(set(record) == {"stage", "seconds", "made", "figures"} for record in records)
    assert records[2]["figures"]["parameters"] > 10**5
    taught, answered = (record["figures"] for record in records[-4:-2])
    questions = [json.loads(line) for line in (place / "first" / "functions.jsonl").read_text("utf-8").splitlines()]
    assert taught["examples"] == len(questions) == 200
    assert taught["steps"] > 0
    assert taught["loss"] > 0
    assert answered["question"] in [each["instruction"] for each in questions]
    assert set(answered) == {"question", "text", "tokens"}
    exported = records[-2]["figures"]
    assert exported["int4_bytes"] < exported["model_bytes"] / 2
    assert -20 < exported["perplexity_increase_percent"] < 20
    assert min(exported["tokens_per_second_before"], exported["tokens_per_second_after"]) > 0
    assert records[-1]["figures"]["tokens"] > 0
    again = llmcli(*WORDS, "--json", cwd=place)
    assert (again.returncode, again.stdout) == (2, "")
    assert "--overwrite" in json.loads(again.stderr)["error"]["message"]


def test_without_text_the_corpus_is_what_python_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the corpus: the rest is as with a user's text. The docstrings are found once: parsing takes seconds."""
    from llmcli.operations.quickstart import StageDone, quickstart

    docstrings = list(module_docstrings())
    monkeypatch.setattr(python_text, "module_docstrings", lambda: iter(docstrings))
    for record in quickstart([], tmp_path / "first", seconds=5):
        if isinstance(record, StageDone) and record.stage == "corpus":
            break
    texts = [json.loads(line)["text"] for line in (tmp_path / "first" / "text.jsonl").read_text("utf-8").splitlines()]
    assert texts == [*help_topics(), *docstrings]
    assert sum(map(len, texts)) > 10**6
    corpus = open_corpus(tmp_path / "first" / "corpus")
    assert corpus.val_tokens > 1000
    assert corpus.train_documents + corpus.val_documents == len(texts)


def test_functions_are_told_by_their_signature_and_a_whole_sentence() -> None:
    pairs = dict(function_pairs())
    assert pairs["posixpath.basename(p)"] == "Returns the final component of a pathname."
    for signature, sentence in pairs.items():
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert max(len(signature), len(sentence)) <= 120
        assert "\n" not in signature + sentence


def test_text_that_is_none_leaves_what_was_there(llmcli: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = llmcli("quickstart", "empty.txt", "-o", "new", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "Error: empty.txt: is empty\n")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old" / "run").mkdir(parents=True)
    (tmp_path / "old" / "run" / "kept.txt").write_text("mine")
    assert llmcli("quickstart", "empty.txt", "-o", "old", "--overwrite", cwd=tmp_path).returncode == 2
    assert [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "old").rglob("*")] == [
        "old/run",
        "old/run/kept.txt",
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training_saves_the_run(tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "notes.txt").write_text(TEXT)
    no_compiler = {"PATH": ""}
    life = Life("quickstart", "notes.txt", "-o", "first", "--seconds", 300, cwd=tmp_path, environment=no_compiler)
    metrics = tmp_path / "first" / "run" / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.stat().st_size, life)
    life.signal(number)
    assert life.wait() == code
    assert "Traceback" not in life.stderr
    assert "first/run is saved" in life.stderr.splitlines()[-1]
    assert verify(tmp_path / "first" / "run").ok
