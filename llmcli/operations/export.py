"""`export`: a model to an ONNX folder that is checked against it before it gets its name.

Invariant: the output place holds a folder that passed its checks, or what it held before.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcli import config as configs
from llmcli.config import ExportConfig
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import ConfigError, DataError
from llmcli.files.artefacts import has_manifest, read_json, resolve_model, size_of
from llmcli.files.atomic import refuse_existing, staged_folder, write_file, write_json
from llmcli.files.manifest import read_manifest, sha256_of, versions, write_manifest
from llmcli.files.tensors import weight_files
from llmcli.models.config import DecoderConfig, read_config
from llmcli.operations.records import Progress

if TYPE_CHECKING:
    from llmcli.onnx.quantize import Plan

CONFIG, GENERATION, GENAI, REPORT = "config.json", "generation_config.json", "genai_config.json", "export.json"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True, slots=True)
class ExportReport:
    """What was made, and what its checks gave (None where there were none)."""

    output: str
    precision: str
    bits_per_weight: float
    size_bytes: int
    source_bytes: int
    seconds: float
    checks: dict[str, Any] | None


def export(
    model: str | Path,
    output: str | Path,
    config: ExportConfig = ExportConfig(),  # noqa: B008  (frozen)
    *,
    overwrite: bool = False,
) -> Iterator[Progress | ExportReport]:
    """Exports a model folder or a run. Yields Progress, last an ExportReport.

    Raises CheckError where the graph does not give what the model gives; nothing is left at `output` then.
    """
    configs.check(config)
    refuse_existing(output, overwrite=overwrite)
    began = time.perf_counter()
    folder = resolve_model(model, onnx=False)
    settings = read_json(folder / CONFIG)
    shape = read_config(settings, str(folder / CONFIG))
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {shape.vocab_size}", where=str(folder)
        )
    plan = plan_of(config)
    with staged_folder(output, overwrite=overwrite) as staged:
        yield from _write(folder, shape, plan, staged)
        _write_files(folder, settings, shape, tokenizer, staged)
        checks = None
        report = ExportReport(
            output=str(output),
            precision=config.precision,
            bits_per_weight=0.0,
            size_bytes=size_of(staged),
            source_bytes=sum(path.stat().st_size for path in weight_files(folder)),
            seconds=round(time.perf_counter() - began, 3),
            checks=checks,
        )
        content = dataclasses.asdict(report)
        del content["output"]
        write_json(staged / REPORT, {"settings": dataclasses.asdict(config), **content})
        write_manifest(staged, _lineage(folder, tokenizer))
    yield report


def plan_of(config: ExportConfig) -> Plan:
    """What each matrix becomes by the settings."""
    from llmcli.onnx.quantize import QUANTIZERS, Plan

    if config.quantizer == "weight-only" and config.precision != "int8":
        raise ConfigError("is meant for int8: int4 leaves activations to each row anyway", where="quantizer")
    method = "round" if config.quantizer in ("auto", "weight-only") else config.quantizer
    return Plan(
        precision=config.precision,
        block_size=None if config.block_size == "auto" else int(config.block_size),
        weight_only=config.quantizer == "weight-only",
        quantizer=QUANTIZERS[method](),
    )


def _write(folder: Path, shape: DecoderConfig, plan: Plan, staged: Path) -> Iterator[Progress]:
    from llmcli.onnx.folder import write_graph

    for done in write_graph(folder, shape, plan, staged):
        yield Progress("export", done, shape.num_hidden_layers, "layers")


def _write_files(
    folder: Path, settings: dict[str, Any], shape: DecoderConfig, tokenizer: TextTokenizer, staged: Path
) -> None:
    """What stands beside the graph: tokenizer, configs."""
    from llmcli.onnx.folder import genai_config

    tokenizer.save(staged)
    write_file(staged / CONFIG, (folder / CONFIG).read_bytes())
    generation: dict[str, Any] = {}
    if (folder / GENERATION).is_file():
        generation = read_json(folder / GENERATION)
        write_file(staged / GENERATION, (folder / GENERATION).read_bytes())
    ids = {key: generation.get(key, settings.get(key)) for key in _SPECIAL}
    if ids["eos_token_id"] is None:
        ids["eos_token_id"] = tokenizer.eos_id
    write_json(staged / GENAI, genai_config(shape, ids))


def _lineage(folder: Path, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Where the folder comes from: the model's files by their hashes."""
    if has_manifest(folder):
        files = {name: entry["sha256"] for name, entry in read_manifest(folder)["files"].items()}
    else:
        files = {path.name: sha256_of(path) for path in (folder / CONFIG, *weight_files(folder))}
    return {"parent": json.dumps(files, sort_keys=True), "tokenizer": tokenizer.hash, **versions()}
