"""Settings of fine-tuning and of labelled data; `llmcli.config` gives them out with the others."""

from __future__ import annotations

import dataclasses

from llmcli.settings import setting

TASKS = ("chat", "classify", "answer", "summarize", "prefer", "embed", "choice")  # that labelled data serve


@dataclasses.dataclass(frozen=True)
class LabelledConfig:
    """How labelled examples are read from files."""

    columns: str | None = setting(
        None,
        "Which field is what: text=review,label=stars; by number in a table without names (default: recognised).",
        group="Reading",
        metavar="NAME=FIELD,...",
    )
    encoding: str = setting(
        "auto",
        "Encoding of the input; auto takes the mark, then UTF-8, then detects.",
        group="Reading",
        metavar="auto|NAME",
    )
    errors: str = setting(
        "strict",
        "Bytes that the encoding does not have: stop, or replace them.",
        group="Reading",
        choices=("strict", "replace"),
    )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How a model is fine-tuned, whatever the task. None means: decided from the rest, and written to config.toml."""

    epochs: float | None = setting(
        None, "Stop after so many passes over the data (default: 3).", group="Length", above=0, maximum=1e6
    )
    max_steps: int | None = setting(None, "Stop after so many steps.", group="Length", minimum=1, maximum=2**63 - 1)
    max_seconds: float | None = setting(
        None, "Stop after so many seconds, validation included.", group="Length", above=0
    )

    max_length: int | None = setting(
        None, "Tokens of an example at most (default: the model's context).", group="Data", minimum=2
    )
    on_long: str = setting(
        "error",
        "Examples that are longer: stop and count them, cut their end off, or leave them out.",
        group="Data",
        choices=("error", "cut", "drop"),
    )

    batch_size: int = setting(16, "Examples of a step.", group="Training", minimum=1, maximum=1 << 20)
    grad_accumulation: int = setting(1, "Pieces that a step's examples are worked off in.", group="Training", minimum=1)
    optimizer: str = setting("adamw", "For the matrices of the blocks.", group="Training", choices=("adamw", "muon"))
    learning_rate: float | None = setting(
        None,
        "Peak, for the blocks (default: 1e-4, with --lora 5e-4; muon 2e-3; preferences: a tenth).",
        group="Training",
        aliases=("--lr",),
        above=0,
        maximum=1e30,
    )
    embedding_learning_rate: float | None = setting(
        None,
        "Peak, for embedding, head and norms (default: as the blocks; muon: 1e-4).",
        group="Training",
        above=0,
        maximum=1e30,
    )
    warmup_steps: int | None = setting(None, "Steps of rising rate (default: 5 %).", group="Training", minimum=0)
    decay_fraction: float = setting(
        1.0, "Share of the run, at its end, in which the rate falls to 0.", group="Training", minimum=0, maximum=1
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay of the matrices.", group="Training", minimum=0)
    max_grad_norm: float = setting(
        1.0, "Gradients are scaled down to this norm; 0: never.", group="Training", minimum=0
    )
    dropout: float | None = setting(
        None,
        "Share of the embeddings and of each block's outputs that is left out in training (default: what an encoder's "
        "config.json says; of a decoder 0).",
        group="Training",
        minimum=0,
        maximum=0.9,
    )
    seed: int = setting(
        0, "Of new weights, data order, dropout and the split.", group="Training", minimum=0, maximum=2**63 - 1
    )

    val_split: float = setting(
        0.1,
        "Share of the examples held out, where DATA brings no validation files; 0: none.",
        group="Validation",
        minimum=0,
        maximum=0.9,
    )
    validation: str | None = setting(
        None, "File of examples to validate on, beside those in DATA.", group="Validation", metavar="FILE"
    )
    allow_overlap: bool = setting(False, "Take validation examples that are trained on too.", group="Validation")
    eval_every: int | None = setting(
        None, "Steps between validations (default: twice an epoch, 20 in all at most).", group="Validation", minimum=1
    )
    patience: int = setting(
        0, "Stop after so many validations without a better one; 0: never.", group="Validation", minimum=0
    )

    save_every: int | None = setting(
        None, "Steps between checkpoints (default: as validations).", group="Saving", minimum=1
    )
    save_total_limit: int = setting(2, "Checkpoints that are kept; 0: all.", group="Saving", minimum=0)

    device: str = setting("auto", "Where to train.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )
    precision: str = setting(
        "auto",
        "Of the activations; auto: bfloat16 where the hardware has it.",
        group="Machine",
        choices=("auto", "float32", "bfloat16"),
    )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of all weights (arXiv:2106.09685); names as PEFT has them."""

    lora: bool = setting(False, "Train low-rank adapters, and leave the model as it is.", group="LoRA")
    lora_rank: int = setting(16, "Their rank.", group="LoRA", minimum=1, maximum=4096)
    lora_alpha: float = setting(32.0, "They are scaled by alpha / rank.", group="LoRA", above=0, maximum=1e6)
    lora_dropout: float = setting(0.0, "Share of their inputs that is left out.", group="LoRA", minimum=0, maximum=0.9)
    lora_targets: str = setting(
        "all", "Which matrices get one: all of the blocks, or names.", group="LoRA", metavar="all|NAME,..."
    )
    lora_kind: str = setting(
        "lora", "dora learns each row's length apart (arXiv:2402.09353).", group="LoRA", choices=("lora", "dora")
    )


@dataclasses.dataclass(frozen=True)
class ClassifyTuneConfig:
    """What is particular to learning labels."""

    multi_label: bool = setting(False, "Each text has any number of labels.", group="Labels")
    class_weights: str = setting(
        "none",
        "balanced: rare labels count more, each label as much as any other in all.",
        group="Labels",
        choices=("none", "balanced"),
    )


@dataclasses.dataclass(frozen=True)
class AnswerTuneConfig:
    """What is particular to learning answers on an encoder, which finds them in the text."""

    doc_stride: int = setting(
        128,
        "Encoders: tokens of a long text that two windows share; at most half of a window.",
        group="Answers",
        minimum=0,
        maximum=1 << 20,
    )
    max_answer_length: int = setting(
        32, "Encoders: tokens of an answer at most, in validation.", group="Answers", minimum=1, maximum=1 << 20
    )


@dataclasses.dataclass(frozen=True)
class EmbedTuneConfig:
    """What is particular to learning vectors of texts."""

    pooling: str | None = setting(
        None,
        "How a text's tokens become one vector (default: the model's own, else mean).",
        group="Vectors",
        choices=("cls", "mean", "last", "max"),
    )
    dimensions: str | None = setting(
        None,
        "Train the first so many too, to be kept alone: 384,256,128:0.5 (weights 1 where none is given).",
        group="Vectors",
        metavar="SIZE[:WEIGHT],...",
    )
    scale: float = setting(
        20.0, "What cosines are multiplied by: one over the temperature.", group="Vectors", above=0, maximum=1e4
    )


@dataclasses.dataclass(frozen=True)
class PreferTuneConfig:
    """What is particular to learning preferences (DPO, arXiv:2305.18290)."""

    beta: float = setting(
        0.1, "How dear it is to part from the model as it was.", group="Preferences", above=0, maximum=1e6
    )
    label_smoothing: float = setting(
        0.0,
        "Share of the pairs that may be labelled the wrong way round.",
        group="Preferences",
        minimum=0,
        maximum=0.49,
    )


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Which settings are tried, and how."""

    sweep: tuple[str, ...] = setting(
        (), "Try each of these values; may be given again, for each combination.", group="Search", metavar="NAME=V,..."
    )
    sweep_method: str = setting(
        "grid",
        "Run every trial to its end, or stop the worse half again and again, ever later.",
        group="Search",
        choices=("grid", "halving"),
    )


@dataclasses.dataclass(frozen=True)
class ClassifyConfig:
    """How texts are classified."""

    threshold: float = setting(
        0.5, "Of a model with several labels a text: those that are at least so probable.", minimum=0, maximum=1
    )
    batch_size: int = setting(32, "Texts at once.", group="Machine", minimum=1, maximum=4096)
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )
