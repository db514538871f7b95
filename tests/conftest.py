"""What several tests share: running the command as a user would, and tiny artefacts made in process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The machine's speed decides nothing, and a failure comes back on the next run.
settings.register_profile("llmcli", deadline=None, derandomize=True, database=None)
settings.load_profile("llmcli")

# Started in the background or under nohup, signals are ignored, and children would inherit that; a user's are not.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run_llmcli(*words: object, environment: dict[str, str] | None = None, **details: object) -> object:
    """Runs `llmcli` as a user does, from Python's start, with no configuration of the caller's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LLMCLI_")}
    settings: dict[str, object] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 120}
    return subprocess.run(
        [sys.executable, "-m", "llmcli", *map(str, words)],
        env={**kept, "PYTHONPATH": str(ROOT), **(environment or {})},
        **{**settings, **details},  # type: ignore[call-overload]
    )


@pytest.fixture
def llmcli() -> Run:
    """The command `llmcli`, run in a child process that has torch loaded."""
    from forked import completed

    return completed


@pytest.fixture
def fresh_llmcli() -> Run:
    """The command `llmcli`, run in a child process from Python's start."""
    return run_llmcli  # type: ignore[return-value]


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: for tests that do not cut the power."""
    monkeypatch.setattr(os, "fsync", lambda _handle: None)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: tiny products gain nothing by more, and on a busy machine each waits for the other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
