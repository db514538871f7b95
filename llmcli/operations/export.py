"""`export`: a model to an ONNX folder that is checked against it before it gets its name.

Invariant: the output place holds a folder that passed its checks, or what it held before.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcli import config as configs
from llmcli.config import ExportConfig, TextConfig
from llmcli.data.cores import available_cores
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import CheckError, ConfigError, DataError
from llmcli.files.artefacts import has_manifest, read_json, resolve_model, size_of
from llmcli.files.atomic import refuse_existing, staged_folder, write_file, write_json
from llmcli.files.manifest import read_manifest, sha256_of, versions, write_manifest
from llmcli.files.tensors import tensors_of, weight_files
from llmcli.models.config import DecoderConfig, read_config
from llmcli.models.encoder_config import is_encoder
from llmcli.models.labels import is_classifier, labels_of
from llmcli.operations.export_text import ReferenceText
from llmcli.operations.records import Progress

if TYPE_CHECKING:
    from llmcli.onnx.calibrate import Calibration
    from llmcli.onnx.folder import GraphFigures
    from llmcli.onnx.quantize import Plan, Quantizer
    from llmcli.operations.export_check import CheckReport
    from llmcli.operations.export_encoder_check import EncoderCheckReport
    from llmcli.operations.export_scores import ScoreReport

CONFIG, GENERATION, GENAI, REPORT = "config.json", "generation_config.json", "genai_config.json", "export.json"
_CALIBRATED = 8192  # tokens
# Of the ids: tokenizers give them in the order of merges, so the lowest quarter is three quarters of a text's tokens.
_COMMON = 0.25
# The products whose inputs reach furthest above the rest: in int8 with one scale for all of them these lose most.
_SENSITIVE = ("mlp.down_proj", "mlp.c_proj")
_WIDE = 1024  # hidden size from which int4's blocks of 128 are worth what they cost in quality
_SMALL = 400_000_000  # weights up to which prompts are worth as much memory again
_PATIENCE = 100_000_000  # weights up to which int4 is searched for by itself: minutes, not hours
# Percent of perplexity, or of a classifier's labels: int8 that costs more keeps the sensitive matrices in blocks.
_LITTLE = 0.5
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True, slots=True)
class ExportReport:
    """What was made, and what its checks gave (None where there were none)."""

    output: str
    precision: str
    parameters: int  # in matrices
    bits_per_weight: float  # of all matrices, embedding and head among them
    size_bytes: int  # of the graph and its data
    source_bytes: int  # of the model's weights
    seconds: float  # without the checks
    checks: CheckReport | ScoreReport | EncoderCheckReport | None


def export(
    model: str | Path,
    output: str | Path,
    config: ExportConfig = ExportConfig(),  # noqa: B008  (frozen)
    text: TextConfig = TextConfig(),  # noqa: B008
    *,
    overwrite: bool = False,
) -> Iterator[Progress | ExportReport]:
    """Exports a model folder or a run; `text`: how the calibration text is read. Yields Progress, last an ExportReport.

    Raises CheckError where the graph does not give what the model gives; nothing is left at `output` then.
    """
    configs.check(config)
    configs.check(text)
    refuse_existing(output, overwrite=overwrite)
    began = time.perf_counter()
    folder = resolve_model(model, onnx=False)
    settings = read_json(folder / CONFIG)
    if is_encoder(settings):
        from llmcli.operations.export_encoder import export_encoder

        yield from export_encoder(folder, settings, output, config, text, overwrite=overwrite)
        return
    if config.head != "auto" or config.min_cosine is not None:
        raise ConfigError("is meant for encoders", where="head" if config.head != "auto" else "min_cosine")
    shape = read_config(settings, str(folder / CONFIG))
    labels = len(labels_of(settings, str(folder / CONFIG))) if is_classifier(settings) else None
    if labels is not None:
        shape = dataclasses.replace(shape, tie_word_embeddings=True)  # it has no head for tokens
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {shape.vocab_size}", where=str(folder)
        )
    config = settle(config, sum(math.prod(entry.shape) for entry in tensors_of(folder).values()), labels is not None)
    plan = plan_of(config, labelled=labels is not None, width=shape.hidden_size)
    reference: ReferenceText | None = None
    if config.check or plan.quantizer.needs_moments or config.quantizer == "sequential":
        reference = ReferenceText(tokenizer, config.calibration, text, shape.max_position_embeddings)
    if reference is not None and plan.quantizer.needs_moments:
        plan = dataclasses.replace(plan, moments=_calibration(folder, shape, reference, config))
    if reference is not None and config.quantizer == "sequential":
        plan = dataclasses.replace(plan, quantizer=_sequential(folder, shape, reference, config))
    source, prepared = _Source(folder, settings, shape, tokenizer, labels, reference), time.perf_counter() - began
    plans = [plan]
    if config.check and (config.precision, config.quantizer, config.target) == ("int8", "auto", "ort"):
        plans.append(dataclasses.replace(plan, in_blocks=_SENSITIVE))
    for number, chosen in enumerate(plans, 1):
        try:
            report = yield from _exported(
                source, output, chosen, config, prepared, overwrite=overwrite, exact=number < len(plans)
            )
        except CheckError:
            if number == len(plans):
                raise
            continue
        yield report
        return


@dataclasses.dataclass(frozen=True)
class _Source:
    """What is exported."""

    folder: Path
    settings: dict[str, Any]  # of config.json
    shape: DecoderConfig
    tokenizer: TextTokenizer
    labels: int | None  # of a classifier
    text: ReferenceText | None  # to measure on


def _exported(
    source: _Source,
    output: str | Path,
    plan: Plan,
    config: ExportConfig,
    prepared: float,
    *,
    overwrite: bool,
    exact: bool,
) -> Generator[Progress, None, ExportReport]:
    """Writes and checks one way of holding the matrices. `prepared`: seconds that it took to get here.

    `exact`: a way that costs more than a little is refused too.
    """
    folder, began = source.folder, time.perf_counter()
    with staged_folder(output, overwrite=overwrite) as staged:
        figures = yield from _write(source, plan, staged, config.prefill)
        size, seconds = size_of(staged), prepared + time.perf_counter() - began
        _write_files(source, staged, genai=config.target == "ort" and source.labels is None)
        checks: CheckReport | ScoreReport | None = None
        for record in _checks(source, staged, figures.weights, config):
            if isinstance(record, Progress):
                yield record
            else:
                checks = record
        if exact and checks is not None and checks.cost > _LITTLE:
            raise CheckError("there is a way that may cost less")
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


def settle(config: ExportConfig, weights: int, labelled: bool = False) -> ExportConfig:
    """What is `auto` by name. `weights`: their number; `labelled`: of a classifier.

    int4's quantizer: the better ones where their time is well spent.
    """
    if config.prefill == "auto":
        pays = (config.precision, config.target) == ("int4", "ort") and weights <= _SMALL and not labelled
        config = dataclasses.replace(config, prefill="float" if pays else "same")
    if (config.precision, config.quantizer, config.target) != ("int4", "auto", "ort"):
        return config
    small = weights <= _PATIENCE
    if config.calibration is None:
        chosen = "search" if small else "round"
    else:
        chosen = "sequential" if small and config.prefill != "int8" else "calibrated"
    return dataclasses.replace(config, quantizer=chosen)


def plan_of(config: ExportConfig, *, labelled: bool = False, width: int = 0) -> Plan:
    """What each matrix becomes by the settings. `labelled`: of a classifier; `width`: a decoder's hidden size."""
    from llmcli.onnx.classifier import SCHEMES
    from llmcli.onnx.quantize import Plan
    from llmcli.onnx.quantizers import QUANTIZERS

    if config.prefill in ("float", "int8") and (config.precision != "int4" or config.target != "ort"):
        raise ConfigError("a second graph pays for int4 and the target ort alone", where="prefill")
    if config.prefill in ("float", "int8") and labelled:
        raise ConfigError("a classifier reads each text once, so a second graph is no use", where="prefill")
    if config.quantizer == "weight-only" and config.precision != "int8":
        raise ConfigError("is meant for int8: int4 leaves activations to each row anyway", where="quantizer")
    if config.quantizer in ("search", "calibrated", "sequential") and config.precision not in ("int4", "int8"):
        raise ConfigError(f"quantizes int4 and int8, not {config.precision}", where="quantizer")
    if config.quantizer == "sequential" and (config.prefill == "int8" or config.target != "ort"):
        raise ConfigError("sequential takes each matrix once: one graph, of the target ort", where="quantizer")
    if config.embedding == "mixed" and (config.precision != "int4" or config.target != "ort"):
        raise ConfigError("mixed is meant for int4 and the target ort", where="embedding")
    mixed = config.embedding == "mixed" or (config.embedding == "auto" and config.quantizer == "sequential")
    return Plan(
        common=_COMMON if mixed and config.precision == "int4" else 0.0,
        precision=config.precision,
        block_size=None if config.block_size == "auto" else int(config.block_size),
        largest=128 if width >= _WIDE and not labelled and config.target == "ort" else 64,
        weight_only=config.quantizer == "weight-only",
        portable=config.target == "portable",
        schemes=SCHEMES if labelled else {},
        float_prompts=labelled,  # whose texts are read whole
        quantizer=QUANTIZERS[config.quantizer if config.quantizer in QUANTIZERS else "round"](),
    )


def _calibration(folder: Path, shape: DecoderConfig, text: ReferenceText, config: ExportConfig) -> Calibration:
    """What a quantizer wants to know of each product's inputs, computed as it asks."""
    from llmcli.onnx.calibrate import Calibration
    from llmcli.onnx.families import ModelWeights
    from llmcli.onnx.weights import Weights

    windows = text.calibrated(_CALIBRATED)
    return Calibration(shape, ModelWeights(shape, Weights(folder)), windows, config.threads or available_cores())


def _sequential(folder: Path, shape: DecoderConfig, text: ReferenceText, config: ExportConfig) -> Quantizer:
    """The quantizer that follows the model's own computation, block after block."""
    from llmcli.onnx.families import ModelWeights
    from llmcli.onnx.least_error import LeastError
    from llmcli.onnx.sequential import Sequential
    from llmcli.onnx.weights import Weights

    windows, threads = text.calibrated(2 * _CALIBRATED), config.threads or available_cores()
    return Sequential(shape, ModelWeights(shape, Weights(folder)), windows, threads, LeastError(zero_points=True))


def _write(source: _Source, plan: Plan, staged: Path, prefill: str) -> Generator[Progress, None, GraphFigures]:
    from llmcli.onnx.folder import GraphFigures, write_graph

    shape = source.shape
    for record in write_graph(source.folder, shape, plan, staged, prefill=prefill, labels=source.labels):
        if isinstance(record, GraphFigures):
            return record
        yield Progress("export", record, shape.num_hidden_layers, "layers")
    raise AssertionError("a graph ends with its figures")


def _checks(
    source: _Source, staged: Path, parameters: int, config: ExportConfig
) -> Iterator[Progress | CheckReport | ScoreReport]:
    """The gate, where it is asked for."""
    if not config.check or source.text is None:
        return
    if source.labels is not None:
        from llmcli.operations.export_scores import check_scores

        yield from check_scores(source.folder, staged, source.text, parameters, config)
        return
    from llmcli.operations.export_check import check_export

    yield from check_export(source.folder, staged, source.text, parameters, config)


def _write_files(source: _Source, staged: Path, *, genai: bool) -> None:
    """What stands beside the graph: tokenizer, configs. `genai`: onnxruntime-genai's, which knows the operators."""
    from llmcli.onnx.folder import genai_config

    folder, settings, tokenizer = source.folder, source.settings, source.tokenizer
    tokenizer.save(staged)
    write_file(staged / CONFIG, (folder / CONFIG).read_bytes())
    generation: dict[str, Any] = {}
    if (folder / GENERATION).is_file():
        generation = read_json(folder / GENERATION)
        write_file(staged / GENERATION, (folder / GENERATION).read_bytes())
    ids = {key: generation.get(key, settings.get(key)) for key in _SPECIAL}
    if ids["eos_token_id"] is None:
        ids["eos_token_id"] = tokenizer.eos_id
    if genai:
        write_json(staged / GENAI, genai_config(source.shape, ids))


def lineage(folder: Path, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Where the folder comes from: the model's files by their hashes."""
    if has_manifest(folder):
        files = {name: entry["sha256"] for name, entry in read_manifest(folder)["files"].items()}
    else:
        files = {path.name: sha256_of(path) for path in (folder / CONFIG, *weight_files(folder))}
    return {"parent": files, "tokenizer": tokenizer.hash, **versions()}
