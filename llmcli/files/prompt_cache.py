"""Prompt caches: what a model computed of a prompt, kept in a safetensors file.

Invariant: a file that is read is one of this kind, whole, and of the model whose key it carries; it appears whole or
not at all. `tokens` are the ids, `layers.N.keys` and `layers.N.values` are (heads, tokens, size of a head).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcli.errors import DataError, from_os_error
from llmcli.files.artefacts import has_manifest
from llmcli.files.atomic import write_file
from llmcli.files.manifest import read_manifest, sha256_of
from llmcli.files.safetensors_header import read_header

FORMAT, VERSION = "llmcli-prompt-cache", "1"
_OF_A_MODEL = ("config.json", "*.safetensors", "*.onnx", "*.onnx.data")

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class CachedPrompt:
    """A prompt's ids, and for each layer its keys and then its values: (K, tokens, D)."""

    model: str
    ids: list[int]
    states: list[Array]


def model_key(folder: Path, quantize: str | None = None) -> str:
    """sha256 over what decides what a model computes: its files, by the manifest where there is one, and rounding."""
    entries = read_manifest(folder)["files"] if has_manifest(folder) else {}
    found = {} if quantize is None else {"quantize": quantize}
    for path in sorted({path for pattern in _OF_A_MODEL for path in folder.glob(pattern)}):
        entry = entries.get(path.name)
        if isinstance(entry, dict) and entry.get("size") == path.stat().st_size:
            found[path.name] = str(entry.get("sha256"))
        else:
            found[path.name] = sha256_of(path)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def write_prompt(path: Path, prompt: CachedPrompt) -> None:
    """Writes a prompt's file."""
    from safetensors.numpy import save

    tensors = {"tokens": np.array(prompt.ids, np.int32), **dict(zip(_names(prompt), prompt.states, strict=True))}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    facts = {"format": FORMAT, "version": VERSION, "model": prompt.model, "tokens": _hash_of(tensors["tokens"])}
    facts["content"] = _hash_of(*tensors.values())
    write_file(path, save(tensors, facts))


def read_prompt(path: Path) -> CachedPrompt:
    """Reads a prompt's file. Raises DataError for one that is none, or damaged."""
    from safetensors import SafetensorError, safe_open

    header = read_header(path)  # by our own checks first
    try:
        with safe_open(str(path), framework="numpy") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT or facts.get("version") != VERSION or "tokens" not in header:
                raise DataError("is not a prompt cache of this version; name another file", where=str(path))
            tensors = {name: file.get_tensor(name) for name in header}
    except OSError as error:
        raise from_os_error(error, path) from error
    except (SafetensorError, ValueError, TypeError) as error:
        raise DataError(f"is not a valid safetensors file: {str(error).splitlines()[0]}", where=str(path)) from error
    ids = tensors["tokens"]
    prompt = CachedPrompt(facts.get("model", ""), ids.ravel().tolist(), [None] * (len(tensors) - 1))  # type: ignore[list-item]
    names = _names(prompt)
    if set(tensors) != {"tokens", *names} or ids.dtype != np.int32 or ids.ndim != 1:
        raise DataError("is not a prompt cache of this version; name another file", where=str(path))
    prompt.states[:] = [tensors[name] for name in names]
    content = _hash_of(ids, *prompt.states)
    if (facts.get("tokens"), facts.get("content")) != (_hash_of(ids), content):
        raise DataError("is damaged: its hash is not what it says; delete it, and it is made anew", where=str(path))
    return prompt


def _names(prompt: CachedPrompt) -> list[str]:
    return [f"layers.{place // 2}.{('keys', 'values')[place % 2]}" for place in range(len(prompt.states))]


def _hash_of(*arrays: Array) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def prefix_of(states: Sequence[Array], length: int) -> list[Array]:
    """The states of the first `length` tokens."""
    return [array[:, :length] for array in states]
