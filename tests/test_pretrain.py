"""`pretrain`: what a run makes, that a stopped one goes on bit for bit, and that nothing is lost when it goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from forked import Life, run, until
from small_run import fingerprint, make_corpus, metrics, text, tiny, tree, words
from small_tokenizer import make_tokenizer

from llmcli.config import PretrainConfig, TextConfig
from llmcli.data.corpus import open_corpus
from llmcli.errors import DataError, LlmcliError, UsageError
from llmcli.files import atomic
from llmcli.files.manifest import manifest_problems, read_manifest
from llmcli.models.folder import load_model
from llmcli.operations.inspect import describe
from llmcli.operations.pretrain import plan_pretraining, pretrain
from llmcli.operations.training_run import Started
from llmcli.operations.verify import verify
from llmcli.training.batches import TokenWindows
from llmcli.training.loop import TrainingEvent


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here cuts the power, so nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _handle: None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of eleven steps an epoch; its tokenizer and its text lie beside it."""
    return make_corpus(tmp_path_factory.mktemp("corpora") / "corpus")


@pytest.fixture
def place(tmp_path: Path, corpus: Path) -> Path:
    """A folder to run commands in, with a corpus, a tokenizer and a text."""
    shutil.copytree(corpus.parent, tmp_path / "here")
    return tmp_path / "here"


def go(data: Path, at: Path, config: PretrainConfig | None = None, **details: Any) -> list[TrainingEvent]:
    """A whole run; its training events."""
    found = list(pretrain(data, at, config or tiny(), **details))
    return [record for record in found if isinstance(record, TrainingEvent)]


def until_step(step: int, data: Path, at: Path, config: PretrainConfig | None = None, **details: Any) -> None:
    """A run that is asked to stop after a step, as a signal does."""
    events = [TrainingEvent("", 0, 0)]
    for record in pretrain(data, at, config or tiny(), stopping=lambda: events[-1].step >= step, **details):
        if isinstance(record, TrainingEvent):
            events.append(record)
    assert (events[-1].event, events[-1].reason, events[-1].step) == ("end", "stopped", step)


def problems(path: Path) -> list[str]:
    return list(verify(path).problems)


# ----------------------------------------------------------------------------------------------------------------
# What a run makes

MODEL_FILES = {
    *("config.json", "generation_config.json", "manifest.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2", "mistral", "gpt2"])
def test_a_corpus_becomes_a_model_that_transformers_opens(
    tmp_path: Path, corpus: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    at = tmp_path / "run"
    events = go(corpus, at, tiny(family=family))
    assert [event.step for event in events if event.event == "step"] == list(range(1, 13))
    found = set(tree(at))
    expected = {"", ".lock", "config.toml", "metrics.jsonl", "checkpoints", "model"}
    expected |= {f"model/{name}" for name in MODEL_FILES}
    for step in (9, 12):
        folder = f"checkpoints/step-{step:08d}"
        expected |= {folder, *(f"{folder}/{name}" for name in (*MODEL_FILES, "optimizer.safetensors", "state.json"))}
    assert found == expected
    assert problems(at) == []

    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = AutoModelForCausalLM.from_pretrained(at / "model").eval()
    assert opened.config.model_type == family
    tokenizer = AutoTokenizer.from_pretrained(at / "model")
    ids = torch.tensor([tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"][:16]])
    with torch.no_grad():
        theirs = opened(ids).logits
        ours = load_model(at / "model")(ids)
    assert (theirs - ours).abs().max() <= 1e-4
    losses = [event.loss for event in events if event.event == "validation" and event.loss is not None]
    assert losses[-1] < losses[0] < math.log(800) + 0.1


def test_config_toml_holds_every_setting_and_makes_the_same_run_again(place: Path) -> None:
    changes = {"optimizer": "adamw", "grad_accumulation": 2}
    given = PretrainConfig(layers=2, hidden_size=32, heads=2, context=16, batch_size=4, threads=1, **changes)  # type: ignore[arg-type]
    given = dataclasses.replace(given, max_steps=4, weight_decay=0.1, compile="off", eval_every=2, save_every=4)
    go(place / "corpus", place / "first", given)
    values = tomllib.loads((place / "first" / "config.toml").read_text())
    fields = {field.name for kind in (PretrainConfig, TextConfig) for field in dataclasses.fields(kind)}
    assert fields - set(values) == {"preset", "tokenizer", "max_tokens", "epochs", "max_seconds"}
    assert values["data"] == [str(place / "corpus")]
    settled = "layers kv_heads ffn_size vocab_size learning_rate embedding_learning_rate eval_tokens warmup_steps"
    assert [values[name] for name in settled.split()] == [2, 2, 96, 800, 0.002, 0.002, 65536, 10]
    given_ones = "weight_decay optimizer grad_accumulation threads device compile"
    assert [values[name] for name in given_ones.split()] == [0.1, "adamw", 2, 1, "cpu", "off"]
    assert values["precision"] in ("float32", "bfloat16")
    again = run("pretrain", "-c", "first/config.toml", "-o", "second", cwd=place)
    assert again.stdout == "second/model\n"
    assert fingerprint(place / "second") == fingerprint(place / "first")


def test_the_metrics_tell_the_run(tmp_path: Path, corpus: Path) -> None:
    events = go(corpus, tmp_path / "run", tiny(max_steps=4))
    assert [(line["event"], line["step"]) for line in metrics(tmp_path / "run")] == [
        *[("step", 1), ("step", 2), ("validation", 2), ("step", 3), ("checkpoint", 3)],
        *[("step", 4), ("validation", 4), ("checkpoint", 4), ("end", 4)],
    ]
    for line, event in zip(metrics(tmp_path / "run"), events, strict=True):
        assert line == {key: value for key, value in dataclasses.asdict(event).items() if value is not None}
    step = metrics(tmp_path / "run", "step")[0]
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "elapsed_seconds"} <= set(step)
    assert step["tokens"] == 64
    checked = metrics(tmp_path / "run", "validation")[0]
    assert checked["bits_per_byte"] > 0
    # Bits a byte are nats a token by the bytes of the tokens.
    val = open_corpus(corpus)
    assert checked["bits_per_byte"] == pytest.approx(
        checked["loss"] / math.log(2) * val.val_tokens / val.val_bytes, rel=0.15
    )


def test_the_manifest_says_where_a_model_comes_from(tmp_path: Path, corpus: Path) -> None:
    go(corpus, tmp_path / "run", tiny(seed=7))
    opened = open_corpus(corpus)
    for folder in ("model", "checkpoints/step-00000012"):
        lineage = read_manifest(tmp_path / "run" / folder)["lineage"]
        assert (lineage["corpus"], lineage["tokenizer"]) == (opened.hash, opened.tokenizer_hash)
        assert (lineage["seed"], lineage["parent"]) == (7, None)
        assert {"llmcli", "torch", "python"} <= set(lineage)


def test_the_seed_alone_makes_runs_differ(tmp_path: Path, corpus: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        go(corpus, tmp_path / name, tiny(seed=seed, max_steps=3))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a")["weights"] != fingerprint(tmp_path / "c")["weights"]


def test_plain_text_becomes_a_model_in_one_command(place: Path, llmcli: Run) -> None:
    """In a process of its own, from the shell's point of view."""
    (place / "more.txt").write_text(text(9000)[3000:])
    command = ["pretrain", "corpus.txt", "more.txt", "-o", "runs/first", *words(max_steps=4, vocab_size=400)]
    done = llmcli(*command, cwd=place)
    assert (done.returncode, done.stdout) == (0, "runs/first/model\n"), done.stderr
    at = place / "runs" / "first"
    assert {path.name for path in at.iterdir()} == {
        *("config.toml", "metrics.jsonl", "checkpoints", "model", "tokenizer", "corpus", ".lock")
    }
    assert problems(at) == problems(at / "corpus") == problems(at / "tokenizer") == []
    model = json.loads((at / "model" / "config.json").read_text())
    assert model["vocab_size"] == open_corpus(at / "corpus").vocab_size == 400
    assert tomllib.loads((at / "config.toml").read_text())["data"] == ["corpus.txt", "more.txt"]
    for line in ("model      qwen3", "machine    cpu, 1 thread, float32", "length     4 steps, 256 tokens"):
        assert line in done.stderr
    assert "\n4 steps, 256 tokens;" in done.stderr
    assert "\x1b" not in done.stderr

    before = tree(at)
    again = run(*command, "--resume", cwd=place)  # the same command once more: there is nothing to do
    assert "resumed    from step 4" in again.stderr
    changed = {name for name, digest in tree(at).items() if before.get(name) != digest}
    assert changed == {"metrics.jsonl"}
    assert metrics(at)[-1]["event"] == "end"


def test_a_tokenizer_that_is_given_is_used(place: Path) -> None:
    run("pretrain", "corpus.txt", "-o", "run", "--tokenizer", "tokenizer", *words(max_steps=2), cwd=place)
    assert not (place / "run" / "tokenizer").exists()
    assert open_corpus(place / "run" / "corpus").tokenizer_hash == open_corpus(place / "corpus").tokenizer_hash


def test_without_validation_the_last_weights_are_the_result(place: Path) -> None:
    run("pretrain", "corpus.txt", "-o", "run", "--val-fraction", "0", *words(max_steps=5, vocab_size=300), cwd=place)
    assert metrics(place / "run", "validation") == []
    found = fingerprint(place / "run")
    assert (found["result"], found["result_step"]) == (found["weights"], 5)


def test_a_dry_run_prints_the_plan_and_makes_nothing(place: Path) -> None:
    before = tree(place)
    for data in ("corpus", "corpus.txt"):
        shown = run("pretrain", data, "-o", "run", "--dry-run", *words(), cwd=place)
        lines = [line.split()[0] for line in shown.stdout.splitlines()]
        assert lines == ["model", "machine", "length", "memory", "work", "disk"]
        assert "12 steps, 768 tokens" in shown.stdout
        assert shown.stderr == ""
    found = json.loads(run("pretrain", "corpus", "-o", "run", "--dry-run", "--json", *words(), cwd=place).stdout)
    plan = plan_pretraining(place / "corpus", tiny()).plan
    assert found == {**dataclasses.asdict(plan), "memory_bytes": plan.memory_bytes}
    assert found["parameters"] == sum(tensor.numel() for tensor in _weights(place).values())
    shutil.rmtree(place / "made")
    assert tree(place) == before


def _weights(place: Path) -> dict[str, torch.Tensor]:
    go(place / "corpus", place / "made", tiny(max_steps=1))
    return dict(load_model(place / "made" / "model").named_parameters())


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": None, "max_tokens": 200}, 4),
        ({"max_steps": None, "epochs": 0.5}, 6),
        ({"max_steps": 5, "epochs": 9.0, "max_tokens": 10**6}, 5),
    ],
)
def test_the_run_is_as_long_as_was_asked(tmp_path: Path, corpus: Path, length: dict[str, Any], steps: int) -> None:
    events = go(corpus, tmp_path / "run", tiny(**length))
    assert (events[-1].reason, events[-1].step, events[-1].tokens) == ("steps", steps, 64 * steps)


@pytest.mark.parametrize(
    "setting",
    [{"kind": "char"}, {"val_fraction": 0.3}, {"val_by": "tail"}, {"split_on": "line"}, {"errors": "replace"}],
)
def test_a_setting_of_text_is_refused_where_data_is_a_corpus(
    tmp_path: Path, corpus: Path, setting: dict[str, Any]
) -> None:
    (name,) = setting
    of_text = name in {field.name for field in dataclasses.fields(TextConfig)}
    config, reading = (tiny(), TextConfig(**setting)) if of_text else (tiny(**setting), TextConfig())
    with pytest.raises(UsageError, match=f"^{name}: .* leave it out"):
        next(pretrain(corpus, tmp_path / "run", config, reading))
    with pytest.raises(UsageError, match=f"^{name}: "):
        plan_pretraining(corpus, config, reading)
    assert not (tmp_path / "run").exists()


def test_a_run_in_seconds_ends_by_the_clock_and_validates_at_the_end(tmp_path: Path, corpus: Path) -> None:
    events = go(corpus, tmp_path / "run", tiny(max_steps=None, max_seconds=0.3, eval_every=10_000, save_every=10_000))
    assert [event.event for event in events[-3:]] == ["validation", "checkpoint", "end"]
    assert events[-1].reason == "seconds"
    assert events[-1].elapsed_seconds >= 0.3
    assert all(event.total_steps is None for event in events)
    again = go(corpus, tmp_path / "run", tiny(max_steps=None, max_seconds=0.3), resume="auto")
    assert [event.event for event in again] == ["end"]


# ----------------------------------------------------------------------------------------------------------------
# Which checkpoints stay


@pytest.mark.parametrize(("limit", "kept"), [(1, [12]), (2, [9, 12]), (3, [6, 9, 12]), (0, [3, 6, 9, 12])])
def test_so_many_checkpoints_stay_the_newest(tmp_path: Path, corpus: Path, limit: int, kept: list[int]) -> None:
    go(corpus, tmp_path / "run", tiny(save_total_limit=limit))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in kept
    ]


def test_the_best_stays_when_later_ones_are_worse(tmp_path: Path) -> None:
    """What is trained on is all `a`, what is held out all `b`: it only gets worse."""
    corpus = make_corpus(tmp_path / "corpus", "a\n" * 2000 + "b\n" * 500, val_by="tail")
    often = {"save_total_limit": 1, "eval_every": 1, "save_every": 1, "max_steps": 10}
    config = tiny(**often, learning_rate=0.05, embedding_learning_rate=0.05, warmup_steps=0)
    events = go(corpus, tmp_path / "run", config)
    checked = [event for event in events if event.event == "validation"]
    best = min(checked, key=lambda event: event.loss or 0.0)
    assert best.step < 6
    found = fingerprint(tmp_path / "run")
    assert (found["checkpoint"], found["result_step"]) == ("step-00000010", best.step)
    assert (found["state"]["best_step"], found["state"]["best_loss"]) == (best.step, best.loss)
    assert found["result"] != found["weights"]

    config = dataclasses.replace(config, patience=3)
    events = go(corpus, tmp_path / "patient", config)
    assert (events[-1].reason, events[-1].step) == ("patience", best.step + 3)
    assert go(corpus, tmp_path / "patient", config, resume="auto")[-1].step == best.step + 3


def test_an_old_checkpoint_loses_its_name_before_its_files(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off in the middle of a removal there must not be half a checkpoint under its name."""

    def cut_off(folder: Path, **_details: object) -> None:
        (Path(folder) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("llmcli.files.atomic.shutil.rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        go(corpus, tmp_path / "run", tiny(save_total_limit=1, eval_every=100))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000006"]
    assert problems(tmp_path / "run") == []


# ----------------------------------------------------------------------------------------------------------------
# Going on, bit for bit

VARIANTS = [
    pytest.param({}, id="muon"),
    pytest.param({"optimizer": "adamw", "weight_decay": 0.1, "grad_accumulation": 2}, id="adamw-accumulated"),
    pytest.param({"grad_accumulation": 4, "family": "gpt2", "tie_embeddings": False}, id="muon-gpt2-accumulated"),
    pytest.param({"precision": "bfloat16"}, id="muon-bfloat16"),
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, corpus: Path, changes: dict[str, Any]) -> None:
    """k: the first step, steps that save and their neighbours, an epoch's edge, the last step but one, the last."""
    config = tiny(**changes)
    per_epoch = TokenWindows(open_corpus(corpus).train(), context=16, batch_size=4, seed=0).per_epoch
    edge = per_epoch // 4
    assert 6 < edge < 12
    go(corpus, tmp_path / "straight", config)
    expected = fingerprint(tmp_path / "straight")
    for step in sorted({1, 2, 3, 4, edge, edge + 1, 11, 12}):
        at = tmp_path / f"stopped-{step}"
        until_step(step, corpus, at, config)
        assert problems(at) == []
        go(corpus, at, config, resume="auto")
        assert fingerprint(at) == expected, step
        shutil.rmtree(at)


@pytest.mark.parametrize("changes", VARIANTS[:2])
def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint_bit_for_bit(
    tmp_path: Path, corpus: Path, changes: dict[str, Any]
) -> None:
    """Nothing is saved when the reader of the records goes away: what came after the checkpoint is done again."""
    config = tiny(**changes)
    go(corpus, tmp_path / "straight", config)
    expected = fingerprint(tmp_path / "straight")
    count = len(metrics(tmp_path / "straight"))
    at = tmp_path / "cut"
    for place in range(0, count, 2):
        records = pretrain(corpus, at, config, resume="auto")
        seen = 0
        for record in records:
            seen += isinstance(record, TrainingEvent)
            if seen > place % 5 + 1:
                break
        records.close()
    go(corpus, at, config, resume="auto")
    assert fingerprint(at) == expected


def test_many_stops_leave_the_same_lines_in_the_metrics(tmp_path: Path, corpus: Path) -> None:
    go(corpus, tmp_path / "straight")
    for step in range(1, 13):
        until_step(step, corpus, tmp_path / "run", resume="auto")
    go(corpus, tmp_path / "run", resume="auto")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "straight")
    assert [line["reason"] for line in metrics(tmp_path / "run", "end")] == ["stopped"] * 12 + ["steps"]


def test_auto_begins_anew_where_there_is_nothing(tmp_path: Path, corpus: Path) -> None:
    go(corpus, tmp_path / "straight", tiny(max_steps=3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / ".lock").touch()
    (tmp_path / "early" / ".config.toml.tmp-999999999-0").write_text("half a se")  # killed before its first file
    # In a container each process may be number 7: what the one before left is no work of this one.
    (tmp_path / "early" / f".config.toml.tmp-{os.getpid()}-0123456789abcdef").write_text("half a se")
    for name in ("absent", "empty", "early"):
        go(corpus, tmp_path / name, tiny(max_steps=3), resume="auto")
        assert fingerprint(tmp_path / name) == fingerprint(tmp_path / "straight")
        assert not [path for path in tree(tmp_path / name) if ".tmp-" in path]
    for record in (records := pretrain(corpus, tmp_path / "begun", tiny(max_steps=3))):
        if isinstance(record, Started):
            records.close()  # as a kill before the first checkpoint
    go(corpus, tmp_path / "begun", tiny(max_steps=3), resume="auto")
    assert fingerprint(tmp_path / "begun") == fingerprint(tmp_path / "straight")


def test_auto_never_begins_among_somebody_s_files(tmp_path: Path, corpus: Path) -> None:
    """A folder with a model/ of one's own, and --resume: it would have been taken for the run's and replaced."""
    mine = tmp_path / "project"
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "weights.bin").write_text("mine")
    before = tree(mine)
    with pytest.raises(UsageError, match=r"is no run that could be gone on with: it has no config\.toml"):
        go(corpus, mine, resume="auto")
    with pytest.raises(UsageError, match="exists already"):
        go(corpus, mine)
    assert tree(mine) == before


def test_metrics_that_end_in_garbage_are_cut_to_what_is_sound(tmp_path: Path, corpus: Path) -> None:
    go(corpus, tmp_path / "straight")
    for number, garbage in enumerate(
        (b'{"event": "step", "st', b"5\n", b"[]\n", b"\xff\n", b"[" * 9999 + b"\n", b"\n")
    ):
        at = tmp_path / f"run-{number}"
        until_step(6, corpus, at)
        with open(at / "metrics.jsonl", "ab") as file:
            file.write(garbage)
        go(corpus, at, resume="auto")
        assert fingerprint(at) == fingerprint(tmp_path / "straight")
    (at / "metrics.jsonl").unlink()
    go(corpus, at, tiny(max_steps=13), resume="auto")
    assert [line["step"] for line in metrics(at, "step")] == [13]


def test_a_corpus_inside_the_run_that_was_damaged_is_made_again(place: Path) -> None:
    command = ["pretrain", "corpus.txt", "-o", "run", *words(vocab_size=300)]
    run(*command, cwd=place)
    shutil.copytree(place / "run", place / "straight")
    shutil.rmtree(place / "run" / "checkpoints" / "step-00000012")
    flip(place / "run" / "corpus" / "train-00000.npy")
    run(*command, "--resume", cwd=place)
    assert fingerprint(place / "run") == fingerprint(place / "straight")
    assert tree(place / "run" / "corpus") == tree(place / "straight" / "corpus")
    (place / "corpus.txt").unlink()  # once the corpus is made its text may go ...
    run(*command, "--resume", "--max-steps", "13", cwd=place)
    (place / "corpus.txt").write_text(text(2300))  # ... and it may not change
    flip(place / "run" / "corpus" / "train-00000.npy")
    refused(*command, "--resume", cwd=place, message="was trained on another corpus (")


def test_a_run_can_go_on_elsewhere_from_another_s_checkpoint(tmp_path: Path, corpus: Path) -> None:
    go(corpus, tmp_path / "first", tiny(save_total_limit=0))
    checkpoint = str(tmp_path / "first" / "checkpoints" / "step-00000006")
    before = tree(tmp_path / "first")
    go(corpus, tmp_path / "second", resume=checkpoint)
    ours, theirs = fingerprint(tmp_path / "second"), fingerprint(tmp_path / "first")
    assert (ours["weights"], ours["optimizer"]) == (theirs["weights"], theirs["optimizer"])
    for changes, message in (
        ({"hidden_size": 32}, "the checkpoint's weights do not fit the run's settings"),
        ({"optimizer": "adamw"}, "the optimizer's state has no step"),
    ):
        with pytest.raises(DataError, match=message):
            go(corpus, tmp_path / "third", tiny(**changes), resume=checkpoint)
        assert not (tmp_path / "third").exists()
    assert tree(tmp_path / "first") == before


def test_a_checkpoint_can_be_named(tmp_path: Path, corpus: Path) -> None:
    go(corpus, tmp_path / "straight", tiny(save_total_limit=0))
    at = tmp_path / "run"
    shutil.copytree(tmp_path / "straight", at)
    go(corpus, at, tiny(save_total_limit=0), resume=str(at / "checkpoints" / "step-00000006"))
    assert fingerprint(at) == fingerprint(tmp_path / "straight")
    before = tree(at)
    for named, message in (
        ("step-00000007", "no such checkpoint"),
        ("../model", "no such file or folder"),
        ("step-00000003", r"is damaged: model\.safetensors: its sha256 is not the manifest's"),
    ):
        path = at / "checkpoints" / named
        if "damaged" in message:
            flip(path / "model.safetensors")
            before = tree(at)
        with pytest.raises(DataError, match=message):
            go(corpus, at, tiny(save_total_limit=0), resume=str(path))
        assert tree(at) == before


def flip(path: Path, place: float = 0.5, bit: int = 0) -> None:
    """Turns one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "place"),
    [
        *[("model.safetensors", 0.9), ("model.safetensors", 0.0), ("optimizer.safetensors", 0.7), ("state.json", 0.5)],
        *[("manifest.json", 0.4), ("manifest.json", 0.0), ("config.json", 0.3), ("tokenizer.json", 0.2)],
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, corpus: Path, file: str, place: float) -> None:
    go(corpus, tmp_path / "straight")
    at = tmp_path / "run"
    until_step(8, corpus, at)
    flip(at / "checkpoints" / "step-00000008" / file, place)
    records = list(pretrain(corpus, at, tiny(), resume="auto"))
    started = next(record for record in records if isinstance(record, Started))
    assert started.resumed_from == 6
    assert started.notices[0].startswith("passed over: step-00000008 is damaged (")
    assert fingerprint(at) == fingerprint(tmp_path / "straight")
    assert problems(at) == []


def test_what_was_passed_over_is_said_on_stderr(place: Path) -> None:
    run("pretrain", "corpus", "-o", "run", *words(), cwd=place)
    flip(place / "run" / "checkpoints" / "step-00000012" / "model.safetensors")
    again = run("pretrain", "corpus", "-o", "run", *words(max_steps=14), "--resume", "auto", cwd=place)
    lines = again.stderr.splitlines()
    assert lines[0] == ("passed over: step-00000012 is damaged (model.safetensors: its sha256 is not the manifest's)")
    assert "resumed    from step 9" in lines
    assert fingerprint(place / "run")["checkpoint"] == "step-00000014"


def test_when_no_checkpoint_is_sound_nothing_is_written_over(tmp_path: Path, corpus: Path) -> None:
    at = tmp_path / "run"
    go(corpus, at)
    for folder in (at / "checkpoints").iterdir():
        flip(folder / "optimizer.safetensors")
    before = tree(at)
    with pytest.raises(DataError, match=r"no checkpoint is sound \(step-00000012 is damaged .*--overwrite begins anew"):
        go(corpus, at, resume="auto")
    assert tree(at) == before


# ----------------------------------------------------------------------------------------------------------------
# What may change on the way


@pytest.mark.parametrize(
    ("words_of_change", "message"),
    [
        (("--seed", "1"), "seed: the run was begun with 0, which a resumed run keeps; asked: 1"),
        (("--hidden-size", "32"), "hidden_size: the run was begun with 16"),
        (("--optimizer", "muon"), "optimizer: the run was begun with 'adamw'"),  # muon is the default, and was said
        (("--lr", "0.5"), "learning_rate: the run was begun with 0.002"),
        (("--split-on", "line"), "split_on: says how text becomes a corpus, and DATA is one already"),
        (("--batch-size", "8"), "batch_size: the run was begun with 4"),
    ],
)
def test_a_changed_setting_is_refused_by_name(place: Path, words_of_change: tuple[str, ...], message: str) -> None:
    config = tiny(max_steps=3, optimizer="adamw")
    if not (place / "run").exists():
        go(place / "corpus", place / "run", config)
    before = tree(place)
    life = run("pretrain", str(place / "corpus"), "-o", "run", "--resume", *words_of_change, cwd=place, code=2)
    assert life.stderr.startswith(f"Error: {message}")
    assert life.stderr.count("\n") == 1
    assert tree(place) == before


def test_other_data_are_refused(place: Path) -> None:
    shutil.copytree(place / "corpus", place / "other")
    go(place / "corpus", place / "run", tiny(max_steps=3))
    with pytest.raises(UsageError, match=r"was begun on .*corpus, not on .*other"):
        go(place / "other", place / "run", tiny(max_steps=4), resume="auto")
    go(Path(f"{place}/./corpus/"), place / "run", tiny(max_steps=4), resume="auto")  # the same by another name
    before = tree(place / "run")
    shutil.rmtree(place / "corpus")
    make_corpus(place / "corpus", text(3000))
    with pytest.raises(DataError, match=r"step-00000004: was trained on another corpus \(\w{12}\) than the one"):
        go(place / "corpus", place / "run", tiny(max_steps=5), resume="auto")
    assert tree(place / "run") == before


def test_a_length_that_is_given_takes_the_old_one_s_place(place: Path) -> None:
    data, at = place / "corpus", place / "run"
    go(data, at, tiny(max_steps=None, epochs=0.5))
    assert metrics(at)[-1]["step"] == 6
    settled = tomllib.loads((at / "config.toml").read_text())
    more = ["--max-steps", "8", "--patience", "5", "--save-total-limit", "3"]
    run("pretrain", data, "-o", "run", "--resume", *more, cwd=place)
    assert metrics(at)[-1]["step"] == 8
    values = tomllib.loads((at / "config.toml").read_text())
    settled.pop("epochs")
    assert values == {**settled, "max_steps": 8, "patience": 5, "save_total_limit": 3}
    run("pretrain", data, "-o", "run", "--resume", "--max-tokens", "640", "--patience", "0", cwd=place)
    assert metrics(at)[-1]["step"] == 10
    values = tomllib.loads((at / "config.toml").read_text())
    assert ("max_steps" in values, values["max_tokens"], values["patience"]) == (False, 640, 0)
    run("pretrain", data, "-o", "run", "--resume", cwd=place)  # nothing is given: it stays as it was
    assert tomllib.loads((at / "config.toml").read_text()) == values
    run("pretrain", data, "-o", "run", "--resume", "--max-steps", "2", cwd=place)  # shorter than it is
    assert metrics(at)[-1]["step"] == 10


def test_settled_settings_stay_when_the_length_changes(tmp_path: Path, corpus: Path) -> None:
    """Warm-up, how often it validates and saves, the compiler: all were derived from the length that was."""
    open_ones = {"eval_every": None, "save_every": None, "eval_tokens": None, "compile": "auto", "threads": None}
    config = tiny(max_steps=3, **open_ones)
    go(corpus, tmp_path / "run", config)
    before = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (before["warmup_steps"], before["eval_every"], before["save_every"]) == (10, 1, 1)
    go(corpus, tmp_path / "run", dataclasses.replace(config, max_steps=2000), resume="auto", stopping=lambda: True)
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text()) == {**before, "max_steps": 2000}


def test_a_vocabulary_that_the_text_did_not_fill_is_no_change(place: Path) -> None:
    """The command that began it must be able to go on."""
    (place / "short.txt").write_text("hush " * 500)
    command = ["pretrain", "short.txt", "-o", "run", *words(vocab_size=3000)]
    run(*command, cwd=place)
    assert open_corpus(place / "run" / "corpus").vocab_size < 3000
    run(*command, "--resume", cwd=place)


# ----------------------------------------------------------------------------------------------------------------
# What stands at the place


def test_an_output_that_exists_is_refused_and_overwrite_replaces_it_whole(place: Path) -> None:
    run("pretrain", "corpus.txt", "-o", "run", *words(vocab_size=300, max_steps=6), cwd=place)
    (place / "run" / "loss.svg").write_text("<svg/>")
    before = tree(place)
    refused("pretrain", "corpus", "-o", "run", *words(), cwd=place, message="run: exists already; choose another")
    refused(
        *("pretrain", "corpus", "-o", "run", "--overwrite", "--resume", *words()),
        cwd=place,
        message="run: --resume goes on with what is there, --overwrite removes it: give one",
    )
    assert tree(place) == before
    run("pretrain", "corpus", "-o", "run", "--overwrite", *words(max_steps=3), cwd=place)
    run("pretrain", "corpus", "-o", "other", *words(max_steps=3), cwd=place)
    assert fingerprint(place / "run") == fingerprint(place / "other")
    assert set(tree(place / "run")) == set(tree(place / "other"))


@pytest.mark.parametrize("content", [b'{"text": "a b c"}\n{"text": "a \n', b"\0\1\2" * 999, b"too short"])
def test_an_overwrite_that_fails_leaves_the_old_run(place: Path, content: bytes) -> None:
    run("pretrain", "corpus", "-o", "run", *words(max_steps=3), cwd=place)
    (place / "bad.jsonl").write_bytes(content)
    before = tree(place)
    refused("pretrain", "bad.jsonl", "-o", "run", "--overwrite", *words(), cwd=place)
    assert tree(place) == before


def test_a_run_never_removes_what_it_is_to_read(place: Path) -> None:
    run("pretrain", "corpus.txt", "-o", "run", *words(vocab_size=300, max_steps=2), cwd=place)
    before = tree(place)
    message = "is to be read and lies in the run's own folder; put one of them elsewhere"
    refused("pretrain", "run/corpus", "-o", "run", "--overwrite", *words(), cwd=place, message=f"run/corpus: {message}")
    refused(
        *("pretrain", "corpus.txt", "-o", "run", "--overwrite", "--tokenizer", "run/tokenizer", *words()),
        cwd=place,
        message=f"run/tokenizer: {message}",
    )
    shutil.move(place / "run", place.parent / "kept")
    before = tree(place)
    for data in (".", "*", "**/*.txt"):
        (place / "new").mkdir(exist_ok=True)
        (place / "new" / "a.txt").write_text(text())
        before = tree(place)
        refused("pretrain", data, "-o", "new", "--overwrite", *words(), cwd=place, message=message)
        assert tree(place) == before
    shutil.rmtree(place / "new")
    before = tree(place)
    refused("pretrain", ".", "-o", "runs/new", *words(), cwd=place)  # the folder of texts would hold the run
    assert tree(place) == before


def test_two_processes_cannot_train_in_one_folder(place: Path) -> None:
    life = Life("pretrain", "corpus", "-o", "run", *words(max_steps=10**6), cwd=place)
    until(lambda: len(metrics(place / "run")) > 5, life)
    settled = (place / "run" / "config.toml").read_bytes()
    for again in (("--resume",), ("--overwrite",)):
        second = run("pretrain", "corpus", "-o", "run", *again, *words(max_steps=10**6), cwd=place, code=1)
        assert second.stderr == "Error: run: another process is using this run\n"
    assert life.alive
    life.signal(signal.SIGTERM)
    assert life.wait() == 143
    assert (place / "run" / "config.toml").read_bytes() == settled
    assert problems(place / "run") == []


def test_of_two_that_begin_at_once_one_trains_and_the_other_touches_nothing(place: Path) -> None:
    for attempt in range(3):
        command = ["pretrain", "corpus.txt", "-o", f"runs/{attempt}", *words(vocab_size=300)]
        lives = [Life(*command, cwd=place) for _ in range(2)]
        codes = sorted(life.wait() for life in lives)
        assert codes in ([0, 1], [0, 2])
        loser = next(life for life in lives if life.process.exitcode)
        assert loser.stderr.startswith(f"Error: runs/{attempt}: ")
        assert ("another process is using this run" in loser.stderr) or ("exists already" in loser.stderr)
        assert problems(place / "runs" / str(attempt)) == []
        assert metrics(place / "runs" / str(attempt))[-1]["reason"] == "steps"


# ----------------------------------------------------------------------------------------------------------------
# Signals

LONG = {"max_steps": 120, "eval_every": 40, "save_every": 50}


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The fingerprint of a long run."""
    at = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)
        go(corpus, at / "run", tiny(**LONG))
    return fingerprint(at / "run")


@pytest.mark.parametrize(
    ("number", "code", "after"),
    [(signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 30), (signal.SIGINT, 130, 60), (signal.SIGTERM, 143, 90)],
)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    place: Path, undisturbed: dict[str, Any], number: int, code: int, after: int
) -> None:
    life = Life("pretrain", "corpus", "-o", "run", *words(**LONG), cwd=place)
    until(lambda: len(metrics(place / "run")) >= after, life)
    life.signal(number)
    assert life.wait() == code, life.stderr
    stopped = metrics(place / "run")[-1]
    assert (stopped["event"], stopped["reason"]) == ("end", "stopped")
    assert (place / "run" / "checkpoints" / f"step-{stopped['step']:08d}").is_dir()
    lines = life.stderr.splitlines()
    assert "stopping: saving the work; press Ctrl-C once more to stop at once" in lines
    assert lines[-1] == f"Error: stopped at step {stopped['step']:,}; saved, go on with --resume"
    assert life.stdout == ""
    assert problems(place / "run") == []
    assert not describe(place / "run").facts["finished"]
    run("pretrain", "corpus", "-o", "run", *words(**LONG), "--resume", cwd=place)
    assert fingerprint(place / "run") == undisturbed
    assert describe(place / "run").facts["finished"]


def test_a_signal_in_the_middle_of_validation_is_answered_at_once(place: Path) -> None:
    """At the last step too: the validation that is missing then is made up for."""
    make_corpus(place / "large", text(800_000), val_fraction=0.9)
    length = words(max_steps=2, eval_every=1, save_every=10, eval_tokens=10**9)
    run("pretrain", "large", "-o", "straight", *length, cwd=place)
    for step in (1, 2):
        life = Life("pretrain", "large", "-o", "run", *length, "--resume", cwd=place)
        until(lambda step=step: [line for line in metrics(place / "run", "step") if line["step"] == step], life)
        life.signal(signal.SIGINT)
        assert life.wait() == 130
        assert (metrics(place / "run")[-1]["reason"], metrics(place / "run")[-1]["step"]) == ("stopped", step)
        assert len(metrics(place / "run", "validation")) == step - 1
    run("pretrain", "large", "-o", "run", *length, "--resume", cwd=place)
    assert fingerprint(place / "run") == fingerprint(place / "straight")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("stage", ["tokenizer", "corpus"])
def test_a_signal_during_the_preparation_leaves_nothing(place: Path, number: int, code: int, stage: str) -> None:
    (place / "long.txt").write_text(text(6_000_000))
    before = tree(place)
    given = ["--tokenizer", "tokenizer"] if stage == "corpus" else []
    life = Life("pretrain", "long.txt", "-o", "runs/new", *given, *words(vocab_size=2000), cwd=place)
    place_of = place / "runs" / "new"
    until(lambda: list(place_of.glob(".corpus.tmp-*") if given else place_of.glob("config.toml")), life)
    life.signal(number)
    assert life.wait() == code, life.stderr
    assert life.stderr.splitlines()[-1] == "Error: stopped before the first step"
    assert tree(place) == before


def test_a_signal_during_the_preparation_of_a_resumed_run_leaves_what_was_there(place: Path) -> None:
    (place / "long.txt").write_text(text(3_000_000))
    command = ["pretrain", "long.txt", "-o", "run", *words(vocab_size=1000, max_steps=4)]
    run(*command[:3], "straight", *command[4:], cwd=place)
    life = Life(*command, cwd=place)
    until(lambda: list((place / "run").glob(".corpus.tmp-*")), life)
    life.signal(signal.SIGKILL)
    assert life.wait() == -signal.SIGKILL
    before = {name for name in tree(place / "run") if ".tmp-" not in name}
    life = Life(*command, "--resume", cwd=place)
    until(lambda: not list((place / "run").glob(".corpus.tmp-*")), life)
    life.signal(signal.SIGTERM)
    assert life.wait() == 143
    assert before <= set(tree(place / "run"))
    run(*command, "--resume", cwd=place)
    assert fingerprint(place / "run") == fingerprint(place / "straight")
    assert not [name for name in tree(place) if ".tmp-" in name]


def test_a_second_interrupt_ends_it_at_once_and_the_older_checkpoint_is_whole(place: Path) -> None:
    """While it saves: the first signal is answered by a checkpoint, which the second cuts off."""
    at = place / "run"
    life = Life("pretrain", "corpus", "-o", "run", *words(max_steps=10**6, hidden_size=256, ffn_size=1024), cwd=place)
    until(lambda: (at / "checkpoints" / "step-00000003").is_dir(), life)
    life.signal(signal.SIGINT)
    until(lambda: "stopping" in life.stderr)
    life.signal(signal.SIGINT)
    assert life.wait() == 130
    assert life.stderr.splitlines()[-1] in (
        "Error: interrupted",
        f"Error: stopped at step {metrics(at)[-1]['step']:,}; saved, go on with --resume",  # it was faster
    )
    assert "Traceback" not in life.stderr
    for folder in (at / "checkpoints").glob("step-*"):
        assert manifest_problems(folder) == []
    assert (at / "checkpoints" / "step-00000003").is_dir() or len(list((at / "checkpoints").iterdir())) == 2
    step = len({line["step"] for line in metrics(at, "step")})
    again = ["--max-steps", step + 1, "--resume", *words(hidden_size=256, ffn_size=1024)[:-6]]
    run("pretrain", "corpus", "-o", "run", *again, cwd=place)


def test_the_work_is_saved_when_nobody_reads_any_more(place: Path) -> None:
    read, write = os.pipe()
    device = f"/proc/{os.getpid()}/fd/{write}"
    if not os.path.exists(device):
        pytest.skip("needs /proc")
    life = Life("pretrain", "corpus", "-o", "run", "--json", *words(max_steps=10**6), cwd=place, stdout=device)
    until(lambda: len(metrics(place / "run", "step")) > 4, life)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert life.wait() == 0
    last = metrics(place / "run")[-1]
    assert (last["event"], last["reason"]) == ("end", "stopped")
    assert (place / "run" / "checkpoints" / f"step-{last['step']:08d}").is_dir()


# ----------------------------------------------------------------------------------------------------------------
# When it goes wrong


def refused(*command: object, cwd: Path, code: int = 2, message: str = "", **details: Any) -> str:
    """A command that fails in one line. Returns the line."""
    life = run(*command, cwd=cwd, code=code, **details)
    lines = life.stderr.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1, life.stderr
    assert errors[0] == lines[-1]
    assert message in errors[0], errors[0]
    assert "Traceback" not in life.stderr
    assert life.stdout == ""
    return errors[0]


def test_a_loss_that_is_not_finite_is_told_and_the_last_good_checkpoint_stands(place: Path) -> None:
    go(place / "corpus", place / "run", tiny(max_steps=6))
    before = tree(place / "run" / "checkpoints")
    _spoil(place / "run" / "config.toml", "learning_rate = 0.02", "learning_rate = 1e30")
    _spoil(place / "run" / "config.toml", "max_steps = 6", "max_steps = 12")
    line = refused("pretrain", str(place / "corpus"), "-o", "run", "--resume", cwd=place, code=1)
    assert line.startswith("Error: run: the ")
    assert "is not finite at step 7" in line or "is not finite at step 8" in line
    assert line.endswith("the last good checkpoint is run/checkpoints/step-00000006")
    assert tree(place / "run" / "checkpoints") == before
    last = metrics(place / "run")[-1]
    assert (last["event"], last["reason"]) == ("end", "not-finite")
    assert problems(place / "run") == []

    life = run("pretrain", "corpus", "-o", "new", "--json", *words(learning_rate=1e30), cwd=place, code=1)
    told = json.loads(life.stderr)["error"]
    assert (told["kind"], told["where"]) == ("not-finite", "new")
    assert told["message"].endswith("a lower --learning-rate may help; there was no checkpoint yet")
    assert metrics(place / "new")[-1]["reason"] == "not-finite"
    assert not list((place / "new").glob("checkpoints/*"))
    assert not (place / "new" / "model").exists()


def _spoil(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))


BAD_TEXTS = [
    pytest.param({}, "no-such-file.txt", (), "no-such-file.txt: no such file or folder", id="missing"),
    pytest.param({"empty.txt": b""}, "empty.txt", (), "empty.txt: is empty", id="empty"),
    pytest.param({"texts/.hidden": b"x"}, "texts", (), "texts: holds no file to read", id="folder-without-text"),
    pytest.param({"a.bin": b"\0\1\2\3" * 999}, "a.bin", (), "a.bin", id="binary"),
    pytest.param(
        {"a.txt": b"one\ntwo\nthr\xe9e\n"}, "a.txt", ("--encoding", "utf-8"), "a.txt:3:byte ", id="wrong-encoding"
    ),
    pytest.param(
        {"a.jsonl": b'{"text": "a"}\n{"text" "b"}\n'}, "a.jsonl", (), "a.jsonl:2:9: is not valid JSON", id="bad-line"
    ),
    pytest.param(
        {"a.jsonl": b'{"body": "a", "id": 3}\n'},
        "a.jsonl",
        (),
        "a.jsonl:1: field 'text' is missing; found: 'body', 'id'",
        id="missing-field",
    ),
    pytest.param({"a.txt": b"word " * 40}, "a.txt", ("--context", "4000"), "too little text", id="too-little"),
    pytest.param({}, "corpus.txt", ("--tokenizer", "nowhere"), "nowhere", id="no-tokenizer"),
    pytest.param({}, "corpus", ("--preset", "5m"), "preset: no preset '5m'; there are 1m, ", id="preset"),
    pytest.param({}, "corpus", ("--heads", "3"), "heads: 3 heads do not divide a width of 16", id="heads"),
    pytest.param({}, "corpus", ("--grad-accumulation", "3"), "batch_size: 4 rows cannot be", id="pieces"),
    pytest.param({}, "corpus", ("--lr", "inf"), "learning_rate: must be finite", id="infinite-rate"),
    pytest.param({}, "corpus", ("--lr", "1e300"), "learning_rate: must be at most 1e+30", id="rate"),
    pytest.param({}, "corpus", ("--max-steps", "5", "--epochs", "1e308"), "epochs: must be at most", id="epochs"),
    pytest.param({}, "corpus", ("--threads", "100000"), "threads: must be at most 1024", id="threads"),
    pytest.param({}, "corpus", ("--vocab-size", "999"), "vocab_size: the corpus has a vocabulary of 800", id="vocab"),
    pytest.param(
        {"caf\udce9.txt": b"words " * 999}, "caf\udce9.txt", (), "cannot hold a name that is not UTF-8", id="name"
    ),
    pytest.param({}, "corpus", ("--max-steps", "9" * 400), "max_steps: must be at most", id="endless"),
    pytest.param({}, "corpus", ("--layers", "9999999"), "layers: must be at most", id="layers"),
    pytest.param({}, "corpus", ("--device", "mps"), "--device: no working mps device was found", id="device"),
    pytest.param({}, "-", (), "a pipe is read once", id="stdin"),
    pytest.param(
        {"run.toml": b"max_stesp = 3\n"},
        "corpus",
        ("-c", "run.toml"),
        "run.toml: unknown key 'max_stesp'; did you mean max_steps?",
        id="unknown-key",
    ),
    pytest.param({"a.toml": b"max_steps = \n"}, "corpus", ("-c", "a.toml"), "a.toml: is not valid TOML", id="toml"),
]


@pytest.mark.parametrize(("files", "data", "given", "message"), BAD_TEXTS)
def test_what_cannot_be_read_is_one_line_and_leaves_nothing(
    place: Path, files: dict[str, bytes], data: str, given: tuple[str, ...], message: str
) -> None:
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    before = tree(place)
    settings = words() if data == "corpus" else words(vocab_size=300)
    refused("pretrain", data, "-o", "runs/new", *settings, *given, cwd=place, message=message)
    assert tree(place) == before


def test_too_little_text_for_the_context_says_what_would_fit(place: Path) -> None:
    tokens = open_corpus(place / "corpus").train_tokens
    line = refused("pretrain", "corpus", "-o", "run", *words(context=9999), cwd=place)
    assert line == (
        f"Error: too little text: {tokens} tokens, a context of 9999 needs 10000; a context of {tokens - 1} would fit"
    )
    run("pretrain", "corpus", "-o", "run", *words(context=tokens - 1, max_steps=1), cwd=place)


def test_a_corpus_of_another_tokenizer_is_refused_with_both_hashes(place: Path) -> None:
    make_tokenizer(place / "other")
    content = json.loads((place / "other" / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (place / "other" / "tokenizer.json").write_text(json.dumps(content))
    before = tree(place)
    line = refused("pretrain", "corpus", "-o", "run", "--tokenizer", "other", *words(), cwd=place)
    assert line.startswith("Error: corpus: was made with another tokenizer (")
    assert open_corpus(place / "corpus").tokenizer_hash[:12] in line
    assert tree(place) == before
    shutil.copy(place / "other" / "tokenizer.json", place / "corpus" / "tokenizer.json")
    refused(
        *("pretrain", "corpus", "-o", "run", *words()),
        cwd=place,
        message="corpus: holds another tokenizer than the one that made it",
    )
    assert not (place / "run").exists()


def test_an_id_beyond_the_vocabulary_is_an_error_not_a_crash(place: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(place / "corpus", place / part)
        shard = place / part / f"{part}-00000.npy"
        content = bytearray(shard.read_bytes())
        for index in range(129, len(content), 2):  # the high bytes of uint16
            content[index] |= 0x80
        shard.write_bytes(content)
        life = run("pretrain", part, "-o", f"run-{part}", *words(), cwd=place, code=2)
        assert re.search(
            r"Error: the corpus holds the id \d{5} of a vocabulary of 800; see llmcli verify\n$", life.stderr
        )


@pytest.mark.parametrize("damage", ["cut", "missing", "description"])
def test_a_damaged_corpus_is_refused(place: Path, damage: str) -> None:
    shard = place / "corpus" / "train-00000.npy"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif damage == "missing":
        shard.unlink()
    else:
        _spoil(place / "corpus" / "corpus.json", '"train_tokens": ', '"train_tokens": 9')
    before = tree(place)
    refused("pretrain", "corpus", "-o", "run", *words(), cwd=place, message="corpus")
    assert tree(place) == before


def test_a_damaged_config_of_a_run_is_one_line_and_the_run_is_left_alone(place: Path) -> None:
    go(place / "corpus", place / "run", tiny(max_steps=3))
    whole = (place / "run" / "config.toml").read_text()
    for content, message in (
        (whole.replace("seed = 0", "seed = "), "run/config.toml: is not valid TOML"),
        (whole.replace("seed", "sede"), "run/config.toml: unknown key 'sede'; did you mean seed?"),
        (whole.replace("seed = 0", "seed = -1"), "seed: must be at least 0"),
        (whole.replace("data = ", "# data = "), "run/config.toml: does not say the DATA"),
    ):
        (place / "run" / "config.toml").write_text(content)
        before = tree(place)
        refused("pretrain", "corpus", "-o", "run", "--resume", *words(), cwd=place, message=message)
        assert tree(place) == before


FULL = [
    pytest.param(2_000, (), id="the-first-file"),
    pytest.param(30_000, (), id="the-tokenizer"),
    pytest.param(60_000, (), id="a-checkpoint"),
    pytest.param(12_000, ("--save-every", "100", "--eval-every", "100", "--max-steps", "100"), id="the-metrics"),
]


@pytest.mark.parametrize(("limit", "given"), FULL)
def test_a_full_disk_is_one_line_and_the_earlier_state_is_whole(
    place: Path, limit: int, given: tuple[str, ...]
) -> None:
    """A limit on the size of files is the one full disk that needs no root."""
    go(place / "corpus", place / "run", tiny(max_steps=3, hidden_size=32, ffn_size=64))
    before = tree(place / "run")
    command = ["pretrain", str(place / "corpus"), "-o", "run", "--resume", "--max-steps", "9", *given]
    refused(*command, cwd=place, code=1, message="no space left to write", limit=limit)
    now = tree(place / "run")
    assert not [name for name in now if ".tmp-" in name]
    for name, digest in before.items():
        if name not in ("config.toml", "metrics.jsonl"):
            assert now[name] == digest, name
    assert [line for line in metrics(place / "run") if line["step"] <= 3]
    run(*command, cwd=place)
    go(place / "corpus", place / "straight", tiny(max_steps=3, hidden_size=32, ffn_size=64))
    run("pretrain", str(place / "corpus"), "-o", "straight", *command[4:], cwd=place)
    assert fingerprint(place / "run") == fingerprint(place / "straight")


def test_a_fault_at_any_call_leaves_the_old_run_or_sound_checkpoints(tmp_path: Path, corpus: Path) -> None:
    """The Nth call to the disk fails, for N = 1, 2, ... until a run meets no fault (SQLite's way)."""
    old = tmp_path / "old"
    go(corpus, old, tiny(max_steps=1, seed=5))
    before = tree(old)
    for nth in itertools.count(1):
        at = tmp_path / f"run-{nth}"
        shutil.copytree(old, at)
        calls, begun, failure = 0, False, ""

        def fault(_operation: str, path: Path, nth: int = nth) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        atomic.failpoint = fault
        try:
            for record in pretrain(corpus, at, tiny(max_steps=1), overwrite=True):
                begun = begun or isinstance(record, Started)
        except LlmcliError as error:
            failure = str(error)
        finally:
            atomic.failpoint = None
        if calls < nth:
            break
        assert "no space left to write" in failure
        assert not [name for name in tree(at) if ".tmp-" in name]
        if begun:
            assert all(manifest_problems(folder) == [] for folder in (at / "checkpoints").glob("*"))
            go(corpus, at, tiny(max_steps=1), resume="auto")
            assert problems(at) == []
        else:
            assert tree(at) == before
        shutil.rmtree(at)
    assert nth > 30
    assert problems(at) == []


def test_a_full_disk_before_the_first_step_leaves_nothing(place: Path) -> None:
    before = tree(place)
    for limit in (100, 2_000, 12_000):
        refused(
            *("pretrain", "corpus.txt", "-o", "runs/new", *words(vocab_size=400)),
            cwd=place,
            code=1,
            message="no space left to write",
            limit=limit,
        )
        assert tree(place) == before


def test_a_place_that_cannot_be_written_is_one_line(place: Path) -> None:
    (place / "file").write_text("mine")
    before = tree(place)
    refused("pretrain", "corpus", "-o", "file/run", *words(), cwd=place, message="part of the path is a file")
    refused("pretrain", "corpus", "-o", "file", *words(), cwd=place, message="file: exists already")
    refused("pretrain", "corpus", "-o", "file", "--overwrite", *words(), cwd=place, message="part of the path is a fi")
    refused("pretrain", "corpus", "-o", "x" * 300, *words(), cwd=place, message="the name is too long")
    (place / "link").symlink_to("nowhere")
    refused("pretrain", "corpus", "-o", "link", *words(), cwd=place, message="link: exists already")
    (place / "link").unlink()
    assert tree(place) == before
    (place / "closed").mkdir(mode=0o500)
    if not os.access(place / "closed", os.W_OK):  # root cannot be refused
        refused("pretrain", "corpus", "-o", "closed/run", *words(), cwd=place, code=1, message="permission denied")
    (place / "closed").chmod(0o700)


def test_a_model_that_does_not_fit_on_the_disk_or_in_memory_is_one_line(place: Path) -> None:
    before = tree(place)
    large = ["--hidden-size", "1048576", "--heads", "8192", "--layers", "900"]
    line = refused("pretrain", "corpus", "-o", "run", *words(), *large, cwd=place, code=1)
    assert "GB are free, checkpoints and the result need" in line
    assert tree(place) == before


def test_an_error_is_one_json_object_with_json(place: Path) -> None:
    life = run("pretrain", "nowhere", "-o", "run", "--json", cwd=place, code=2)
    assert json.loads(life.stderr) == {
        "error": {"kind": "data", "message": "no such file or folder", "where": "nowhere"}
    }
    assert life.stdout == ""


def test_the_library_leaves_nothing_when_its_reader_goes_away(tmp_path: Path, corpus: Path) -> None:
    records: Iterator[Any] = pretrain(corpus.with_name("corpus.txt"), tmp_path / "runs" / "new", tiny(vocab_size=300))
    next(records)  # the preparation has begun
    records.close()  # type: ignore[attr-defined]
    assert not (tmp_path / "runs").exists()
    with pytest.raises(LlmcliError):
        go(corpus, tmp_path / "runs" / "new", tiny(heads=3))
    assert not (tmp_path / "runs").exists()
