"""What an ONNX file says of itself, read and checked by ourselves before any library sees the file.

Invariant: a graph that is returned uses known operators alone, holds no graphs inside nodes, and its external tensors
lie within one regular file of its own folder (RELIABILITY 1.5). Numbers in the file make no allocation.
Format: onnx.proto of https://github.com/onnx/onnx; the encoding is Protocol Buffers' wire format.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from llmcli.errors import DataError, from_os_error
from llmcli.files.artefacts import GRAPH

MAX_BYTES = 1 << 30  # large tensors stand beside the graph
_MAX_SIZE = 1 << 62
MICROSOFT = "com.microsoft"
# Bits an element of the types that we write: TensorProto.DataType.
BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 10: 16, 16: 16, 21: 4}
NAMES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16", 16: "bfloat16", 21: "uint4"}
_STANDARD = """
    Abs Add And ArgMax Attention Cast Concat CumSum DequantizeLinear Div DynamicQuantizeLinear Equal Expand Gather
    GatherND Gelu Greater LayerNormalization Less LessOrEqual MatMul Max Min Mul Neg Or QuantizeLinear RMSNormalization
    Range ReduceL2 ReduceMax ReduceSum Relu Reshape RotaryEmbedding Shape Sigmoid SimplifiedLayerNormalization Slice
    Split Squeeze Sub Sum Tanh Transpose Unsqueeze Where
"""
_OF_ONNXRUNTIME = """
    DynamicQuantizeMatMul FastGelu FusedMatMul GatherBlockQuantized GroupQueryAttention MatMulIntegerToFloat MatMulNBits
    QuickGelu SkipLayerNormalization SkipSimplifiedLayerNormalization
"""
# What a decoder's graph takes and gives; named where another is refused.
EXPECTED = (
    "input_ids, attention_mask, past_key_values.N.key|value and num_logits_to_keep (optional) to logits and "
    "present.N.key|value"
)
OPERATORS = {"": frozenset(_STANDARD.split()), MICROSOFT: frozenset(_OF_ONNXRUNTIME.split())}


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxTensor:
    """A constant of the graph; `location` is None where its numbers stand in the graph itself."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    location: str | None = None
    offset: int = 0
    length: int = 0
    inside: memoryview | None = None  # the bytes that stand in the graph

    @property
    def count(self) -> int:
        """How many numbers it has."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclasses.dataclass(frozen=True)
class OnnxHeader:
    """A graph's names, operators and constants."""

    metadata: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, int]  # how often each is used
    tensors: tuple[OnnxTensor, ...]


def read_onnx(path: Path) -> OnnxHeader:
    """Reads and checks a graph. Raises DataError for any breach, naming it."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _refused(path, f"has {path.stat().st_size >> 20} MB; weights stand beside a graph, not in it")
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise from_os_error(error, path) from error
    try:
        header = _model(content)
    except _Malformed as error:
        raise _refused(path, str(error)) from error
    except (IndexError, UnicodeDecodeError, RecursionError) as error:
        raise _refused(path, "it ends within a field, or holds text that is none") from error
    _check_external(path, header)
    return header


def _refused(path: Path, reason: str) -> DataError:
    return DataError(f"is not a graph that can be used: {reason}", where=str(path))


class _Malformed(ValueError):
    """The bytes are no graph, or one that is not allowed."""


def _foreign(reason: str) -> _Malformed:
    """Of a graph that somebody else made: with what is expected instead."""
    return _Malformed(f"{reason}; expected is a decoder of {EXPECTED}")


# ----------------------------------------------------------------------------------------------------------------
# The wire format


def _number(data: memoryview, place: int) -> tuple[int, int]:
    """(a variable-length number, the place after it)."""
    found = shift = 0
    while True:
        byte = data[place]
        place += 1
        found |= (byte & 127) << shift
        if byte < 128:
            return found, place
        shift += 7
        if shift > 63:
            raise _Malformed("a number has too many bytes")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: their numbers, and numbers or bytes."""
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _number(data, place)
            yield field, value
            continue
        if kind == 2:
            size, place = _number(data, place)
        else:
            size = {1: 8, 5: 4}.get(kind, -1)
        if size < 0 or size > len(data) - place:
            raise _Malformed("a field reaches beyond the file")
        yield field, data[place : place + size]
        place += size


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Malformed("a field is of a wrong type")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode("utf-8")


# ----------------------------------------------------------------------------------------------------------------
# The messages


def _model(data: memoryview) -> OnnxHeader:
    graph, metadata = None, dict[str, str]()
    for field, value in _fields(data):
        if field == 7:
            graph = _message(value)
        elif field == 14:
            metadata.update([_pair(_message(value))])
        elif field == 25:
            raise _foreign("it defines functions")
    if graph is None:
        raise _Malformed("it holds no graph")
    inputs, outputs, operators, tensors = list[str](), list[str](), dict[str, int](), list[OnnxTensor]()
    for field, value in _fields(graph):
        if field == 1:
            operator = _node(_message(value))
            operators[operator] = operators.get(operator, 0) + 1
        elif field == 5:
            tensors.append(_tensor(_message(value)))
        elif field in (11, 12):
            names = [_text(item) for number, item in _fields(_message(value)) if number == 1]
            (inputs if field == 11 else outputs).extend(names)
        elif field == 15:
            raise _foreign("it holds sparse tensors")
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        raise _Malformed("two tensors have one name")
    return OnnxHeader(metadata, tuple(inputs), tuple(outputs), operators, tuple(tensors))


def _pair(data: memoryview) -> tuple[str, str]:
    found = {field: _text(value) for field, value in _fields(data) if field in (1, 2)}
    return found.get(1, ""), found.get(2, "")


def _node(data: memoryview) -> str:
    """The operator of a node."""
    kind = domain = ""
    for field, value in _fields(data):
        if field == 4:
            kind = _text(value)
        elif field == 7:
            domain = _text(value)
        elif field == 5 and any(number in (5, 6, 10, 11, 22, 23) for number, _ in _fields(_message(value))):
            raise _foreign("a node holds a tensor or a graph")
    if kind not in OPERATORS.get(domain, ()):
        named = f"{domain}.{kind}" if domain else kind
        raise _foreign(f"the operator {named[:80]} is none of those that `llmcli export` writes, and it alone is run")
    return kind


def _tensor(data: memoryview) -> OnnxTensor:
    name, dtype, shape, external = "", 0, list[int](), dict[str, str]()
    outside, inside = False, memoryview(b"")
    for field, value in _fields(data):
        if field == 1:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif field == 2 and isinstance(value, int):
            dtype = value
        elif field == 8:
            name = _text(value)
        elif field == 9:
            inside = _message(value)
        elif field == 13:
            external.update([_pair(_message(value))])
        elif field == 14:
            outside = value == 1
    if dtype not in BITS:
        raise _Malformed(f"the tensor {name[:80]!r} has a type that llmcli does not write")
    if len(shape) > 8 or any(size > _MAX_SIZE for size in shape):
        raise _Malformed(f"the tensor {name[:80]!r} has an odd shape")
    tensor = OnnxTensor(name, dtype, tuple(shape))
    size = (tensor.count * BITS[dtype] + 7) // 8
    if not outside:
        if external or len(inside) != size:
            raise _Malformed(f"the tensor {name[:80]!r} has {len(inside)} bytes, its shape asks for {size}")
        return dataclasses.replace(tensor, inside=inside)
    if set(external) - {"location", "offset", "length", "checksum"} or "location" not in external:
        raise _Malformed(f"the place of the tensor {name[:80]!r} is not told as it should be")
    numbers = [external.get("offset", "0"), external.get("length", str(size))]
    if not all(number.isascii() and number.isdigit() and len(number) < 19 for number in numbers):
        raise _Malformed(f"the place of the tensor {name[:80]!r} is not a number")
    if int(numbers[1]) != size:
        raise _Malformed(f"the tensor {name[:80]!r} has {numbers[1]} bytes, its shape asks for {size}")
    return dataclasses.replace(tensor, location=external["location"], offset=int(numbers[0]), length=size)


def _packed(data: memoryview) -> list[int]:
    found, place = [], 0
    while place < len(data):
        number, place = _number(data, place)
        found.append(number)
    return found


def _check_external(path: Path, header: OnnxHeader) -> None:
    """The tensors outside the graph: in the file beside it, and there whole."""
    wanted = f"{GRAPH}.data"
    ends = [(tensor.offset + tensor.length, tensor) for tensor in header.tensors if tensor.location is not None]
    for _, tensor in ends:
        if tensor.location != wanted:
            raise _refused(path, f"it asks for the file {str(tensor.location)[:80]!r}; weights are in {wanted}")
    if not ends:
        return
    beside = path.with_name(wanted)
    try:
        found = os.stat(beside)
        inside = beside.resolve().parent == path.parent.resolve()
    except OSError as error:
        raise from_os_error(error, beside) from error
    if not stat.S_ISREG(found.st_mode) or not inside:
        raise DataError("is no file of this folder: a link out of it, or a device", where=str(beside))
    end, last = max(ends, key=lambda pair: pair[0])
    if end > found.st_size:
        raise DataError(f"has {found.st_size} bytes; {last.name[:80]} ends at {end}: it was cut", where=str(beside))
