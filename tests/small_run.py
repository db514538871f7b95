"""Tiny pretraining runs: a corpus made in a moment, the settings of a run of seconds, and what two runs must share."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from small_tokenizer import make_tokenizer

from llmcli.config import CorpusConfig, PretrainConfig, TextConfig
from llmcli.operations.prepare import prepare

SHAPE: dict[str, Any] = {
    "layers": 2,
    "hidden_size": 16,
    "heads": 2,
    "ffn_size": 24,
    "context": 16,
    "batch_size": 4,
    "eval_tokens": 160,
    "device": "cpu",
    "precision": "float32",
    "compile": "off",
    "threads": 1,
}


def tiny(**changes: Any) -> PretrainConfig:
    """The settings of a run of 12 steps that validates at every second and saves at every third."""
    return PretrainConfig(**{**SHAPE, "max_steps": 12, "eval_every": 2, "save_every": 3, **changes})


def words(**changes: Any) -> list[str]:
    """The same as words of a command line."""
    values = {**SHAPE, "max_steps": 12, "eval_every": 2, "save_every": 3, **changes}
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@functools.cache
def text(characters: int = 2400) -> str:
    """English that every Python brings."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    return (whole * (characters // len(whole) + 1))[:characters]


def make_corpus(folder: Path, content: str | None = None, **settings: Any) -> Path:
    """A corpus at `folder`, with its tokenizer and its text beside it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = folder.with_name("tokenizer")
    if not tokenizer.is_dir():
        make_tokenizer(tokenizer)
    source = folder.with_name(f"{folder.name}.txt")
    source.write_text(content or text())
    config = CorpusConfig(**{"val_fraction": 0.2, "workers": 1, **settings})
    for _ in prepare([str(source)], tokenizer, folder, TextConfig(), config):
        pass
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder and the sha256 of its bytes; folders that are empty, and none that does not exist."""
    if not folder.exists():
        return {}
    found = {"": "folder"}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def metrics(run: Path, *events: str) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics, those of the named events (all where none is named)."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines]
    return [record for record in records if not events or record["event"] in events]


def fingerprint(run: Path) -> dict[str, Any]:
    """What must be equal, bit for bit, in two runs that should be the same: all but the time they took."""
    last = max((run / "checkpoints").glob("step-*"))
    state = json.loads((last / "state.json").read_text())
    lines = [
        {key: value for key, value in record.items() if key not in ("elapsed_seconds", "tokens_per_second")}
        for record in metrics(run, "step", "validation")
    ]
    return {
        "checkpoint": last.name,
        "weights": hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest(),
        "optimizer": hashlib.sha256((last / "optimizer.safetensors").read_bytes()).hexdigest(),
        "state": {key: value for key, value in state.items() if key not in ("elapsed_seconds", "machine")},
        "result": hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "result_step": json.loads((run / "model" / "manifest.json").read_text())["lineage"]["step"],
        "lines": lines,
    }
