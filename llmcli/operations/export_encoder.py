"""`export` of an encoder: BERT, RoBERTa or DistilBERT to an ONNX folder that is checked before it gets its name.

Invariant: the output place holds a folder that passed its checks, or what it held before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcli.config import ExportConfig, TextConfig
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import CheckError, ConfigError, DataError
from llmcli.files.artefacts import size_of
from llmcli.files.atomic import staged_folder, write_file, write_json
from llmcli.files.manifest import write_manifest
from llmcli.files.tensors import weight_files
from llmcli.models.encoder_config import EncoderConfig, kind_of_head, read_encoder_config
from llmcli.models.pooling import Pooling, read_pooling
from llmcli.operations.export import CONFIG, REPORT, ExportReport, lineage
from llmcli.operations.export_encoder_check import EncoderCheckReport, check_encoder, reference_texts
from llmcli.operations.records import Progress

if TYPE_CHECKING:
    from llmcli.onnx.folder import GraphFigures
    from llmcli.onnx.quantize import Plan

# What sentence-transformers reads beside a model.
_BESIDE = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_POOLING = Pooling("mean")  # of a folder that names none
_CLOSE = 0.98  # mean cosine below which int8 leaves activations to each row


@dataclasses.dataclass(frozen=True)
class _Source:
    """What is exported."""

    folder: Path
    shape: EncoderConfig
    kind: str
    pooling: Pooling
    tokenizer: TextTokenizer
    texts: list[list[int]]  # to measure on


def export_encoder(
    folder: Path,
    settings: dict[str, Any],
    output: str | Path,
    config: ExportConfig,
    text: TextConfig,
    *,
    overwrite: bool = False,
) -> Iterator[Progress | ExportReport]:
    """Exports the encoder in `folder`, whose config.json says `settings`. Yields Progress, last an ExportReport.

    Raises CheckError where the graph does not give what the model gives; nothing is left at `output` then.
    """
    began = time.perf_counter()
    plans = _plans(config)
    shape = read_encoder_config(settings, str(folder / CONFIG))
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {shape.vocab_size}", where=str(folder)
        )
    pooling = read_pooling(folder) or _POOLING
    if pooling.mode == "none":
        pooling = dataclasses.replace(_POOLING, normalize=pooling.normalize)
    kind = kind_of_head(settings) if config.head == "auto" else config.head
    texts = reference_texts(tokenizer, config.calibration, text, shape.longest) if config.check else []
    source = _Source(folder, shape, kind, pooling, tokenizer, texts)
    prepared = time.perf_counter() - began
    for number, plan in enumerate(plans, 1):
        last = number == len(plans)
        try:
            report = yield from _exported(source, output, plan, config, prepared, overwrite=overwrite, close=not last)
        except CheckError:
            if last:
                raise
            continue
        yield report
        return


def _plans(config: ExportConfig) -> list[Plan]:
    """What each matrix becomes, and what it becomes where that is not close enough."""
    from llmcli.operations.export import plan_of

    for name, only in (("precision", ("fp32", "int8", "int4")), ("prefill", ("auto", "same")), ("target", ("ort",))):
        if getattr(config, name) not in only:
            raise ConfigError(f"of an encoder is one of {', '.join(only)}", where=name)
    if config.embedding == "mixed" or config.quantizer in ("calibrated", "sequential"):
        raise ConfigError("is meant for decoders", where="embedding" if config.embedding == "mixed" else "quantizer")
    for name in ("max_perplexity_increase", "max_label_changes"):
        if getattr(config, name) is not None:
            raise ConfigError("is not what an encoder is measured by; give --min-cosine", where=name)
    # One scale for all rows is faster (docs/log.md), and close enough for vectors.
    plan = dataclasses.replace(plan_of(config), activations="tensor", float_prompts=True)
    if config.check and (config.precision, config.quantizer) == ("int8", "auto"):
        return [plan, dataclasses.replace(plan, weight_only=True)]
    return [plan]


def _exported(
    source: _Source,
    output: str | Path,
    plan: Plan,
    config: ExportConfig,
    prepared: float,
    *,
    overwrite: bool,
    close: bool,
) -> Generator[Progress, None, ExportReport]:
    """Writes and checks one way of holding the matrices. `close`: one that is not close is refused too."""
    folder, began = source.folder, time.perf_counter()
    with staged_folder(output, overwrite=overwrite) as staged:
        figures = yield from _write(source, plan, staged)
        size, seconds = size_of(staged), prepared + time.perf_counter() - began
        _write_files(source, staged)
        checks: EncoderCheckReport | None = None
        if config.check:
            for record in check_encoder(folder, staged, source.kind, source.texts, config):
                if isinstance(record, Progress):
                    yield record
                else:
                    checks = record
        if close and checks is not None and min(checks.state_cosine, checks.vector_cosine or 1.0) < _CLOSE:
            raise CheckError("there is a way that may be closer")
        report = ExportReport(
            output=str(output),
            precision=config.precision,
            parameters=figures.weights,
            bits_per_weight=round(8 * figures.bytes / figures.weights, 3),
            size_bytes=size,
            source_bytes=sum(path.stat().st_size for path in weight_files(folder)),
            seconds=round(seconds, 3),
            checks=checks,
        )
        content = dataclasses.asdict(report)
        del content["output"]
        write_json(staged / REPORT, {"settings": dataclasses.asdict(config), "matrices": figures.kinds, **content})
        write_manifest(staged, lineage(folder, source.tokenizer))
    return report


def _write(source: _Source, plan: Plan, staged: Path) -> Generator[Progress, None, GraphFigures]:
    from llmcli.onnx.folder import GraphFigures, write_encoder

    pooling = source.pooling
    for record in write_encoder(
        source.folder, source.shape, plan, staged,
        kind=source.kind, pooling=pooling.mode, normalize=pooling.normalize,
    ):  # fmt: skip
        if isinstance(record, GraphFigures):
            return record
        yield Progress("export", record, source.shape.num_hidden_layers, "layers")
    raise AssertionError("a graph ends with its figures")


def _write_files(source: _Source, staged: Path) -> None:
    """What stands beside the graph: tokenizer, config, what sentence-transformers reads."""
    source.tokenizer.save(staged)
    write_file(staged / CONFIG, (source.folder / CONFIG).read_bytes())
    for name in _BESIDE:
        if (source.folder / name).is_file():
            write_file(staged / name, (source.folder / name).read_bytes())
    for place in sorted(source.folder.glob("[0-9]_*/config.json")):
        target = staged / place.parent.name
        target.mkdir()
        write_file(target / place.name, place.read_bytes())
