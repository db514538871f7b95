"""`quickstart`: the whole way, from the user's text or from what Python brings, into one folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Run

from llmcli.data.corpus import open_corpus
from llmcli.data.python_text import function_pairs, help_topics, module_docstrings
from llmcli.operations.verify import verify

STAGES = ["tokenizer", "corpus", "model", "curve", "sample", "completion", "chat", "answer", "export", "int4"]
TEXT = "The function returns a list. The function takes a tuple, and the list is sorted.\n" * 400


def test_a_users_file_becomes_a_model_that_writes(llmcli: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(TEXT)
    done = llmcli("quickstart", "notes.txt", "-o", "first", "--seconds", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in (*STAGES[:4], "chat", "export"):
        assert f"\n{stage} " in done.stdout
    assert "The model writes:\nThe " in done.stdout
    assert "It completes 'The func':" in done.stdout
    assert "It was taught what Python's functions do. What does " in done.stdout
    assert "In int4, on onnxruntime, it writes:\nThe " in done.stdout
    made = [("tokenizer", "tokenizer"), ("corpus", "corpus"), ("run", "run"), ("model", "run/model"), ("onnx", "int4")]
    for kind, place in (*made, ("run", "chat"), ("model", "chat/model")):
        verdict = verify(tmp_path / "first" / place, values=True)
        assert (verdict.kind, verdict.problems) == (kind, ())
    assert (tmp_path / "first" / "run" / "loss.svg").read_text().startswith("<?xml")
    for line in done.stdout.splitlines():  # what it says to go on with, works
        if line.startswith("  llmcli info"):
            assert llmcli(*line.split()[1:], cwd=tmp_path).returncode == 0


def test_as_json_it_is_a_record_a_stage_and_an_output_that_exists_is_refused(llmcli: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(TEXT)
    words = ("quickstart", "notes.txt", "-o", "first", "--seconds", 5, "--json")
    done = llmcli(*words, cwd=tmp_path)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["stage"] for record in records] == STAGES
    assert all(set(record) == {"stage", "seconds", "made", "figures"} for record in records)
    assert records[2]["figures"]["parameters"] > 10**5
    taught, answered = (record["figures"] for record in records[-4:-2])
    questions = [json.loads(line) for line in (tmp_path / "first" / "functions.jsonl").read_text("utf-8").splitlines()]
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
    again = llmcli(*words, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert "--overwrite" in json.loads(again.stderr)["error"]["message"]


def test_without_text_the_corpus_is_what_python_brings(tmp_path: Path) -> None:
    """Up to the corpus: the rest is as with a user's text."""
    from llmcli.operations.quickstart import StageDone, quickstart

    for record in quickstart([], tmp_path / "first", seconds=5):
        if isinstance(record, StageDone) and record.stage == "corpus":
            break
    texts = [json.loads(line)["text"] for line in (tmp_path / "first" / "text.jsonl").read_text("utf-8").splitlines()]
    assert texts == [*help_topics(), *module_docstrings()]
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
    words = [sys.executable, "-m", "llmcli", "quickstart", "notes.txt", "-o", "first", "--seconds", "300"]
    with subprocess.Popen(
        words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = tmp_path / "first" / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, complaint = process.communicate(timeout=90)
    assert process.returncode == code
    assert "Traceback" not in complaint
    assert "first/run is saved" in complaint.splitlines()[-1]
    assert verify(tmp_path / "first" / "run").ok
