"""Settings of `export`; `llmcli.config` holds those of the other commands and names this one too."""

from __future__ import annotations

import dataclasses

from llmcli.settings import setting


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """How a model becomes an ONNX folder."""

    precision: str = setting("int4", "Of the weights.", group="Export", choices=("fp32", "fp16", "int8", "int4"))
    block_size: str = setting(
        "auto",
        "Weights that share a scale; auto: 128 for int4's products from a hidden size of 1,024 on, else 64 where that "
        "divides, else 32.",
        group="Export",
        choices=("auto", "32", "64", "128"),
    )
    quantizer: str = setting(
        "auto",
        "How codes are chosen: round; search: scales of the least error; calibrated: the least error on text; "
        "sequential: block after block against the float model, the best and slowest; weight-only: int8 in blocks, "
        "closer still and slower with prompts and batches; auto: for int4 sequential (with --prefill int8 and above "
        "100 M weights calibrated) where --calibration is given, else search (above 100 M round); for int8 round, with "
        "the most sensitive products in blocks where the check finds more than 0.5 % of perplexity lost.",
        group="Export",
        choices=("auto", "round", "search", "calibrated", "sequential", "weight-only"),
    )
    embedding: str = setting(
        "auto",
        "Of int4, the rows of the commonest tokens in embedding and head (the lowest quarter of the ids): same: int4 "
        "too; mixed: int8; auto: mixed with sequential.",
        group="Export",
        choices=("auto", "same", "mixed"),
    )
    calibration: str | None = setting(
        None,
        "Text, or a corpus (its held-out part), to choose codes by and to measure the quantized model on (default: "
        "text that Python brings).",
        group="Export",
        metavar="PATH",
    )
    prefill: str = setting(
        "auto",
        "Of int4, how prompts are read: same: as single tokens; float: a second graph over the same weights leaves "
        "activations unquantized, the faster way at widths up to about a thousand, for as much memory again; int8: a "
        "second graph in int8, several times as fast, for more disk and memory; auto: float up to 400 M weights.",
        group="Export",
        choices=("auto", "same", "float", "int8"),
    )
    target: str = setting(
        "ort",
        "ort: the fast operators of onnxruntime; portable: standard operators alone.",
        group="Export",
        choices=("ort", "portable"),
    )
    head: str = setting(
        "auto",
        "Of an encoder: auto: the head that config.json names; base: none, so hidden states and the text's vector.",
        group="Export",
        choices=("auto", "base", "masked", "classifier", "span"),
    )
    check: bool = setting(True, "Compare with the model in torch before the folder gets its name.", group="Check")
    max_perplexity_increase: float | None = setting(
        None,
        "Percent of perplexity above float32 at which a quantized model is refused.",
        group="Check",
        metavar="PERCENT",
        above=0,
    )
    max_label_changes: float | None = setting(
        None,
        "Percent of texts whose label is not float32's at which a quantized classifier is refused (default: 5 int8, "
        "20 int4).",
        group="Check",
        metavar="PERCENT",
        above=0,
        maximum=100,
    )
    min_cosine: float | None = setting(
        None,
        "Mean cosine to float32's states and vectors below which a quantized encoder is refused (default: 0.97 int8, "
        "0.9 int4).",
        group="Check",
        metavar="COSINE",
        above=0,
        maximum=1,
    )
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1
    )
