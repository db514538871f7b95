"""What is seen while a model is trained: a live panel on a terminal, plain lines elsewhere, JSON for scripts.

The terminal is a real one (a pty), read by pexpect.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import WAIT, Life, run, until
from pexpect import EOF, TIMEOUT
from pexpect.fdpexpect import fdspawn
from small_run import make_corpus, metrics, text, words

from llmcli.cli.display import _Panel, duration
from llmcli.training.loop import TrainingEvent

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>78])")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "corpus")


@pytest.fixture
def place(tmp_path: Path, corpus: Path) -> Path:
    shutil.copytree(corpus.parent, tmp_path / "here")
    return tmp_path / "here"


class Screen:
    """A terminal with a command in it."""

    def __init__(self, *command: object, cwd: Path, columns: int = 100, **environment: str) -> None:
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        settings = {"TERM": "xterm-256color", **environment}
        self.life = Life(*command, cwd=cwd, environment=settings, stderr=os.ttyname(self.slave))
        self.view = fdspawn(self.master, timeout=WAIT, encoding="utf-8", codec_errors="replace")
        self.raw = ""

    def see(self, *wanted: str) -> None:
        """Waits until each was drawn, in this order."""
        for each in wanted:
            self.view.expect(each)
            self.raw += str(self.view.before) + str(self.view.after)

    def until(self, happened: Callable[[], object]) -> None:
        """Waits until something has happened, and reads on meanwhile: a terminal that is not read stops its writer."""
        until(lambda: self.view.expect([TIMEOUT, EOF], timeout=0.02) or happened(), self.life)

    def close(self) -> str:
        """Waits for the end. Returns all that was written to the terminal."""
        while self.life.alive:
            self.view.expect([TIMEOUT, EOF], timeout=0.05)
        os.close(self.slave)  # ours kept it open, whatever the command does to its own
        self.view.expect(EOF)
        self.raw += str(self.view.before)
        return self.raw


@contextlib.contextmanager
def screen(*command: object, cwd: Path, columns: int = 100, **environment: str) -> Iterator[Screen]:
    """A terminal, closed after, and its command ended."""
    shown = Screen(*command, cwd=cwd, columns=columns, **environment)
    try:
        yield shown
    finally:
        shown.life.signal(signal.SIGKILL)
        os.close(shown.master)


def plain(raw: str) -> str:
    """Without what moves the cursor; what is drawn over stands on a line of its own."""
    return ESCAPES.sub("", raw.replace("\r\n", "\n")).replace("\r", "\n")


ENDLESS = ["pretrain", "corpus", "-o", "run", *words(max_steps=10**6, eval_every=20, save_every=1000)]


def test_a_terminal_shows_a_panel_with_all_that_matters(place: Path) -> None:
    with screen(*ENDLESS, cwd=place) as shown:
        shown.see("nats/token", "tokens/s", r"bits/byte", "learning rate", "memory", "time left", "curve")
        shown.see(r"step[^\n]* of 1,000,000")
        shown.until(lambda: len(metrics(place / "run", "validation")) > 3)
        shown.see(*["learning rate"] * 3)  # it is drawn again and again
        shown.life.signal(signal.SIGINT)
        raw = shown.close()
    assert shown.life.wait() == 130
    text = plain(raw)
    assert re.search(r"│ step +[\d,]+ of 1,000,000 +progress +[█░]{16} +\d+% ", text)
    assert re.search(r"│ loss +\d\.\d{4} nats/token +speed +[\d,]+ tokens/s", text)
    assert re.search(r"│ validation +\d+\.\d{4} bits/byte +learning rate +\d\.\d\de-\d\d", text)
    assert re.search(r"│ memory +\d+\.\d [MG]B +time left +\d.* gone\)", text)
    assert re.search(r"[▁▂▃▄▅▆▇█]{10}", text)
    assert "╭" in text
    assert "saving the work; Ctrl-C once more stops at once" in text
    assert re.search(r"step +20 +validation \d\.\d{4} nats/token +\d\.\d{4} bits/byte \(best\)", text)
    assert "\x1b[1A" in raw  # in place
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h") > 0  # the cursor is back
    assert text.rstrip().endswith("saved, go on with --resume")
    assert metrics(place / "run")[-1]["reason"] == "stopped"


def test_the_preparation_shows_bars(place: Path) -> None:
    (place / "long.txt").write_text(text(3_000_000))
    command = ["pretrain", "long.txt", "-o", "run", *words(max_steps=2, vocab_size=500)]
    with screen(*command, cwd=place) as shown:
        shown.see("preparing: count", "preparing: merge", "preparing: encode", "MB")
        raw = shown.close()
    assert shown.life.wait() == 0
    assert shown.life.stdout == "run/model\n"
    assert "2 steps, 128 tokens" in plain(raw)


@pytest.mark.parametrize(
    "environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"CI": "true"}], ids=lambda e: next(iter(e))
)
def test_plain_lines_where_nothing_may_move(place: Path, environment: dict[str, str]) -> None:
    command = ["pretrain", "corpus.txt", "-o", "run", *words(max_steps=40, eval_every=20, vocab_size=300)]
    with screen(*command, cwd=place, **environment) as shown:
        raw = shown.close()
    assert shown.life.wait() == 0
    assert "\x1b" not in raw
    lines = raw.replace("\r\n", "\n").splitlines()
    assert "\r" not in raw.replace("\r\n", "")
    assert [
        line
        for line in lines
        if re.match(r"step +1/40  loss \d\.\d{4}  [\d,]+ tokens/s  lr \d\.\d\de-\d\d  \d+ s$", line)
    ]
    assert len([line for line in lines if "validation" in line]) == 2
    assert lines[-1].startswith("40 steps, 2,560 tokens; ")


def test_a_pipe_gets_plain_lines(place: Path) -> None:
    life = run("pretrain", "corpus", "-o", "run", *words(), cwd=place, environment={"TERM": "xterm-256color"})
    assert "\x1b" not in life.stderr
    assert "\r" not in life.stderr
    assert life.stderr.isascii()
    assert len(life.stderr.splitlines()) == 6 + 1 + 6 + 1  # the plan, a step, the validations, the end
    assert life.stdout == "run/model\n"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_a_console_that_is_not_utf_8_gets_ascii(place: Path, encoding: str) -> None:
    """rich #2411, tqdm #1339: the bars of others crash there."""
    name = "läuf-北"
    command = ["pretrain", "corpus.txt", "-o", name, *words(max_steps=10**6, eval_every=20, vocab_size=300)]
    with screen(*command, cwd=place, PYTHONIOENCODING=encoding) as shown:
        shown.see("nats/token", "learning rate", "curve")
        shown.until(lambda: len(metrics(place / name, "validation")) > 3)
        shown.see(*["learning rate"] * 3)
        shown.life.signal(signal.SIGTERM)
        raw = shown.close()
    assert shown.life.wait() == 143, raw
    assert raw.isascii()
    assert "+--" in raw
    assert re.search(r"progress +#*\.* ", plain(raw))
    assert "Traceback" not in raw
    ended = run(
        "pretrain",
        "corpus",
        "-o",
        f"{name}-2",
        *words(max_steps=1),
        cwd=place,
        environment={"PYTHONIOENCODING": encoding},
    )
    assert ended.stdout.endswith("-2/model\n")
    missing = run("pretrain", "weg-北.txt", "-o", "x", cwd=place, environment={"PYTHONIOENCODING": encoding}, code=2)
    assert missing.stderr == "Error: weg-?.txt: no such file or folder\n"


@pytest.mark.parametrize("columns", [40, 20])
def test_a_narrow_terminal_is_not_overrun(place: Path, columns: int) -> None:
    with screen(*ENDLESS, cwd=place, columns=columns) as shown:
        shown.until(lambda: len(metrics(place / "run", "validation")) > 3)
        shown.see("╭", *["╰"] * 3)
        shown.life.signal(signal.SIGINT)
        raw = shown.close()
    panel = [line for line in plain(raw).splitlines() if line[:1] in ("│", "╭", "╰")]
    assert panel
    assert {len(line) for line in panel} == {columns}


def test_a_file_name_cannot_steer_the_terminal(place: Path) -> None:
    name = "a\x1b]52;c;aGk=\x07\x1b[2J.txt"
    (place / name).write_bytes(b"\0\1\2" * 999)
    with screen("pretrain", name, "-o", "run", *words(), cwd=place) as shown:
        raw = shown.close()
    assert shown.life.wait() == 2
    assert "\x1b]52" not in raw
    assert "\x1b[2J" not in raw
    assert "\x07" not in raw


STEP = {"event", "step", "tokens", "loss", "bits_per_byte", "learning_rate", "tokens_per_second", "elapsed_seconds"}


def test_json_is_lines_of_json_and_nothing_else(place: Path) -> None:
    life = run("pretrain", "corpus", "-o", "run", "--json", *words(), cwd=place)
    assert life.stderr == ""
    records = [json.loads(line) for line in life.stdout.splitlines()]
    assert all(set(record) >= STEP for record in records)
    assert [record["event"] for record in records] == [line["event"] for line in metrics(place / "run")]
    for record, line in zip(records, metrics(place / "run"), strict=True):
        assert {key: value for key, value in record.items() if value is not None} == line
    with screen("pretrain", "corpus", "-o", "second", "--json", *words(), cwd=place) as shown:
        raw = shown.close()  # a terminal behind stderr changes nothing
    assert raw == ""
    assert len(shown.life.stdout.splitlines()) == len(records)


def test_quiet_says_nothing_but_the_result(place: Path) -> None:
    life = run("pretrain", "corpus", "-o", "run", "-q", *words(), cwd=place)
    assert (life.stdout, life.stderr) == ("run/model\n", "")
    with screen("pretrain", "corpus", "-o", "second", "-q", *words(), cwd=place) as shown:
        raw = shown.close()
    assert (raw, shown.life.stdout) == ("", "second/model\n")
    assert run("pretrain", "corpus", "-o", "run", "-q", cwd=place, code=2).stderr.startswith("Error: run: exists")


def test_the_curve_shows_the_whole_run_however_long_it_is() -> None:
    for count in (3, 399, 400, 5000):
        panel = _Panel(lambda: False)
        for step in range(1, count + 1):
            panel.take(TrainingEvent("step", step, step, loss=float(step), tokens_per_second=1.0))
        assert len(panel.losses) <= 400
        assert panel.losses[0] == (1 + panel.every) / 2  # the mean of the first steps
        assert panel.losses == [panel.losses[0] + place * panel.every for place in range(len(panel.losses))]
        assert count - panel.losses[-1] <= 1.5 * panel.every


def test_durations_are_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.4, 59.6, 61, 3599.7, 3600, 7_800, 360_000)] == [
        *("0 s", "59 s", "1 min 00 s", "1 min 01 s", "1 h 00 min", "1 h 00 min", "2 h 10 min", "100 h 00 min")
    ]


def test_the_panel_shows_a_validation_that_has_no_bytes() -> None:
    panel = _Panel(lambda: False)
    panel.take(TrainingEvent("step", 1, 1, loss=0.7, learning_rate=0.1, tokens_per_second=1.0, progress=0.5))
    panel.take(TrainingEvent("validation", 1, 1, loss=0.6931, figures={"accuracy": 1.0}))
    assert ("validation", "0.6931 nats") in panel._pairs()
