"""Settings of evaluation; `llmcli.config` gives them out with the others."""

from __future__ import annotations

import dataclasses

from llmcli.settings import setting

EVALUATE_TASKS = ("lm", "chat", "choice", "classify", "answer", "summarize", "prefer", "embed")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How a model is measured on text, or on labelled examples."""

    task: str | None = setting(
        None,
        "What is measured (default: lm, how well text is predicted); the others are told under --help.",
        choices=EVALUATE_TASKS,
    )
    limit: int | None = setting(
        None, "At most so many examples of each file; of lm so many tokens.", group="Measurement", minimum=1
    )
    stride: int | None = setting(
        None,
        "lm: tokens that a window scores; it sees context - stride before them (default: half the context).",
        group="Measurement",
        minimum=1,
    )
    max_new_tokens: int | None = setting(
        None,
        "answer, summarize: tokens of a text at most (default: 32, 128).",
        group="Measurement",
        aliases=("--max-tokens",),
        minimum=1,
    )
    label_names: str | None = setting(
        None,
        "classify by a model that learnt no labels: what it is to say for each, as 0=negative,1=positive.",
        group="Measurement",
        metavar="LABEL=TEXT,...",
    )
    fail_under: str | None = setting(
        None,
        "Exit with 3 where a metric is worse than this: accuracy=0.8,macro_f1=0.75 (of a loss: higher).",
        group="Measurement",
        metavar="METRIC=NUMBER,...",
    )
    batch_size: int | None = setting(
        None,
        "Windows, texts or prompts at once (default: as many as make 8,192 tokens; 8 prompts).",
        group="Measurement",
        minimum=1,
        maximum=4096,
    )
    seed: int = setting(
        0, "Of the intervals and p-values, which are drawn.", group="Measurement", minimum=0, maximum=2**63 - 1
    )
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    quantize: str | None = setting(
        None, "Round the weights as they are read (not of ONNX folders).", group="Machine", choices=("int8", "int4")
    )
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )
