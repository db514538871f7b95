"""`llmcli finetune TASK`: a model and labelled data to a model that does a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from llmcli.cli.options import HELP, GroupedCommand, settings, shared_options
from llmcli.cli.running import Signals, given_names, run_options, shown, tell_end, tell_plan
from llmcli.cli.search import is_sweep, search_options, show_rate, show_sweep, tell_sweep
from llmcli.config import (
    AnswerTuneConfig,
    ClassifyTuneConfig,
    EmbedTuneConfig,
    FinetuneConfig,
    LabelledConfig,
    LoraConfig,
    PreferTuneConfig,
    SweepConfig,
)
from llmcli.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


@click.group(context_settings=HELP)
def finetune() -> None:
    """Fine-tune a model for a task, on labelled data."""


def _task(*own: type) -> Callable[[F], click.Command]:
    """A command of the group: MODEL, DATA, the shared settings and those of the task alone."""

    def decorate(function: F) -> click.Command:
        for option in (
            shared_options,
            settings(FinetuneConfig, LoraConfig, LabelledConfig, *own, SweepConfig),
            search_options,
            run_options,
            click.option("-o", "--output", "run", required=True, metavar="DIR", help="Folder of the run."),
            click.argument("data", metavar="DATA...", nargs=-1, required=True),
            click.argument("model", metavar="MODEL"),
        ):
            function = option(function)
        return finetune.command(cls=GroupedCommand)(function)

    return decorate


@_task()
def chat(**values: Any) -> None:
    """Fine-tune a model to answer: conversations, instructions, prompts with completions.

    Learnt is what the assistant says, with the token that ends it. A model without a chat template gets ChatML.
    RUN/model holds the result, the best on validation. Ctrl-C saves; --resume goes on from there.

    \b
    Example:
      llmcli finetune chat runs/first alpaca.json -o runs/chat
      llmcli finetune chat runs/first alpaca.json -o runs/best --sweep learning_rate=1e-4,3e-4 --sweep batch_size=16,32
    """
    _run("chat", None, **values)


@_task(ClassifyTuneConfig)
def classify(classify_tune_config: ClassifyTuneConfig, **values: Any) -> None:
    """Fine-tune a model to give texts a label, or several.

    MODEL is a decoder or an encoder, which gets the head of its family. The names of the labels are kept in the model;
    `llmcli classify -m RUN` uses it.

    \b
    Example:
      llmcli finetune classify runs/first train.tsv dev.tsv -o runs/labels
    """
    _run("classify", classify_tune_config, **values)


@_task(AnswerTuneConfig)
def answer(answer_tune_config: AnswerTuneConfig, **values: Any) -> None:
    """Fine-tune a model to answer questions about a text, or to say that it does not answer them.

    The first answer of each question is learnt. A decoder answers in words; with --on-long cut the text is cut, never
    the question or the answer. An encoder finds the answer in the text, which it reads in windows of --max-length.

    \b
    Example:
      llmcli finetune answer runs/first train.json -o runs/answers
    """
    _run("answer", answer_tune_config, **values)


@_task(EmbedTuneConfig)
def embed(embed_tune_config: EmbedTuneConfig, **values: Any) -> None:
    """Fine-tune a model to give texts vectors that lie close where they are alike.

    DATA has pairs of texts with a score, anchors with a positive, or both with a negative. Texts of the same batch are
    the wrong ones that an anchor's own is told from. RUN/model is a folder of sentence-transformers.

    \b
    Example:
      llmcli finetune embed runs/encoder sts-train.csv sts-dev.csv -o runs/vectors --dimensions 384,128
    """
    _run("embed", embed_tune_config, **values)


@_task()
def summarize(**values: Any) -> None:
    """Fine-tune a model to summarize texts.

    The first summary of each text is learnt. With --on-long cut the text is cut, never its summary.

    \b
    Example:
      llmcli finetune summarize runs/first train.jsonl -o runs/summaries
    """
    _run("summarize", None, **values)


@_task(PreferTuneConfig)
def prefer(prefer_tune_config: PreferTuneConfig, **values: Any) -> None:
    """Fine-tune a model to give the better of two answers (DPO).

    DATA has a prompt with a chosen and a rejected answer. What the model gives both is computed once, before the first
    step, and kept in the run. Begin from a model that was tuned to chat.

    \b
    Example:
      llmcli finetune prefer runs/chat preferences.jsonl -o runs/preferred
    """
    _run("prefer", prefer_tune_config, **values)


def _run(
    task: str,
    own: Any,
    *,
    model: str,
    data: tuple[str, ...],
    run: str,
    resume: str | None,
    dry_run: bool,
    overwrite: bool,
    find_lr: bool,
    find_lr_steps: int,
    finetune_config: FinetuneConfig,
    lora_config: LoraConfig,
    labelled_config: LabelledConfig,
    sweep_config: SweepConfig,
) -> None:
    if find_lr and (sweep_config.sweep or resume or dry_run):
        raise UsageError("goes with none of --sweep, --resume and --dry-run", where="--find-lr")
    from llmcli.operations.finetune import finetune as operation
    from llmcli.operations.finetune import plan_finetuning

    asked = (finetune_config, lora_config, labelled_config, own)
    signals = Signals()
    if find_lr:
        from llmcli.operations.find_rate import find_rate

        show_rate(find_rate(task, model, data, run, *asked, steps=find_lr_steps, stopping=signals), signals)
        return
    if dry_run and sweep_config.sweep:
        from llmcli.operations.sweep import plan_sweep

        tell_sweep(plan_sweep(task, model, data, *asked, sweep_config))
        return
    if dry_run:
        tell_plan(plan_finetuning(task, model, data, *asked))
        return
    common: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "given": given_names(), "stopping": signals}
    if sweep_config.sweep or (resume and is_sweep(run)):
        from llmcli.operations.sweep import sweep

        show_sweep(sweep(task, model, data, run, *asked, sweep_config, **common), signals)
        return
    tell_end(run, shown(operation(task, model, data, run, *asked, **common), signals))
