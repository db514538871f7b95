"""`bench`: how fast a model reads prompts and decodes, on this machine.

Invariant: what is timed is the session alone, on drawn ids: no tokenizer, no sampling. Rounds alternate between the
batch sizes, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import dataclasses
import importlib
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llmcli import config as configs
from llmcli.config import BenchConfig
from llmcli.data.cores import available_cores
from llmcli.data.heap import resident_bytes
from llmcli.errors import UsageError
from llmcli.files.artefacts import GRAPH, AdaptedModel, Model, ModelPlace, find_model, is_onnx
from llmcli.files.onnx_header import read_onnx
from llmcli.operations.doctor import has_int8_products
from llmcli.operations.records import Progress
from llmcli.runtime.open import open_session
from llmcli.runtime.session import Session

PREFILL, DECODE = "prefill", "decode"
_COPIED = 1 << 27  # bytes: more than any cache holds


@dataclasses.dataclass(frozen=True, slots=True)
class BenchRun:
    """A measurement: the median of its rounds, and how far they lie apart."""

    test: str  # prefill: prompts are read; decode: tokens follow one by one
    tokens: int  # of each row: read, or decoded
    batch: int  # rows
    tokens_per_second: float  # of all rows together
    spread: float  # the fastest round less the slowest, as a share of the median


@dataclasses.dataclass(frozen=True, slots=True)
class BenchReport:
    """What was measured of a model."""

    model: str
    runs: tuple[BenchRun, ...]
    load_seconds: float  # the engine's own import left out
    first_token_seconds: float  # from opening the model to the logits after a prompt
    memory_bytes: int | None  # that the process grew by; None: the system does not say
    weight_bytes: int  # that decoding a token reads
    bandwidth: float | None  # bytes of weights a second, decoding one row; None: that was not asked for
    machine_bandwidth: float  # bytes a second that copying reads and writes here, on as many threads
    notes: tuple[str, ...]


def bench(
    models: Model | Sequence[Model],
    config: BenchConfig = BenchConfig(),  # noqa: B008  (frozen)
) -> Iterator[Progress | BenchReport]:
    """Measures models one after the other; yields Progress, and a BenchReport for each.

    Raises UsageError where prompt and new tokens do not fit a model's context.
    """
    configs.check(config)
    named = [models] if isinstance(models, str | Path | AdaptedModel) else list(models)
    places = [find_model(model) for model in named]
    machine = copy_bandwidth(config.threads or available_cores())
    for name, place in zip(named, places, strict=True):
        yield from _measured(str(name), place, config, machine)


def _measured(name: str, place: ModelPlace, config: BenchConfig, machine: float) -> Iterator[Progress | BenchReport]:
    folder = place.folder
    importlib.import_module("onnxruntime" if is_onnx(folder) else "llmcli.runtime.torch_session")
    before, began = resident_bytes(), time.perf_counter()
    session = open_session(place, device=config.device, threads=config.threads, quantize=config.quantize)
    loaded = time.perf_counter()
    try:
        wanted = config.prompt_tokens + config.new_tokens
        if wanted > session.context:
            raise UsageError(
                f"{config.prompt_tokens} and {config.new_tokens} tokens do not fit the model's context of "
                f"{session.context}; ask for fewer by --prompt-tokens, --new-tokens",
                where=name,
            )
        session.start(_ids(session, 1, config.prompt_tokens).tolist())
        first = time.perf_counter()
        batches = list(dict.fromkeys(config.batch_size))
        found: dict[int, list[tuple[float, float]]] = {batch: [] for batch in batches}
        for number in range(config.rounds + 1):
            for batch in batches:
                found[batch].append(_seconds(session, batch, config))
            yield Progress(name, number + 1, config.rounds + 1, "rounds")
        after, weights = resident_bytes(), _weight_bytes(session, folder)
    finally:
        session.close()
    runs: list[BenchRun] = []
    for batch in batches:
        prefill, decode = zip(*found[batch][1:], strict=True)  # the first round makes ready what the others use
        runs.append(_run(PREFILL, config.prompt_tokens, batch, prefill))
        runs.append(_run(DECODE, config.new_tokens, batch, decode))
    single = next((run for run in runs if run.test == DECODE and run.batch == 1), None)
    yield BenchReport(
        model=name,
        runs=tuple(runs),
        load_seconds=round(loaded - began, 4),
        first_token_seconds=round(first - began, 4),
        memory_bytes=None if before is None or after is None else max(after - before, 0),
        weight_bytes=weights,
        bandwidth=None if single is None else round(single.tokens_per_second * weights),
        machine_bandwidth=round(machine),
        notes=tuple(_notes(folder)),
    )


def _ids(session: Session, rows: int, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.random.default_rng(0).integers(0, session.vocab_size, (rows, count), np.int64)


def _seconds(session: Session, batch: int, config: BenchConfig) -> tuple[float, float]:
    """Of reading a prompt in each row, and of decoding after them."""
    prompts, fed = _ids(session, batch, config.prompt_tokens), _ids(session, batch, config.new_tokens)
    began = time.perf_counter()
    session.start(prompts.tolist())
    middle = time.perf_counter()
    for place in range(config.new_tokens):
        session.feed(fed[:, place : place + 1])
    return middle - began, time.perf_counter() - middle


def _run(test: str, tokens: int, batch: int, seconds: Sequence[float]) -> BenchRun:
    speeds = [batch * tokens / item for item in seconds]
    median = statistics.median(speeds)
    return BenchRun(test, tokens, batch, round(median, 2), round((max(speeds) - min(speeds)) / median, 4))


def copy_bandwidth(threads: int) -> float:
    """Bytes a second, read and written, of copying arrays that no cache holds; the best of five."""
    source, target = np.ones(_COPIED, np.uint8), np.zeros(_COPIED, np.uint8)
    targets, sources = np.array_split(target, threads), np.array_split(source, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            best = max(best, 2 * _COPIED / (time.perf_counter() - began))
    return best


def _weight_bytes(session: Session, folder: Path) -> int:
    """Of the weights that decoding reads: not those of a second graph for prompts."""
    if not is_onnx(folder):
        return int(getattr(session, "model").step_bytes())  # noqa: B009  (torch's alone)
    tensors = read_onnx(folder / GRAPH).tensors
    return sum({(tensor.location, tensor.offset): tensor.length for tensor in tensors if tensor.location}.values())


def _notes(folder: Path) -> Iterator[str]:
    if not is_onnx(folder):
        return
    precision = read_onnx(folder / GRAPH).metadata.get("llmcli.precision", "")
    if precision in ("int8", "int4") and has_int8_products() is False:
        yield (
            f"this processor has no int8 dot products (VNNI): the {precision} folder may be slower than one in fp32; "
            "measure both"
        )
