"""`llmcli quickstart`: the whole way once, shown."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from llmcli.cli.info import size
from llmcli.cli.options import GroupedCommand, is_json, overwrite_option, shared_options
from llmcli.cli.running import Signals
from llmcli.cli.streams import notice, write_json, write_out
from llmcli.errors import StoppedError

if TYPE_CHECKING:
    from llmcli.operations.quickstart import StageDone


@click.command(cls=GroupedCommand)
@click.argument("inputs", metavar="[TEXT]...", nargs=-1)
@click.option("-o", "--output", default="quickstart", show_default=True, metavar="DIR", help="Folder for everything.")
@click.option("--seconds", default=90.0, show_default=True, type=click.FloatRange(5.0), help="Time for training.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of weights, order and sample.")
@overwrite_option
@shared_options
def quickstart(inputs: tuple[str, ...], output: str, seconds: float, seed: int, overwrite: bool) -> None:
    """Text to tokenizer, corpus, model, int4 and generated text, in minutes.

    Without TEXT the corpus is what Python itself brings: its help topics and the docstrings of its standard library.
    The model is also fine-tuned, in a sixth of the time, to answer what Python's functions do.

    \b
    Example:
      llmcli quickstart notes.txt -o first --seconds 30
    """
    from llmcli.cli.display import progress, training
    from llmcli.operations import quickstart as operation
    from llmcli.operations.records import Progress
    from llmcli.operations.training_run import Started
    from llmcli.training.loop import TrainingEvent

    stages: list[StageDone] = []
    trained = False
    signals = Signals()
    work = operation.quickstart(inputs, output, seconds=seconds, seed=seed, overwrite=overwrite, stopping=signals)
    with signals.caught(), contextlib.closing(work), contextlib.ExitStack() as stack:
        show: Any = stack.enter_context(progress("quickstart"))
        for record in work:
            if isinstance(record, Started):
                trained = True
                stack.close()
                show = stack.enter_context(training(record))
            elif isinstance(record, TrainingEvent | Progress):
                show(record)
                if record.__class__ is TrainingEvent and record.event == "end":
                    stack.close()
                    show = stack.enter_context(progress("quickstart"))
            else:
                stages.append(record)
                if is_json():
                    write_json(record)
                else:
                    notice(f"{record.stage:<11} {record.made}  {_seconds(record)}")
            if signals() and isinstance(record, Progress):
                break
    if signals():
        told = f"stopped; {output}/run is saved" if trained else "stopped before training"
        raise StoppedError(told, signal_number=signals.number)
    if not is_json():
        write_out(_summary(stages, output))


def _seconds(stage: StageDone) -> str:
    return f"({stage.seconds:.1f} s)"


def _value(name: str, value: Any) -> str:
    if name.split("_")[-1] == "bytes":
        return size(value)
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _label(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _summary(stages: list[StageDone], output: str) -> str:
    """The closing table, the sample, the completions, and what to do next."""
    found = {stage.stage: stage for stage in stages}
    rows = []
    for stage in stages:
        if stage.stage in ("sample", "completion", "answer", "int4"):
            continue
        figures = ", ".join(f"{_label(name)} {_value(name, value)}" for name, value in stage.figures.items())
        rows.append(f"{stage.stage:<10} {stage.seconds:>6.1f} s  {figures}")
    lines = ["", *rows]
    sample, completion, answer, quantized = (found.get(name) for name in ("sample", "completion", "answer", "int4"))
    if sample is not None:
        lines += ["", "The model writes:", sample.figures["prompt"] + sample.figures["text"]]
    if completion is not None:
        lines += ["", f"It completes {completion.figures['prefix']!r}:"]
        lines += [f"  {item['probability']:.3f}  {item['text']}" for item in completion.figures["completions"]]
    if answer is not None:
        lines += ["", f"It was taught what Python's functions do. {answer.figures['question']}", answer.figures["text"]]
    if quantized is not None:
        lines += ["", "In int4, on onnxruntime, it writes:", quantized.figures["prompt"] + quantized.figures["text"]]
    model = f"{output}/run/model"
    lines += [
        "",
        "Go on with:",
        f'  llmcli generate -m {model} "The module"',
        f'  llmcli generate -m {output}/int4 "The module"',
        f'  llmcli complete -m {model} "import "',
        f"  llmcli chat -m {output}/chat",
        f"  llmcli pretrain {output}/corpus -o runs/longer --preset 4m",
        f"  llmcli info {model}",
        f"  llmcli plot {output}/run",
    ]
    return "\n".join(lines) + "\n"
