"""What a path is: tokenizer, corpus, index, run, checkpoint or model, told by the files in it.

Invariant: the kind depends on names alone, so a damaged artefact still has its kind and `verify` can say what is wrong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmcli.errors import DataError, LlmcliError, from_os_error
from llmcli.files.manifest import MANIFEST, manifest_problems

KINDS = ("tokenizer", "corpus", "index", "run", "checkpoint", "adapter", "model", "onnx")
INDEX = "index.json"  # of pieces of files and their vectors
METRICS = "metrics.jsonl"
RUN_CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
RESULT = "model"  # the folder in a run that holds its best model
TRIALS = "trials"  # the folder in a sweep that holds a run for each combination of settings
SWEEP = "sweep.json"
GRAPH = "model.onnx"
ADAPTER_CONFIG = "adapter_config.json"
PREFILL = "prefill.onnx"  # a second graph over the same cache and data, which reads prompts
_ONNX = (GRAPH, f"{GRAPH}.data", "export.json")  # any of them: a folder that lost one is still of its kind
_INDEX = (INDEX, "pieces.jsonl", "pieces.npy", "bytes.npy", "steps.npy")  # two of them: the same
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_EXPECTED = (
    "tokenizer.json (a tokenizer), corpus.json (a corpus), index.json with pieces.jsonl (an index), "
    "config.toml with checkpoints/ (a run) "
    "or config.json with model.safetensors (a model) or model.onnx (an ONNX model)"
)


def kind_of(path: str | Path) -> str:
    """One of KINDS. Raises DataError when the path is missing or none of them, saying what was looked for."""
    place = Path(path)
    if not place.exists():
        raise DataError("no such file or folder", where=str(path))
    if place.is_file():
        if place.name == "tokenizer.json":
            return "tokenizer"
        raise DataError(f"is a file; give the folder that holds {_EXPECTED}", where=str(path))

    def has(*names: str) -> bool:
        return any((place / name).exists() for name in names)

    if has("corpus.json"):
        return "corpus"
    if sum(has(name) for name in _INDEX) > 1:
        return "index"
    if has(RUN_CONFIG) and has(CHECKPOINTS, METRICS, RESULT, TRIALS):
        return "run"
    if has("state.json") and has("config.json", *_WEIGHTS):
        return "checkpoint"
    if has(ADAPTER_CONFIG):
        return "adapter"
    if has(*_ONNX) and not has(*_WEIGHTS):
        return "onnx"
    if has("config.json") or has(*_WEIGHTS):
        return "model"
    if has("tokenizer.json") or (has("vocab.json") and has("merges.txt")):
        return "tokenizer"
    raise DataError(f"is no artefact of llmcli; looked for {_EXPECTED}", where=str(path))


def trials_of(run: Path) -> list[Path]:
    """The runs that a sweep has begun, by name; none: it is no sweep."""
    return sorted(path for path in (run / TRIALS).glob("*") if (path / METRICS).is_file())


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first by step; unfinished ones do not count."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def resolve_model(path: str | Path, *, onnx: bool = True) -> Path:
    """The model folder that is meant: the path itself, or for a run its result, else its newest sound checkpoint.

    `onnx`: whether an ONNX folder will do. Raises DataError when there is no model, naming what is missing.
    """
    place = Path(path)
    kind = kind_of(place)
    if kind == "run":
        result = place / RESULT
        if is_model(result):
            return result
        if is_adapter(result):
            return resolve_model(result, onnx=onnx)
        for checkpoint in reversed(checkpoints_of(place)):
            if not manifest_problems(checkpoint):
                return checkpoint
        raise DataError(f"the run has no {RESULT}/ and no sound checkpoint yet", where=str(path))
    if kind == "onnx" and onnx:
        return place
    if kind == "onnx":
        raise DataError("is an ONNX model; the model it was exported from is needed", where=str(path))
    if kind == "adapter" or (kind == "checkpoint" and is_adapter(place)):
        base = read_json(place / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise DataError(f"is an adapter; give its base, and it by --adapter (made for {base!r:.200})", where=str(path))
    if kind not in ("model", "checkpoint"):
        article = "an" if kind == "index" else "a"
        raise DataError(f"is {article} {kind}; a model or a run is needed", where=str(path))
    if not is_model(place):
        missing = "config.json" if not (place / "config.json").is_file() else _WEIGHTS[0]
        raise DataError(f"is not a whole model: {missing} is missing", where=str(path))
    return place


@dataclasses.dataclass(frozen=True)
class AdaptedModel:
    """A model with an adapter on it, as operations take it in a model's place."""

    base: str | Path
    adapter: str | Path

    def __str__(self) -> str:
        return f"{self.base} + {self.adapter}"


Model = str | Path | AdaptedModel


@dataclasses.dataclass(frozen=True)
class ModelPlace:
    """Where a model lies: the folder of its weights, and that of an adapter that goes on it."""

    folder: Path
    adapter: Path | None = None

    @property
    def texts(self) -> Path:
        """The folder of the tokenizer and of what ends a text: the adapter's, where it brings them."""
        brings = self.adapter is not None and (self.adapter / "tokenizer.json").is_file()
        return self.adapter if brings and self.adapter is not None else self.folder


def find_model(model: Model) -> ModelPlace:
    """Where a model is that is to be run. Raises DataError where there is none, or where no adapter can go on it."""
    if not isinstance(model, AdaptedModel):
        return ModelPlace(resolve_model(model))
    base = resolve_model(model.base)
    if is_onnx(base):
        raise DataError(
            "is an ONNX model, whose weights are fixed (and perhaps quantized); put the adapter on the model that it "
            "was exported from (llmcli merge) and export that",
            where=str(model.base),
        )
    return ModelPlace(base, resolve_adapter(model.adapter))


def resolve_adapter(path: str | Path) -> Path:
    """The folder with adapter_config.json: the path itself, or a run's result. Raises DataError for anything else."""
    place = Path(path)
    if kind_of(place) == "run" and is_adapter(place / RESULT):
        return place / RESULT
    if not is_adapter(place):
        raise DataError(f"is no adapter: it has no {ADAPTER_CONFIG}", where=str(path))
    return place


def refuse_adapter(place: ModelPlace) -> None:
    """Raises DataError where an adapter is to go on an encoder."""
    if place.adapter is not None:
        raise DataError("is an encoder; adapters go on decoders", where=str(place.folder))


def is_adapter(folder: Path) -> bool:
    """Whether the folder is one of PEFT's."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_model(folder: Path) -> bool:
    """Whether the folder has a config and weights."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in _WEIGHTS)


def is_onnx(folder: Path) -> bool:
    """Whether the folder holds a graph, or what is left of one, and no weights that torch would read."""
    return any((folder / name).is_file() for name in _ONNX) and not any((folder / name).is_file() for name in _WEIGHTS)


def onnx_paths(folder: Path) -> list[Path]:
    """The files of a graph: itself, and its data where there is some."""
    return [path for path in (folder / GRAPH, folder / PREFILL, folder / f"{GRAPH}.data") if path.is_file()]


def has_manifest(folder: Path) -> bool:
    """Whether the folder says what is in it."""
    return (folder / MANIFEST).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises DataError with line and column of a syntax error."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise from_os_error(error, path) from error
    except json.JSONDecodeError as error:
        raise DataError(f"is not valid JSON: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError("is not valid JSON", where=str(path)) from error
    if not isinstance(content, dict):
        raise DataError("must hold a JSON object", where=str(path))
    return content


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's metrics, oldest first.

    A last line without its end is one that is being written, and is passed over. Raises DataError for any other line
    that is not an object.
    """
    path = run / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise from_os_error(error, path) from error
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError("is not valid JSON", where=f"{path}:{number}") from error
        if not isinstance(record, dict):
            raise DataError("is not a JSON object", where=f"{path}:{number}")
        yield record


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise from_os_error(error, folder) from error


def describe(error: LlmcliError, root: Path) -> str:
    """An error as a line of a report on `root`: paths are told from there."""
    return str(error).replace(f"{root}/", "").replace(f"{root}: ", "")


def end_ids(folder: Path) -> list[int]:
    """The tokens that end a text, as a model's files name them; none: the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        ids = [item for item in (found if isinstance(found, list) else [found]) if isinstance(item, int)]
        if ids:
            return ids
    return []
