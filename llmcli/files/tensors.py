"""Tensors on disk: safetensors and nothing else; no pickle on any read path (RELIABILITY, decision 3).

Invariant: what is written lies in a folder that `atomic.staged_folder` will put in its place.
Format: https://github.com/huggingface/safetensors (README, "Format"); the index of shards is Hugging Face's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcli.errors import DataError, from_os_error
from llmcli.files.manifest import MANIFEST, read_manifest, sha256_of
from llmcli.files.safetensors_header import TensorEntry, read_header

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors to one safetensors file. `metadata`: what `__metadata__` shall hold."""
    from safetensors.torch import save_file

    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            str(path),
            metadata=dict(metadata or {"format": "pt"}),
        )
        path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes it private, whatever the umask says
    except OSError as error:
        raise from_os_error(error, path) from error
    except Exception as error:
        # The library wraps the system's refusals (a full disk, a read-only folder) in its own error, as text.
        raise _from_library(error, path) from error


def _from_library(error: Exception, path: Path) -> Exception:
    import re

    found = re.search(r"os error (\d+)", str(error))
    if found:
        return from_os_error(OSError(int(found[1]), "", str(path)), path)
    return DataError(f"cannot be written as safetensors: {error}", where=str(path)) if str(error) else error


def load_tensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Reads all tensors of a safetensors file. Raises DataError when the file is not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(path), device=device))
    except OSError as error:
        raise from_os_error(error, path) from error
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"is not a valid safetensors file: {str(error).splitlines()[0]}", where=str(path)) from error


@dataclasses.dataclass(frozen=True, slots=True)
class Float32Tensor:
    """A tensor that is written as it is made: `pieces` gives its numbers in order, as contiguous float32 arrays."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Any]]

    @property
    def size(self) -> int:
        """Bytes of all its numbers."""
        return 4 * math.prod(self.shape)


def stream_weights(tensors: Sequence[Float32Tensor], folder: Path) -> Iterator[int]:
    """Writes as `save_weights` does, a piece at a time; yields how many bytes of numbers each piece had."""
    by_name = {tensor.name: tensor for tensor in tensors}
    sizes = {name: tensor.size for name, tensor in by_name.items()}
    for file, names in _files_of(sizes, folder).items():
        yield from _stream([by_name[name] for name in names], folder / file)


def _stream(tensors: Sequence[Float32Tensor], path: Path) -> Iterator[int]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        header[tensor.name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)  # so that the numbers are aligned
    try:
        with open(path, "xb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for tensor in tensors:
                written = 0
                for piece in tensor.pieces():
                    written += file.write(piece.data.cast("B"))
                    yield piece.nbytes
                assert written == tensor.size, tensor.name
    except OSError as error:
        raise from_os_error(error, path) from error


def save_weights(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes `model.safetensors`, or shards of 4 GB with their index when there is more."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    for file, names in _files_of(sizes, folder).items():
        save_tensors({name: tensors[name] for name in names}, folder / file)


def _files_of(sizes: Mapping[str, int], folder: Path) -> dict[str, list[str]]:
    """The files and which tensors (name: bytes) each takes; where there are several, their index is written."""
    if sum(sizes.values()) <= SHARD_BYTES:
        return {WEIGHTS: list(sizes)}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = {f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors": names for index, names in enumerate(shards)}
    places = {name: file for file, names in files.items() for name in names}
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return files


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises DataError when there are none, or the index names odd ones."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        other = [path.name for path in sorted(folder.glob("*.bin"))[:1]]
        hint = f"; {other[0]} is a pickle, which is never read: convert it to safetensors" if other else ""
        raise DataError(f"has no {WEIGHTS}{hint}", where=str(folder))
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError("is not an index of shards", where=str(index)) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"names a file outside the folder: {name!r}", where=str(index))
        if not (folder / name).is_file():
            raise DataError(f"the shard {name} is missing", where=str(folder))
    return [folder / name for name in names]


def tensors_of(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder, over its shards, from the headers alone. Raises DataError for a breach."""
    entries: dict[str, TensorEntry] = {}
    for path in weight_files(folder):
        header = read_header(path)
        twice = entries.keys() & header.keys()
        if twice:
            raise DataError(f"the tensor {min(twice)} is in another shard too", where=str(path))
        entries.update(header)
    return entries


def load_weights(folder: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Reads all weights of a model folder, sharded or not."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors.update(load_tensors(path, device))
    return tensors


def weights_hash(folder: Path) -> str:
    """What a model's weights are known by: a sha256 over those of its files.

    Of a file whose size is the manifest's, the manifest's word is taken: it is what `verify` checks.
    """
    import hashlib

    listed: dict[str, object] = {}
    if (folder / MANIFEST).is_file():
        listed = read_manifest(folder)["files"]
    digests = []
    for path in weight_files(folder):
        entry = listed.get(path.name)
        known = isinstance(entry, dict) and entry.get("size") == path.stat().st_size
        digests.append(str(entry["sha256"]) if known else sha256_of(path))  # type: ignore[index]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
