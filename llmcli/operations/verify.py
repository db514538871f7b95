"""`verify`: whether an artefact is whole and its parts agree.

Invariant: a fault becomes a problem in the list, never an error that hides the faults behind it; only a path that is no
artefact at all raises.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmcli.config import read_toml
from llmcli.errors import LlmcliError
from llmcli.files import artefacts
from llmcli.files.manifest import manifest_problems
from llmcli.files.safetensors_header import TensorEntry, read_header
from llmcli.files.tensors import weight_files
from llmcli.operations.inspect import tensors_of

_PIECE = 1 << 22  # ids or weights looked at at once: memory stays small whatever the size
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
        "run": lambda: _run(place, values),
        "checkpoint": lambda: _checkpoint(place, values),
        "model": lambda: _model(place, values),
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
    """Problems of the tokenizer files of a folder."""
    from llmcli.data.tokenizer import load_tokenizer

    file = folder / "tokenizer.json"
    if file.is_file():
        content = artefacts.read_json(file)
        yield from (f"tokenizer.json: {problem}" for problem in _vocabulary_problems(content))
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.encode("a b\n")
    except LlmcliError as error:
        yield artefacts.describe(error, folder)
        return
    except BaseException as error:
        # Rust's panics are BaseException: a pattern or a model that the library gives up on (RELIABILITY, decision 6)
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        yield f"tokenizer.json: cannot encode: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return
    for role in ("bos", "eos", "pad", "unk"):
        identity = getattr(tokenizer, f"{role}_id")
        if identity is not None and not 0 <= identity < tokenizer.vocab_size:
            yield f"tokenizer_config.json: the {role} token has id {identity}, the vocabulary {tokenizer.vocab_size}"


def _vocabulary_problems(content: Mapping[str, Any]) -> Iterator[str]:
    model = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        ids = [identity for identity in vocabulary.values() if isinstance(identity, int)]
        if len(ids) != len(vocabulary) or any(not 0 <= identity < 2**31 for identity in ids):
            yield "the vocabulary holds an id that is not a whole number below 2^31"
        if len(set(ids)) != len(ids):
            yield "the vocabulary gives one id to two tokens"
        unknown = model.get("unk_token")
        if unknown is not None and unknown not in vocabulary:
            yield f"the unknown token {unknown!r} is not in the vocabulary"


# ----------------------------------------------------------------------------------------------------------------
# Corpora


def _corpus(folder: Path) -> Iterator[str]:
    yield from _manifest(folder)
    yield from (f"tokenizer: {problem}" for problem in _collected(lambda: _tokenizer(folder), folder))
    content = artefacts.read_json(folder / "corpus.json")
    yield from _collected(lambda: _corpus_tokenizer(folder, content), folder)
    vocabulary = content.get("vocab_size")
    for part in ("train", "val"):
        total = 0
        for path in sorted(folder.glob(f"{part}-*.npy")):
            try:
                ids = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                yield f"{path.name}: is not a whole .npy file: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            total += ids.size
            yield from (f"{path.name}: {problem}" for problem in _ids_problems(ids, content.get("dtype"), vocabulary))
        if total != content.get(f"{part}_tokens"):
            yield f"{part}: {total} tokens in its files, corpus.json says {content.get(f'{part}_tokens')}"


def _corpus_tokenizer(folder: Path, content: Mapping[str, Any]) -> Iterator[str]:
    from llmcli.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer.hash != content.get("tokenizer_hash"):
        yield f"tokenizer.json: its hash is {tokenizer.hash}, corpus.json says {content.get('tokenizer_hash')}"
    if tokenizer.vocab_size != content.get("vocab_size"):
        yield f"tokenizer.json: {tokenizer.vocab_size} tokens, corpus.json says {content.get('vocab_size')}"


def _ids_problems(ids: np.ndarray[Any, Any], dtype: Any, vocabulary: Any) -> Iterator[str]:
    if ids.ndim != 1 or str(ids.dtype) not in ("uint16", "uint32"):
        yield f"holds {ids.ndim} dimensions of {ids.dtype}; one of uint16 or uint32 was expected"
        return
    if str(ids.dtype) != dtype:
        yield f"holds {ids.dtype}, corpus.json says {dtype}"
    greatest = max((int(ids[start : start + _PIECE].max()) for start in range(0, ids.size, _PIECE)), default=-1)
    if isinstance(vocabulary, int) and greatest >= vocabulary:
        yield f"holds the id {greatest}, the vocabulary has {vocabulary} tokens"


# ----------------------------------------------------------------------------------------------------------------
# Models, checkpoints, runs


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
    from llmcli.models.folder import family_names, load_config, weight_problems

    config = load_config(folder)
    yield from weight_problems(config, family_names(config, {name: entry.shape for name, entry in entries.items()}))
    settings = artefacts.read_json(folder / "config.json")
    for key in _ID_KEYS:
        for identity in _as_list(settings.get(key)):
            if not isinstance(identity, int) or not 0 <= identity < config.vocab_size:
                yield f"config.json: {key} = {identity!r}, the vocabulary has {config.vocab_size} tokens"
    if not (folder / "tokenizer.json").is_file():
        yield "tokenizer.json: missing"
        return
    yield from _collected(lambda: _tokenizer(folder), folder)
    greatest = _greatest_id(artefacts.read_json(folder / "tokenizer.json"))
    if greatest >= config.vocab_size:
        yield f"tokenizer.json: holds the id {greatest}, the embedding has {config.vocab_size} rows"


def _as_list(value: Any) -> list[Any]:
    """An id, several (some models end texts in more than one way), or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _greatest_id(content: Mapping[str, Any]) -> int:
    vocabulary = content["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*ids, *(token["id"] for token in content.get("added_tokens") or [])], default=-1)


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
    yield from _collected(lambda: _model(folder, values), folder)


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
        yield from (f"model: {problem}" for problem in _collected(lambda: _model(result, values), result))
    elif not artefacts.checkpoints_of(folder):
        yield "has neither a checkpoint nor a model"


def _metrics_only(folder: Path) -> Iterator[str]:
    for record in artefacts.read_metrics(folder):
        if not isinstance(record.get("event"), str):
            yield f"{artefacts.METRICS}: a record without an event: {json.dumps(record)[:80]}"
            return
