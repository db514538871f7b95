"""What is seen while work goes on: bars and a live panel on a terminal, plain lines elsewhere. All on stderr.

Invariant: nothing moves where stderr is not a terminal, or TERM=dumb, or CI or NO_COLOR is set; there it is one line an
interval.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llmcli.cli.chart import sparkline
from llmcli.cli.info import counted, size
from llmcli.cli.options import is_json, is_quiet
from llmcli.cli.streams import notice
from llmcli.config import PretrainConfig

if TYPE_CHECKING:
    from llmcli.operations.records import Progress
    from llmcli.operations.training_run import Started
    from llmcli.training.loop import TrainingEvent

_INTERVAL = 5.0  # seconds between plain lines
_CURVE = 400  # losses that the small curve is drawn from, at most; even


def is_live() -> bool:
    """Whether stderr is a terminal that can be drawn on."""
    plain = any(os.environ.get(name) for name in ("CI", "NO_COLOR"))
    dumb = plain or os.environ.get("TERM", "") in ("dumb", "unknown")
    return sys.stderr.isatty() and not dumb and not is_quiet() and not is_json()


def is_utf8() -> bool:
    """Whether stderr takes more than ASCII (cp1252 consoles do not: rich #2411)."""
    return (getattr(sys.stderr, "encoding", None) or "").lower().replace("-", "") == "utf8"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _amount(count: int, unit: str) -> str:
    return size(count) if unit == "bytes" else f"{count:,} {unit}"


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False, legacy_windows=False)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[Progress], None]]:
    """Shows `Progress` records: a bar a stage on a terminal, else a line every few seconds."""
    if not is_live():
        yield _plain_progress(title)
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    bar = BarColumn(bar_width=30) if is_utf8() else TextColumn("{task.percentage:>3.0f}%")
    columns = (TextColumn("{task.description}"), bar, TextColumn("{task.fields[amount]}"), TimeRemainingColumn())
    with Bars(*columns, console=_console(), transient=True, redirect_stdout=False) as bars:
        tasks: dict[str, Any] = {}

        def show(record: Progress) -> None:
            if record.stage not in tasks:
                tasks[record.stage] = bars.add_task(f"{title}: {record.stage}", total=record.total, amount="")
            amount = _amount(record.done, record.unit)
            bars.update(tasks[record.stage], completed=record.done, total=record.total, amount=amount)

        yield show


def _plain_progress(title: str) -> Callable[[Progress], None]:
    told = time.monotonic()

    def show(record: Progress) -> None:
        nonlocal told
        if time.monotonic() - told >= _INTERVAL:
            told = time.monotonic()
            share = f" of {_amount(record.total, record.unit)}" if record.total else ""
            notice(f"{title}: {record.stage}, {_amount(record.done, record.unit)}{share}")

    return show


def plan_lines(started: Started) -> list[str]:
    """The plan of a run in words."""
    plan, shape, machine = started.plan, started.model, started.machine
    epochs = f", {plan.epochs:.1f} epochs" if plan.epochs else ""
    length = f"{plan.steps:,} steps, {plan.train_tokens:,} tokens{epochs}" if plan.steps and plan.train_tokens else ""
    bound = f"at most {duration(started.settings.max_seconds)}" if started.settings.max_seconds else ""
    compiled = ", compiled" if machine.compile else ""
    estimate = f"about {duration(plan.estimated_seconds)}" if plan.estimated_seconds else ""
    return [
        *(f"{name:<10} {text}" for name, text in started.facts.items()),
        f"model      {shape.model_type}, {plan.parameters / 1e6:.2f} M parameters "
        f"({plan.embedding_parameters / 1e6:.2f} M embedding), {shape.num_hidden_layers} layers, "
        f"width {shape.hidden_size}, context {shape.max_position_embeddings}",
        f"machine    {machine.device}, {counted(machine.threads, 'thread')}, {machine.precision}{compiled}",
        f"length     {'; '.join(part for part in (length, bound) if part)}; {plan.tokens_per_step:,} tokens a step",
        f"memory     {size(plan.memory_bytes)}: weights {size(plan.weight_bytes)}, "
        f"gradients {size(plan.gradient_bytes)}, optimizer {size(plan.optimizer_bytes)}, "
        f"activations {size(plan.activation_bytes)}",
        f"work       {plan.flops_per_step / 1e9:,.0f} GFLOP a step{'; ' + estimate if estimate else ''} (estimated)",
        f"disk       {size(plan.checkpoint_bytes)} a checkpoint",
    ]


@contextlib.contextmanager
def training(
    started: Started, stopping: Callable[[], bool] = lambda: False
) -> Iterator[Callable[[TrainingEvent], None]]:
    """Shows training: a live panel on a terminal, else a line an interval and one a validation.

    `stopping`: whether the end was asked for, which the panel says at once.
    """
    if not is_live():
        yield _plain_training()
        return
    from rich.live import Live

    panel = _Panel(stopping, "pretraining" if isinstance(started.settings, PretrainConfig) else "fine-tuning")
    with Live(panel, console=_console(), refresh_per_second=4, transient=True, redirect_stdout=False) as live:

        def show(event: TrainingEvent) -> None:
            panel.take(event)
            if event.event == "validation":
                live.console.print(validation_line(event), markup=False)

        yield show


def validation_line(event: TrainingEvent) -> str:
    """One validation in words."""
    mark = " (best)" if event.best else ""
    bits = "" if event.bits_per_byte is None else f"  {event.bits_per_byte:.4f} bits/byte"
    own = "".join(f"  {name} {value:.4f}" for name, value in (event.figures or {}).items())
    unit = "nats/token" if event.bits_per_byte is not None else "nats"
    return (
        f"step {event.step:>6,}  validation {event.loss:.4f} {unit}{bits}{own}{mark}  {duration(event.elapsed_seconds)}"
    )


def _measure(event: TrainingEvent) -> str:
    """A validation's chief figure; labels and preferences have no bytes."""
    return f"{event.loss:.4f} nats" if event.bits_per_byte is None else f"{event.bits_per_byte:.4f} bits/byte"


def _plain_training() -> Callable[[TrainingEvent], None]:
    told = 0.0
    speeds: list[float] = []

    def show(event: TrainingEvent) -> None:
        nonlocal told
        if event.event == "validation":
            notice(validation_line(event))
        elif event.event == "step":
            speeds.append(event.tokens_per_second or 0.0)
            if time.monotonic() - told >= _INTERVAL:
                told = time.monotonic()
                total = f"/{event.total_steps:,}" if event.total_steps else ""
                speed = sorted(speeds[-50:])[len(speeds[-50:]) // 2]
                notice(
                    f"step {event.step:>6,}{total}  loss {event.loss:.4f}  {speed:,.0f} tokens/s  "
                    f"lr {event.learning_rate:.2e}  {duration(event.elapsed_seconds)}"
                )

    return show


class _Panel:
    """The live panel: figures and a small curve, from the events so far."""

    def __init__(self, stopping: Callable[[], bool], title: str = "training") -> None:
        self.stopping, self.title = stopping, title
        self.utf8 = is_utf8()  # asked before the display puts something of its own in stderr's place
        self.step: TrainingEvent | None = None
        self.validation: TrainingEvent | None = None
        self.losses: list[float] = []  # means of `every` steps each, so that the whole run stays in view
        self.every = 1
        self.pending: list[float] = []
        self.speeds: list[float] = []

    def take(self, event: TrainingEvent) -> None:
        """Remembers what the panel shows."""
        if event.event == "validation":
            self.validation = event
        elif event.event == "step":
            self.step = event
            self.speeds = [*self.speeds[-49:], event.tokens_per_second or 0.0]
            self.pending.append(event.loss or 0.0)
            if len(self.pending) == self.every:
                self.losses = [*self.losses, sum(self.pending) / self.every]
                self.pending = []
            if len(self.losses) == _CURVE:
                self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=True)]
                self.every *= 2

    def __rich_console__(self, _console: Any, options: Any) -> Iterator[Any]:
        yield self._drawn(min(options.max_width, 80))

    def _drawn(self, width: int) -> Any:
        from rich import box
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        pairs = self._pairs()
        beside = 2 if width >= 80 else 1
        table = Table.grid(padding=(0, 2))
        for _ in range(2 * beside):
            table.add_column(no_wrap=True, overflow="crop")
        for first in range(0, len(pairs), beside):
            table.add_row(*(Text(word) for pair in pairs[first : first + beside] for word in pair))
        curve = sparkline(self.losses, min(60, width - 4), utf8=self.utf8)
        body = Group(table, Text("curve"), Text(curve)) if pairs else Text("preparing the first step")
        title = "saving the work; Ctrl-C once more stops at once" if self.stopping() else self.title
        return Panel(body, title=title, box=box.ROUNDED if self.utf8 else box.ASCII, width=width)

    def _pairs(self) -> list[tuple[str, str]]:
        """What the panel says, each with its name; nothing before the first step."""
        event, held = self.step, self.validation
        if event is None:
            return []
        share = event.progress
        left = event.elapsed_seconds * (1 - share) / share if share > 0 else 0.0
        total = f" of {event.total_steps:,}" if event.total_steps else ""
        return [
            ("step", f"{event.step:,}{total}"),
            ("progress", self._bar(share)),
            ("loss", f"{event.loss:.4f} nats/token"),
            ("speed", f"{sorted(self.speeds)[len(self.speeds) // 2]:,.0f} tokens/s"),
            ("validation", _measure(held) if held else "none yet"),
            ("learning rate", f"{event.learning_rate:.2e}"),
            ("memory", self._memory()),
            ("time left", f"{duration(left)} ({duration(event.elapsed_seconds)} gone)"),
        ]

    def _bar(self, share: float) -> str:
        full = round(share * 16)
        filled, empty = ("█", "░") if self.utf8 else ("#", ".")
        return f"{filled * full}{empty * (16 - full)} {share:4.0%}"

    @staticmethod
    def _memory() -> str:
        from llmcli.data.heap import resident_bytes

        held = resident_bytes()
        return size(held) if held else "unknown"
