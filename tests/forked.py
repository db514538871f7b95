"""Commands in child processes that have torch loaded already: a life begins in a tenth of a second instead of three.

A child is forked from a server that has only imported; it has a process group, signals, limits and streams of its own,
and runs the command by its entry point, to its exit code. What a test asks of a process's own start (its imports, its
arguments' bytes, its hash seed, a terminal) it asks of `conftest.run_llmcli`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WAIT = 300.0  # seconds; never measured, only the end of hope, on a busy machine too
PIPED = 65536  # bytes; what a pipe holds, so that the child itself can fill its own
LOADED = (
    "torch",
    "torch._dynamo",
    "rich.live",
    "rich.progress",
    "safetensors.torch",
    "tokenizers",
    "onnxruntime",
    "llmcli.cli.main",
    "llmcli.operations.pretrain",
    "forked",
)
_STREAMS = tempfile.TemporaryDirectory(prefix="llmcli-lives-")


def server() -> multiprocessing.context.ForkServerContext:
    """The server, started with the checkout's package and its tests in its path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _live(
    words: list[str],
    cwd: str,
    environment: dict[str, str],
    streams: tuple[str, str, str],
    piped: bytes | None,
    limit: int | None,
) -> None:
    """What the child does."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY, 0o666)
        os.dup2(handle, number)
        os.close(handle)
    if piped is not None:
        reading, writing = os.pipe()
        os.write(writing, piped)
        os.close(writing)
        os.dup2(reading, 0)
        os.close(reading)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.fsync = lambda _handle: None  # a signal loses nothing that the system has; to wait for the disk shows nothing
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    from llmcli.cli.main import main
    from llmcli.cli.streams import guarded

    guarded(main, words)


class Life:
    """One run of `llmcli`, from its start."""

    def __init__(
        self,
        *words: object,
        cwd: Path,
        environment: dict[str, str] | None = None,
        limit: int | None = None,
        piped: bytes | None = None,
        stdin: str | None = None,
        stdout: str | None = None,
        stderr: str | None = None,
    ) -> None:
        """`limit`: bytes that a file may grow to; `piped`: what comes through a pipe into stdin; `stdin`, `stdout`,
        `stderr`: files or devices that take the place of /dev/null and of the files that are read afterwards."""
        assert piped is None or (stdin is None and len(piped) <= PIPED)
        ours = ("LLMCLI_", "PYTEST_", "COLUMNS")  # pytest-xdist sets the last
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        for name in ("CI", "NO_COLOR", "TERM"):
            kept.pop(name, None)
        self.out, self.err = (Path(_STREAMS.name, f"{os.urandom(6).hex()}.{name}") for name in ("out", "err"))
        streams = (stdin or os.devnull, stdout or str(self.out), stderr or str(self.err))
        settings = {**kept, "PYTHONPATH": str(ROOT), **(environment or {})}
        arguments = (list(map(str, words)), str(cwd), settings, streams, piped, limit)
        self.process = server().Process(target=_live, args=arguments, daemon=True)
        self.process.start()

    def wait(self) -> int:
        """The exit code; negative: the signal that ended it."""
        self.process.join(WAIT)
        code = self.process.exitcode
        if code is None:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"did not end: {self.stderr}")
        return code

    def signal(self, number: int) -> None:
        """Sends a signal to it and to what it started, as a terminal does."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.is_alive()

    @property
    def stdout(self) -> str:
        """What it wrote so far."""
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    @property
    def stderr(self) -> str:
        """What it said so far."""
        return self.err.read_text(errors="replace") if self.err.exists() else ""


def run(*words: object, cwd: Path, code: int | None = 0, **details: object) -> Life:
    """A life to its end. `code`: the exit code that it must have."""
    life = Life(*words, cwd=cwd, **details)  # type: ignore[arg-type]
    found = life.wait()
    assert code is None or found == code, (found, life.stderr)
    return life


def completed(
    *words: object, cwd: Path | None = None, input: str | bytes | None = None, text: bool = True, **details: Any
) -> subprocess.CompletedProcess[Any]:
    """A life to its end, as `subprocess.run` would tell of it; bytes where `text` is false."""
    piped = input.encode() if isinstance(input, str) else input
    life = Life(*words, cwd=cwd or Path.cwd(), piped=piped, **details)
    code = life.wait()
    out, err = (path.read_bytes() if path.exists() else b"" for path in (life.out, life.err))
    if text:
        return subprocess.CompletedProcess(words, code, out.decode(), err.decode())
    return subprocess.CompletedProcess(words, code, out, err)


def until(happened: Callable[[], object], life: Life | None = None) -> None:
    """Waits until something has happened. Fails when the life has ended before."""
    end = time.monotonic() + WAIT
    while not happened():
        if life is not None and not life.alive and not happened():
            raise AssertionError(f"ended before it happened: {life.process.exitcode}, {life.stderr}")
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
