"""`verify`: whether an artefact is whole and its parts agree.

Invariant: a fault becomes a problem in the list, never an error that hides the faults behind it; only a path that is no
artefact at all raises.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmcli.config import read_toml
from llmcli.data.corpus import CORPUS, open_corpus
from llmcli.errors import LlmcliError
from llmcli.files import artefacts
from llmcli.files.manifest import manifest_problems, sha256_of
from llmcli.files.onnx_header import NAMES, read_onnx
from llmcli.files.safetensors_header import TensorEntry, read_header
from llmcli.files.tensors import tensors_of, weight_files
from llmcli.models.config import read_config
from llmcli.models.encoder_config import is_encoder, kind_of_head
from llmcli.models.labels import is_classifier, labels_of
from llmcli.operations.verify_index import index_problems

_PIECE = 1 << 22  # ids or weights looked at at once: memory stays small whatever the size
_TOKENIZER_FILES = ("tokenizer", "vocab.json", "merges.txt", "special_tokens_map.json")
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What came out: `ok`, and a line for each problem, each beginning with the file or tensor at fault."""

    path: str
    kind: str
    ok: bool
    problems: tuple[str, ...]


def verify(path: str | Path, *, values: bool = False) -> Verdict:
    """Checks an artefact. `values`: also that every stored weight is a finite number, which reads all of them."""
    kind = artefacts.kind_of(path)
    place = Path(path)
    checks: dict[str, Callable[[], Iterable[str]]] = {
        "tokenizer": lambda: _tokenizer_alone(place if place.is_dir() else place.parent),
        "corpus": lambda: _corpus(place),
        "index": lambda: _index(place, values),
        "run": lambda: _run(place, values),
        "checkpoint": lambda: _checkpoint(place, values),
        "adapter": lambda: _weights(place, values),
        "model": lambda: _weights(place, values),
        "onnx": lambda: _onnx(place, values),
    }
    problems = tuple(dict.fromkeys(_collected(checks[kind], place)))
    return Verdict(str(path), kind, not problems, problems)


def _collected(check: Callable[[], Iterable[str]], root: Path) -> Iterator[str]:
    """The problems of a check, with what it raises as the last."""
    try:
        yield from check()
    except LlmcliError as error:
        yield artefacts.describe(error, root)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        yield f"cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _errors(read: Callable[[], object], root: Path) -> list[str]:
    """What reading something raises, as problems."""

    def check() -> Iterable[str]:
        read()
        return ()

    return list(_collected(check, root))


def _manifest(folder: Path) -> list[str]:
    return manifest_problems(folder) if artefacts.has_manifest(folder) else []


# ----------------------------------------------------------------------------------------------------------------
# Tokenizers


def _tokenizer_alone(folder: Path) -> Iterator[str]:
    yield from _manifest(folder)
    yield from _tokenizer(folder)


def _tokenizer(folder: Path) -> Iterator[str]:
    """Problems of the tokenizer files of a folder; that it encodes at all is tried."""
    from llmcli.data.tokenizer import load_tokenizer

    try:
        load_tokenizer(folder).encode("It works: 1 2 3.\n")
    except LlmcliError as error:
        told = artefacts.describe(error, folder)
        yield told if told.startswith(_TOKENIZER_FILES) else f"tokenizer.json: {told}"


# ----------------------------------------------------------------------------------------------------------------
# Corpora


def _corpus(folder: Path) -> Iterator[str]:
    yield from _manifest(folder)
    yield from _tokenizer(folder)
    yield from _errors(lambda: open_corpus(folder), folder)
    content = artefacts.read_json(folder / CORPUS)
    yield from _collected(lambda: _corpus_tokenizer(folder, content), folder)
    for shard in content["shards"]:
        path = folder / Path(shard["file"]).name
        if path.is_file():
            yield from _collected(partial(_shard_problems, path, shard, content), folder)
        else:
            yield f"{path.name}: missing"


def _shard_problems(path: Path, shard: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[str]:
    if sha256_of(path) != shard.get("sha256"):
        yield f"{path.name}: its sha256 is not that of corpus.json"
    ids, vocabulary = np.load(path, mmap_mode="r", allow_pickle=False), content.get("vocab_size")
    greatest = max((int(ids[start : start + _PIECE].max()) for start in range(0, ids.size, _PIECE)), default=-1)
    if isinstance(vocabulary, int) and greatest >= vocabulary:
        yield f"{path.name}: holds the id {greatest}, the vocabulary has {vocabulary} tokens"


def _corpus_tokenizer(folder: Path, content: Mapping[str, Any]) -> Iterator[str]:
    from llmcli.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer.hash != content.get("tokenizer_hash"):
        yield f"tokenizer.json: its hash is {tokenizer.hash}, corpus.json says {content.get('tokenizer_hash')}"
    if tokenizer.vocab_size != content.get("vocab_size"):
        yield f"tokenizer.json: {tokenizer.vocab_size} tokens, corpus.json says {content.get('vocab_size')}"


# ----------------------------------------------------------------------------------------------------------------
# Indexes


def _index(folder: Path, values: bool) -> Iterator[str]:
    yield from _manifest(folder)
    yield from _collected(lambda: index_problems(folder, values=values), folder)


# ----------------------------------------------------------------------------------------------------------------
# Models, checkpoints, runs


def _weights(folder: Path, values: bool) -> Iterator[str]:
    """A model's folder, or an adapter's."""
    return _adapter(folder, values) if artefacts.is_adapter(folder) else _model(folder, values)


def _adapter(folder: Path, values: bool) -> Iterator[str]:
    yield from _manifest(folder)
    yield from _errors(lambda: artefacts.read_json(folder / artefacts.ADAPTER_CONFIG), folder)
    path = folder / "adapter_model.safetensors"
    problems = _errors(partial(read_header, path), folder)
    yield from problems
    if not problems and values:
        yield from _value_problems(path)


def _model(folder: Path, values: bool) -> Iterator[str]:
    yield from _manifest(folder)
    for path in weight_files(folder):
        problems = _errors(partial(read_header, path), folder)
        yield from problems
        if not problems and values:
            yield from _value_problems(path)
    entries = tensors_of(folder)
    yield from _collected(lambda: _shape_problems(folder, entries), folder)
    if (folder / "generation_config.json").is_file():
        yield from _errors(lambda: artefacts.read_json(folder / "generation_config.json"), folder)


def _shape_problems(folder: Path, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    from llmcli.models.classifier import builder_for
    from llmcli.models.folder import family_names, load_config, weight_problems

    path = folder / "config.json"
    if path.is_file() and is_encoder(artefacts.read_json(path)):
        yield from _encoder_problems(folder, entries)
        return
    config = load_config(folder)
    build = builder_for(artefacts.read_json(path), str(path))
    yield from weight_problems(config, family_names(config, entries), build)
    yield from _special_ids(folder, config.vocab_size)


def _encoder_problems(folder: Path, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    from llmcli.models.encoder_folder import encoder_labels, encoder_problems, load_encoder_config

    config = load_encoder_config(folder)
    kind = kind_of_head(artefacts.read_json(folder / "config.json"))
    labels = len(encoder_labels(folder)) if kind == "classifier" else None
    yield from encoder_problems(config, entries, kind, labels=labels)
    yield from _special_ids(folder, config.vocab_size)


def _special_ids(folder: Path, vocabulary: int) -> Iterator[str]:
    """The ids that a config names, and the tokenizer, against the rows of the embedding."""
    settings = artefacts.read_json(folder / "config.json")
    for key in _ID_KEYS:
        for identity in _as_list(settings.get(key)):
            if not isinstance(identity, int) or not 0 <= identity < vocabulary:
                yield f"config.json: {key} = {identity!r}, the vocabulary has {vocabulary} tokens"
    if not (folder / "tokenizer.json").is_file():
        yield "tokenizer.json: missing"
        return
    problems = list(_tokenizer(folder))
    yield from problems
    if not problems:
        yield from _embedding_problems(folder, vocabulary)


def _embedding_problems(folder: Path, rows: int) -> Iterator[str]:
    from llmcli.data.tokenizer import load_tokenizer

    size = load_tokenizer(folder).vocab_size
    if size > rows:
        yield f"tokenizer.json: has {size} tokens, the embedding {rows} rows"


def _onnx(folder: Path, values: bool) -> Iterator[str]:
    yield from _manifest(folder)
    graphs = [path for path in artefacts.onnx_paths(folder) if path.suffix == ".onnx"]
    if folder / artefacts.GRAPH not in graphs:
        yield f"{artefacts.GRAPH}: missing"
    problems = [problem for path in graphs for problem in _errors(partial(read_onnx, path), folder)]
    yield from problems
    if not problems and values:
        for path in graphs:
            yield from _constant_problems(path)
    yield from _collected(lambda: _onnx_config(folder, [] if problems else graphs), folder)
    for name in ("genai_config.json", "export.json"):
        if name == "export.json" or (folder / name).is_file():
            yield from _errors(partial(artefacts.read_json, folder / name), folder)


def _onnx_config(folder: Path, graphs: Sequence[Path]) -> Iterator[str]:
    """The config against the tokenizer and the graphs, which must be decoders of its shape."""
    from llmcli.runtime.onnx_classifier import ClassifierFacts
    from llmcli.runtime.onnx_session import GraphFacts

    try:
        said = artefacts.read_json(folder / "config.json")
        if is_encoder(said):
            yield from _encoder_graph(folder, said, graphs)
            return
        config = read_config(said, str(folder / "config.json"))
    except LlmcliError:
        yield from _tokenizer(folder)
        raise
    yield from _special_ids(folder, config.vocab_size)
    for path in graphs:
        expected: list[tuple[str, int, int]]
        if is_classifier(said):
            scores = ClassifierFacts(path)
            expected = [("labels", scores.labels, len(labels_of(said, str(folder / "config.json"))))]
            context = scores.context
        else:
            facts = GraphFacts(path)
            expected, context = [("layers", facts.layers, config.num_hidden_layers)], facts.context
        for what, found, wanted in (*expected, ("tokens of context", context, config.max_position_embeddings)):
            if found != wanted:
                yield f"{path.name}: {found} {what}, config.json says {wanted}"


def _encoder_graph(folder: Path, said: Mapping[str, Any], graphs: Sequence[Path]) -> Iterator[str]:
    """The config against the tokenizer and the graph, which must be an encoder's."""
    from llmcli.models.encoder_config import read_encoder_config
    from llmcli.runtime.encoder_session import read_facts

    config = read_encoder_config(said, str(folder / "config.json"))
    yield from _special_ids(folder, config.vocab_size)
    for path in graphs:
        context = read_facts(path).context
        if context != config.longest:
            yield f"{path.name}: {context} tokens of context, config.json says {config.longest}"


def _constant_problems(graph: Path) -> Iterator[str]:
    """Constants in the graph or beside it that hold NaN or an infinity."""
    path = graph.with_name(f"{artefacts.GRAPH}.data")
    for tensor in read_onnx(graph).tensors:
        kind = NAMES[tensor.dtype]
        if not kind.startswith("float") or not tensor.count:
            continue
        if tensor.inside is not None:
            name, numbers = graph.name, np.frombuffer(tensor.inside, kind)
        else:
            name, numbers = path.name, np.memmap(path, kind, "r", tensor.offset, (tensor.count,))
        bad = sum(int((~np.isfinite(piece)).sum()) for piece in np.array_split(numbers, -(-tensor.count // _PIECE)))
        if bad:
            yield f"{name}: {tensor.name}: {bad} of {tensor.count} values are not finite"


def _as_list(value: Any) -> list[Any]:
    """An id, several (some models end texts in more than one way), or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _value_problems(path: Path) -> Iterator[str]:
    """Tensors that hold NaN or an infinity. bfloat16 is looked at as bits: its exponent is all ones then."""
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    content = np.memmap(path, dtype=np.uint8, mode="r")
    for entry in read_header(path).values():
        if entry.dtype not in kinds or entry.start == entry.end:
            continue
        numbers = content[entry.start : entry.end].view(kinds[entry.dtype])
        bad = 0
        for start in range(0, numbers.size, _PIECE):
            piece = numbers[start : start + _PIECE]
            odd = (piece & 0x7F80) == 0x7F80 if entry.dtype == "BF16" else ~np.isfinite(piece)
            bad += int(odd.sum())
        if bad:
            yield f"{path.name}: {entry.name}: {bad} of {numbers.size} values are not finite"


def _checkpoint(folder: Path, values: bool) -> Iterator[str]:
    yield from manifest_problems(folder)
    yield from _errors(lambda: artefacts.read_json(folder / "state.json"), folder)
    yield from _errors(lambda: read_header(folder / "optimizer.safetensors"), folder)
    yield from _collected(lambda: _weights(folder, values), folder)


def _run(folder: Path, values: bool) -> Iterator[str]:
    yield from _errors(lambda: read_toml(folder / artefacts.RUN_CONFIG), folder)
    if (folder / artefacts.METRICS).is_file():
        yield from _collected(lambda: _metrics_only(folder), folder)
    for checkpoint in artefacts.checkpoints_of(folder):
        name = checkpoint.relative_to(folder)
        found = _collected(partial(_checkpoint, checkpoint, values), checkpoint)
        yield from (f"{name}: {problem}" for problem in found)
    result = folder / artefacts.RESULT
    if result.exists():
        yield from (f"model: {problem}" for problem in _collected(lambda: _weights(result, values), result))
    elif not artefacts.checkpoints_of(folder):
        yield "has neither a checkpoint nor a model"


def _metrics_only(folder: Path) -> Iterator[str]:
    for record in artefacts.read_metrics(folder):
        if not isinstance(record.get("event"), str):
            yield f"{artefacts.METRICS}: a record without an event: {json.dumps(record)[:80]}"
            return
