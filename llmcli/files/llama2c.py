"""llama2.c's own files, read and checked before a number of them is believed: the weights (`.bin`) and the tokenizer.

Invariant: a header that is returned describes the whole file, to the byte; no number of a file makes an allocation
before it was held against the file's size.
Format: https://github.com/karpathy/llama2.c, `export.py` (`legacy_export` is version 0, `version1_export` version 1),
`tokenizer.py` (`export`) and `run.c`, which reads them.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path

from llmcli.errors import DataError, from_os_error

MAGIC = b"24ka"  # "ak42" as a little-endian number; version 0 has none
_LEGACY_HEAD, _HEAD = 28, 256  # bytes before the weights
_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
_LAYERS = 1024  # more has no model; the names of all tensors are made from it
_LARGEST_TOKENIZER = 64 << 20  # bytes; that of Llama 2 has 433,869


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """Float32 numbers in the file: one tensor of all layers, or one that is there once."""

    offset: int  # bytes
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Llama2cModel:
    """A model file's header. `tensors` has llama2.c's names; of those of layers, the first dimension is the layer."""

    path: Path
    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    shared_classifier: bool
    tensors: dict[str, Stored]


@dataclasses.dataclass(frozen=True, slots=True)
class Llama2cTokenizer:
    """A tokenizer file: each id's bytes as text, and the score by which merges are chosen."""

    path: Path
    pieces: tuple[str, ...]
    scores: tuple[float, ...]


def is_llama2c(head: bytes) -> bool:
    """Whether a file that begins so (28 bytes) is a model of llama2.c: by its magic, else by numbers that fit."""
    if head[:4] == MAGIC:
        return True
    if len(head) < _LEGACY_HEAD:
        return False
    numbers = struct.unpack("<7i", head[:_LEGACY_HEAD])
    return all(0 < abs(number) < 1 << 24 for number in numbers) and numbers[3] <= numbers[0]


def read_model(path: Path) -> Llama2cModel:
    """The header of a model file, held against the file's size. Raises DataError for any breach."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise from_os_error(error, path) from error
    version = 0
    if head[:4] == MAGIC:
        version = int.from_bytes(head[4:8], "little", signed=True)
        if version != 1:
            told = "int8 in groups" if version == 2 else "not known"
            raise _refused(path, f"its version is {version} ({told}); versions 0 and 1 are read, both float32")
    begin, first = (8, _HEAD) if version else (0, _LEGACY_HEAD)
    if min(size, len(head)) < first:
        raise _refused(path, f"has {size} bytes, too few for a header")
    values = dict(zip(_FIELDS, struct.unpack_from("<7i", head, begin), strict=True))
    shared = values["vocab_size"] > 0 if version == 0 else head[begin + 28] != 0
    if version == 0:
        values["vocab_size"] = abs(values["vocab_size"])
    _check(path, values)
    tensors, end = _legacy(values, shared) if version == 0 else _version_1(values, shared)
    if end != size:
        what = f"it is cut, {end - size} bytes are missing" if size < end else f"{size - end} bytes follow the weights"
        raise _refused(path, f"its header asks for {end} bytes, it has {size}: {what}")
    return Llama2cModel(path, version, **values, shared_classifier=shared, tensors=tensors)


def _refused(path: Path, reason: str) -> DataError:
    return DataError(f"is not a model of llama2.c: {reason}", where=str(path))


def _check(path: Path, values: dict[str, int]) -> None:
    for name, value in values.items():
        if value <= 0:
            raise _refused(path, f"{name} = {value} must be above 0")
    if values["n_layers"] > _LAYERS:
        raise _refused(path, f"n_layers = {values['n_layers']}; {_LAYERS} is the most")
    dim, heads, shared = values["dim"], values["n_heads"], values["n_kv_heads"]
    if dim % heads:
        raise _refused(path, f"dim = {dim} is not divided by n_heads = {heads}")
    if heads % shared:
        raise _refused(path, f"n_heads = {heads} is not divided by n_kv_heads = {shared}")
    if dim // heads % 2:
        raise _refused(path, f"rotary positions need an even head size, dim / n_heads = {dim // heads}")


def _shapes(values: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor but the classifier, layers joined."""
    dim, hidden, layers = values["dim"], values["hidden_dim"], values["n_layers"]
    narrow = dim // values["n_heads"] * values["n_kv_heads"]
    return {
        "tok_embeddings": (values["vocab_size"], dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, narrow, dim),
        "wv": (layers, narrow, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
    }


def _placed(shapes: dict[str, tuple[int, ...]], begin: int) -> tuple[dict[str, Stored], int]:
    """(the tensors one behind the other, where the last ends)."""
    found = {}
    for name, shape in shapes.items():
        found[name] = Stored(begin, shape)
        begin += 4 * math.prod(shape)
    return found, begin


def _legacy(values: dict[str, int], shared: bool) -> tuple[dict[str, Stored], int]:
    """Version 0: the tables of angles stand before the classifier, and nobody reads them."""
    shapes = _shapes(values)
    half = values["dim"] // values["n_heads"] // 2
    shapes |= {"freqs_cos": (values["seq_len"], half), "freqs_sin": (values["seq_len"], half)}
    if not shared:
        shapes["output"] = shapes["tok_embeddings"]
    found, end = _placed(shapes, _LEGACY_HEAD)
    del found["freqs_cos"], found["freqs_sin"]
    return found, end


def _version_1(values: dict[str, int], shared: bool) -> tuple[dict[str, Stored], int]:
    shapes = _shapes(values)
    order = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    ordered = {name: shapes[name] for name in order}
    if not shared:
        ordered["output"] = shapes["tok_embeddings"]
    return _placed(ordered, _HEAD)


def read_tokenizer(path: Path, vocab_size: int) -> Llama2cTokenizer:
    """A tokenizer file of `vocab_size` tokens. Raises DataError for any breach, and for another number of tokens."""
    try:
        size = path.stat().st_size
        if size > _LARGEST_TOKENIZER:
            raise _odd(path, f"it has {size >> 20} MB")
        raw = path.read_bytes()
    except OSError as error:
        raise from_os_error(error, path) from error
    if len(raw) < 4:
        raise _odd(path, f"it has {len(raw)} bytes")
    longest, place = struct.unpack_from("<i", raw)[0], 4
    pieces, scores = list[str](), list[float]()
    while place < len(raw):
        number = len(pieces)
        if len(raw) - place < 8:
            raise _odd(path, f"it ends within the token {number}")
        score, length = struct.unpack_from("<fi", raw, place)
        place += 8
        if not 0 < length <= longest:
            raise _odd(path, f"the token {number} has {length} bytes; the longest is said to have {longest}")
        if length > len(raw) - place:
            raise _odd(path, f"it ends within the token {number}")
        if not math.isfinite(score):
            raise _odd(path, f"the score of the token {number} is {score}")
        try:
            pieces.append(raw[place : place + length].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _odd(path, f"the token {number} is not UTF-8") from error
        scores.append(score)
        place += length
    if len(pieces) != vocab_size:
        raise DataError(f"has {len(pieces)} tokens, the model {vocab_size}; give the model's own", where=str(path))
    return Llama2cTokenizer(path, tuple(pieces), tuple(scores))


def _odd(path: Path, reason: str) -> DataError:
    return DataError(f"is not a tokenizer of llama2.c: {reason}", where=str(path))
