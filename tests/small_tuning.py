"""Tiny fine-tuning runs: bases of random weights, sums to learn as a chat, and texts whose words tell their label."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from small_model import make_model
from small_tokenizer import make_tokenizer

from llmcli.config import FinetuneConfig
from llmcli.operations.finetune import finetune
from llmcli.training.loop import TrainingEvent

SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "batch_size": 4,
    "eval_every": 2,
    "save_every": 3,
    "learning_rate": 0.01,
    "device": "cpu",
    "precision": "float32",
    "threads": 1,
}


def tiny(**changes: Any) -> FinetuneConfig:
    """The settings of a run of 8 steps that validates at every second and saves at every third."""
    return FinetuneConfig(**{**SETTINGS, **changes})


def make_base(folder: Path, **changes: Any) -> Path:
    """A llama of random weights, its tokenizer beside it."""
    if not folder.with_name("tokenizer").is_dir():
        make_tokenizer(folder.with_name("tokenizer"))
    return make_model(folder, folder.with_name("tokenizer"), **{"context": 64, "scale": 0.2, **changes})


def sums(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Conversations, a line each."""
    drawn = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = drawn.randint(1, 99), drawn.randint(1, 99)
        turns = [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": str(a + b)}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return path


def reviews(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Texts with a label, tabs between."""
    drawn = random.Random(seed)
    lines = ["text\tlabel\n"]
    for number in range(count):
        word = drawn.choice(["good", "fine"] if number % 2 else ["bad", "poor"])
        lines.append(f"a {word} thing, number {drawn.randint(0, 9999)}\t{'pos' if number % 2 else 'neg'}\n")
    path.write_text("".join(lines))
    return path


def pairs(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Prompts with two answers: the right sum is the better one."""
    drawn = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = drawn.randint(1, 99), drawn.randint(1, 99)
        lines.append(
            json.dumps({"prompt": f"{a}+{b}?", "chosen": f"{a + b}", "rejected": f"no idea {drawn.randint(1, 9)}"})
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def go(task: str, base: Path, data: Path | list[str], at: Path, *settings: Any, **details: Any) -> list[TrainingEvent]:
    """A whole run; its training events."""
    files = [str(data)] if isinstance(data, Path) else data
    config = details.pop("config", None) or tiny()
    found = list(finetune(task, base, files, at, config, *settings, **details))
    return [record for record in found if isinstance(record, TrainingEvent)]


def until_step(step: int, *arguments: Any, **details: Any) -> None:
    """A run that is asked to stop after a step, as a signal does."""
    task, base, data, at, *settings = arguments
    last = [0]
    records = finetune(task, base, [str(data)], at, tiny(), *settings, stopping=lambda: last[0] >= step, **details)
    for record in records:
        if isinstance(record, TrainingEvent):
            last[0] = record.step
