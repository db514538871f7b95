"""The header of ONNX files: what stands in good ones, and that no bad one gets past it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_onnx_session import make_model, make_onnx

from llmcli.errors import DataError
from llmcli.files.onnx_header import read_onnx


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with tensors in it and beside it."""
    return make_onnx(make_model(tmp_path_factory.mktemp("graph") / "model", hidden_size=128))


def copy(folder: Path, place: Path) -> Path:
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def edit(place: Path, change: Any) -> Path:
    """Changes the graph as onnx's own classes see it."""
    proto = ir.serde.serialize_model(ir.load(place / "model.onnx"))
    change(proto)
    (place / "model.onnx").write_bytes(proto.SerializeToString())
    return place / "model.onnx"


def test_a_header_says_what_onnx_itself_reads(folder: Path) -> None:
    header = read_onnx(folder / "model.onnx")
    model = ir.load(folder / "model.onnx")
    assert header.metadata == dict(model.metadata_props)
    assert header.inputs == tuple(value.name for value in model.graph.inputs)
    assert header.outputs == tuple(value.name for value in model.graph.outputs)
    assert sum(header.operators.values()) == len(model.graph)
    theirs = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert {tensor.name: tensor.shape for tensor in header.tensors} == {
        name: tuple(tensor.shape.numpy()) for name, tensor in theirs.items()
    }
    outside = [tensor for tensor in header.tensors if tensor.location is not None]
    assert len(outside) > 3
    for tensor in outside:
        found = theirs[tensor.name]
        assert (found.location, found.offset, found.length) == (tensor.location, tensor.offset, tensor.length)


def external(proto: Any) -> Any:
    return next(tensor for tensor in proto.graph.initializer if tensor.external_data)


def put(key: str, value: str) -> Any:
    def change(proto: Any) -> None:
        for item in external(proto).external_data:
            if item.key == key:
                item.value = value

    return change


LOCATIONS = [
    "../s",
    "a/../../s",
    "/etc/passwd",
    "C:\\x",
    "a\\..\\s",
    "file:///x",
    "",
    "model.onnx",
    "*/_ORT_MEM_ADDR_/*",
]


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_place_outside_the_folder_is_refused(folder: Path, tmp_path: Path, location: str) -> None:
    with pytest.raises(DataError, match=r"weights are in model\.onnx\.data"):
        read_onnx(edit(copy(folder, tmp_path / "copy"), put("location", location)))


DAMAGES: dict[str, Any] = {
    "offset beyond": put("offset", str(10**9)),
    "offset negative": put("offset", "-4096"),
    "offset no number": put("offset", "1e3"),
    "offset too long": put("offset", "9" * 1000),
    "length beyond": put("length", str(10**12)),
    "length short": put("length", "4"),
    "other key": lambda p: external(p).external_data.add(key="basepath", value="/"),
    "name twice": lambda p: p.graph.initializer.append(p.graph.initializer[0]),
    "shape": lambda p: external(p).dims.append(2**62),
    "negative shape": lambda p: external(p).dims.append(-1),
    "type": lambda p: setattr(external(p), "data_type", 8),
    "function": lambda p: p.functions.add(name="f", domain="d"),
    "domain": lambda p: setattr(p.graph.node[0], "domain", "custom"),
    "operator": lambda p: setattr(p.graph.node[0], "op_type", "If"),
    "subgraph": lambda p: p.graph.node[0].attribute.add(name="body", type=5).g.node.add(op_type="Add"),
    "tensor in a node": lambda p: p.graph.node[0].attribute.add(name="t", type=4).t.dims.append(1),
    "sparse": lambda p: p.graph.sparse_initializer.add().dims.append(1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_graph_of_ours_never_holds_is_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    with pytest.raises(DataError) as caught:
        read_onnx(edit(copy(folder, tmp_path / "copy"), DAMAGES[damage]))
    assert "\n" not in str(caught.value)


def test_data_that_is_a_link_out_of_the_folder_or_no_file_is_refused(folder: Path, tmp_path: Path) -> None:
    place = copy(folder, tmp_path / "copy")
    data = place / "model.onnx.data"
    kept = data.rename(tmp_path / "elsewhere")
    data.symlink_to(kept)
    with pytest.raises(DataError, match="link out of it"):
        read_onnx(place / "model.onnx")
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(DataError, match="a device"):
        read_onnx(place / "model.onnx")
    data.unlink()
    with pytest.raises(DataError, match="no such file"):
        read_onnx(place / "model.onnx")
    data.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(DataError, match="it was cut"):
        read_onnx(place / "model.onnx")


def test_a_file_cut_anywhere_is_refused(folder: Path, tmp_path: Path) -> None:
    raw = (folder / "model.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    for size in (*range(200), *range(200, len(raw), 997)):
        path.write_bytes(raw[:size])
        with pytest.raises(DataError):
            read_onnx(path)


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        read_onnx(path)
