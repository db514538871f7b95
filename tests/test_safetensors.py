"""The reader of safetensors headers: every malformed file is refused at once, every good one passes."""

from __future__ import annotations

import json
import random
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcli.errors import DataError
from llmcli.files.safetensors_header import MAX_TENSORS, read_header


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(start: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


EIGHT = b"\0" * 8
MALFORMED = {
    **{f"{size} bytes": b"\1" * size for size in range(10)},
    "length 2^64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "length past the file": packed({}, length=500),
    "length 101 MB": struct.pack("<Q", 101_000_000) + b"{}",
    "a list": packed([]),
    "no JSON": packed(b"{not json}"),
    "bad UTF-8": packed(b'{"\xff": 1}'),
    "a byte order mark": packed(b"\xef\xbb\xbf{}"),
    "deep": packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a huge integer": packed(b'{"a": ' + b"9" * 5000 + b"}"),
    "a name twice": packed(b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2), EIGHT),
    "a key twice": packed(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
    "overlap": packed({"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12),
    "the same bytes twice": packed({"a": tensor(0, 8), "b": tensor(0, 8)}, EIGHT),
    "a hole": packed({"a": tensor(0, 8), "b": tensor(12, 20)}, b"\0" * 20),
    "a hole before the first": packed({"a": tensor(4, 12)}, b"\0" * 12),
    "bytes after": packed({"a": tensor()}, EIGHT + b"PK\3\4 an archive"),
    "past the file": packed({"a": tensor()}, b"\0" * 7),
    "end before begin": packed({"a": tensor(8, 0)}, EIGHT),
    "negative": packed({"a": tensor(-8, 0)}, EIGHT),
    "offsets of floats": packed({"a": {**tensor(), "data_offsets": [0.0, 8.0]}}, EIGHT),
    "offsets of booleans": packed({"a": {**tensor(), "data_offsets": [False, 8]}}, EIGHT),
    "three offsets": packed({"a": {**tensor(), "data_offsets": [0, 8, 8]}}, EIGHT),
    "a product that wraps": packed({"a": tensor(0, 16, (4194305, 4194305, 211106198978564))}, b"\0" * 16),
    "a shape of 2^63": packed({"a": tensor(0, 8, (2**63,))}, EIGHT),
    "a negative shape": packed({"a": tensor(0, 8, (-1, -2))}, EIGHT),
    "a shape of text": packed({"a": tensor(0, 8, "2")}, EIGHT),
    "many dimensions": packed({"a": tensor(0, 8, (2, *[1] * 100_000))}, EIGHT),
    "the wrong size": packed({"a": tensor(0, 8, (3,))}, EIGHT),
    "dtype F7": packed({"a": tensor(dtype="F7")}, EIGHT),
    "dtype of a list": packed({"a": tensor(dtype=["F32"])}, EIGHT),
    "half a byte": packed({"a": tensor(0, 1, (1,), "F4")}, b"\0"),
    "too many tensors": packed({str(index): tensor(0, 0, (0,)) for index in range(100_000)}),
    "a tensor of null": packed({"a": None}),
    "a long name": packed({"x" * 100_000: None}),
    "a missing key": packed({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "a further key": packed({"a": {**tensor(), "code": "x"}}, EIGHT),
    "metadata of numbers": packed({"__metadata__": {"a": 1}}),
    "metadata of a list": packed({"__metadata__": []}),
    **{
        f"the name {name!r}": packed({name: tensor()}, EIGHT)
        for name in ("../x", "a/../../x", "a\\..\\x", "/etc/x", "a\0b", "a\x1b[2J", "a\x9b", "a\u202eb")
    },
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError, match="is not a valid safetensors file") as caught:
        read_header(path)
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert "\n" not in str(caught.value)
    assert not set(str(caught.value)) & set("\x1b\0\x9b\u202e")
    assert len(caught.value.message) < 500


GOOD = {
    "nothing": packed({}),
    "only metadata": packed({"__metadata__": {"format": "pt"}}),
    "padded": packed(b"{}      "),
    "one": packed({"a": tensor()}, EIGHT),
    "a scalar": packed({"a": tensor(0, 4, ())}, b"\0" * 4),
    "an empty one between": packed({"a": tensor(0, 8), "b": tensor(8, 8, (0, 5)), "c": tensor(8, 16)}, b"\0" * 16),
    "out of order": packed({"b": tensor(8, 16), "a": tensor(0, 8)}, b"\0" * 16),
    "names": packed(
        {"model.layers.0.weight": tensor(0, 8), "a/b:0": tensor(8, 16), "größe": tensor(16, 24)}, EIGHT * 3
    ),
    "four bits": packed({"a": tensor(0, 1, (2,), "F4")}, b"\0"),
    "many": packed({f"t{index}": tensor(0, 0, (0,)) for index in range(MAX_TENSORS)}),
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD.keys())
def test_a_good_file_passes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    read_header(path)


def test_it_reads_what_the_library_writes(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    arrays = {"a": numpy.ones((3, 4), "f4"), "b": numpy.zeros((5,), "f2"), "c": numpy.zeros((0, 2), "i8")}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: entry.shape for name, entry in found.items()} == {name: array.shape for name, array in arrays.items()}
    raw = (tmp_path / "x.safetensors").read_bytes()
    for name, entry in found.items():
        assert raw[entry.start : entry.end] == arrays[name].tobytes()
        assert entry.count == arrays[name].size


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = packed({"a": tensor(), "b": tensor(8, 16)}, b"\0" * 16)
    path = tmp_path / "x.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_header(path)


def test_what_the_reader_passes_the_library_passes_too(tmp_path: Path) -> None:
    """Random damage: either both refuse or, where ours is the stricter, ours does. Ours never lets more pass."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    seed = random.Random(20)
    whole = packed({"a": tensor(), "b": tensor(8, 16, (2, 2), "F16")}, b"\0" * 16)
    path = tmp_path / "x.safetensors"
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(seed.randint(1, 3)):
            damaged[seed.randrange(len(damaged))] = seed.choice(b'0123456789{}[]",:aF\x00\xff')
        path.write_bytes(bytes(damaged))
        try:
            read_header(path)
        except DataError:
            continue
        try:
            load(bytes(damaged))
        except SafetensorError as error:
            pytest.fail(f"passed by us, refused by the library: {error}: {bytes(damaged)!r}")
        except KeyError:
            continue  # a dtype that numpy does not have


@settings(max_examples=300)
@given(st.binary(max_size=64))
def test_random_bytes_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(raw)
    try:
        read_header(path)
    except DataError:
        return
