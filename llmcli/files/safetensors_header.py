"""The header of a safetensors file, read and checked by ourselves before any library sees the file.

Invariant: a header that is returned describes byte ranges that are disjoint, without holes, and end where the file
ends; whatever a file claims, no more than its header is read and no number in it makes an allocation.
Format: https://github.com/huggingface/safetensors (README, "Format"). The refusals are those of RELIABILITY 1.3.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from llmcli.errors import DataError, from_os_error

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 65_536  # a legal header of 100,000 tiny tensors does nothing but burn memory
MAX_DIMENSIONS = 16

# bits an element; sub-byte kinds must still fill whole bytes
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
}

_ODD_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|(^|[/\\])\.\.([/\\]|$)|^[/\\]")


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header describes it; `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """How many elements it has."""
        return (self.end - self.start) * 8 // BITS[self.dtype]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name, in the order of their bytes. Raises DataError for any breach."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8:
                raise _refused(path, f"has {size} bytes, too few for a header")
            if length > MAX_HEADER_BYTES:
                raise _refused(path, f"claims a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
            if length > size - 8:
                raise _refused(path, f"claims a header of {length} bytes, the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise from_os_error(error, path) from error
    if raw.count(b'"dtype"') > MAX_TENSORS:
        raise _refused(path, f"holds more than {MAX_TENSORS} tensors")
    entries = [_entry(path, name, value, 8 + length) for name, value in _parse(path, raw)]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    reached = 8 + length
    for entry in entries:
        if entry.start != reached:
            kind = "overlaps the tensor before it" if entry.start < reached else "leaves a hole before it"
            raise _refused(path, f"the tensor {entry.name[:80]!r} {kind}")
        reached = entry.end
    if reached != size:
        what = f"{size - reached} bytes follow the last tensor" if size > reached else "the tensors end past the file"
        raise _refused(path, what)
    return {entry.name: entry for entry in entries}


def _refused(path: Path, reason: str) -> DataError:
    return DataError(f"is not a valid safetensors file: {reason}", where=str(path))


def _parse(path: Path, raw: bytes) -> list[tuple[str, Any]]:
    """The header's pairs, metadata checked and left out."""

    def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise ValueError("a key appears twice")
        return content

    if not raw.startswith(b"{"):
        raise _refused(path, "the header is not a JSON object")
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs_once)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deep"
        raise _refused(path, f"the header is not valid JSON: {reason}") from error
    if not isinstance(content, dict):
        raise _refused(path, "the header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refused(path, "__metadata__ must map texts to texts")
    if len(content) > MAX_TENSORS:
        raise _refused(path, f"holds more than {MAX_TENSORS} tensors")
    return list(content.items())


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:
    what = f"the tensor {name[:80]!r}"
    if _ODD_NAME.search(name):
        raise _refused(path, f"a tensor has the name {name[:80]!r}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _refused(path, f"{what} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _refused(path, f"{what} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _refused(path, f"{what} has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _refused(path, f"{what} has odd data_offsets")
    bits = BITS[dtype]
    for size in shape:
        bits *= size  # Python's integers do not wrap around
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise _refused(path, f"{what} has {offsets[1] - offsets[0]} bytes, its shape and dtype ask for others")
    return TensorEntry(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
