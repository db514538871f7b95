"""`info` and `verify` of ONNX folders: what is said of whole ones, and that every damage is named and exits 3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Run
from test_inspect import edit_json, make_model, make_tokenizer

from llmcli.cli.info import table
from llmcli.config import ExportConfig
from llmcli.errors import DataError
from llmcli.files.artefacts import kind_of
from llmcli.operations.export import export
from llmcli.operations.inspect import describe
from llmcli.operations.verify import verify


def exported(model: Path, output: Path, **settings: Any) -> Path:
    list(export(model, output, ExportConfig(check=False, **settings)))
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("made") / "model", hidden_size=256, intermediate_size=1088, vocab_size=128
    )


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    """Two graphs over one file of data."""
    return exported(model, model.with_name("int4"), precision="int4", prefill="int8")


SETTINGS: list[dict[str, str]] = [
    {"precision": "fp32"},
    {"precision": "fp16"},
    {"precision": "int8"},
    {"precision": "int8", "quantizer": "weight-only"},
    {"precision": "int4"},
    {"precision": "int4", "target": "portable"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings.values()))
def test_every_precision_is_described_and_whole(model: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    output = exported(model, tmp_path / "out", **settings)
    facts = describe(output).facts
    assert (facts["precision"], facts["context"], facts["layers"]) == (settings["precision"], 64, 2)
    assert facts["target"] == settings.get("target", "ort")
    products = 5 if settings == {"precision": "int8"} else 4  # of a layer: gate and up are one or two
    assert sum(facts["matrices"].values()) == 2 * products + 1
    assert facts["tokenizer"]["vocab_size"] == 30
    assert ("prefill_operators" in facts) == (settings == {"precision": "int4"})
    assert verify(output, values=True).problems == ()


def test_a_second_graph_is_described_too(llmcli: Run, folder: Path) -> None:
    facts = json.loads(llmcli("info", folder, "--json").stdout)
    assert facts["kind"] == "onnx"
    assert facts["operators"]["MatMulNBits"] > 4
    assert facts["prefill_operators"]["MatMulIntegerToFloat"] > 4
    assert facts["size_bytes"] == sum((folder / name).stat().st_size for name in FILES)
    shown = llmcli("info", folder).stdout
    assert "prefill operators\n" in shown
    assert table({"generation_config.json": "x"}) == ["generation_config.json  x"]
    assert verify(folder, values=True).problems == ()


FILES = ("model.onnx", "model.onnx.data", "prefill.onnx")


def change_graph(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Changes a graph, and takes the manifest away, which would tell any change."""

    def apply(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        proto = ir.serde.serialize_model(ir.load(folder / name))
        change(proto)
        (folder / name).write_bytes(proto.SerializeToString())

    return apply


def move_out(proto: Any) -> None:
    for tensor in proto.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location":
                item.value = "../elsewhere.data"


def put_nan(proto: Any) -> None:
    norm = next(tensor for tensor in proto.graph.initializer if "input_layernorm" in tensor.name)
    values = np.frombuffer(norm.raw_data, np.float32).copy()
    values[3] = np.nan
    norm.raw_data = values.tobytes()


def put_nan_beside(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    proto = ir.serde.serialize_model(ir.load(folder / "model.onnx"))
    kinds = {1: np.float32, 10: np.float16}
    scales = next(tensor for tensor in proto.graph.initializer if tensor.external_data and tensor.data_type in kinds)
    place = int(next(item.value for item in scales.external_data if item.key == "offset"))
    raw = bytearray((folder / "model.onnx.data").read_bytes())
    infinite = kinds[scales.data_type](np.inf).tobytes()
    raw[place : place + len(infinite)] = infinite
    (folder / "model.onnx.data").write_bytes(bytes(raw))


def rename_input(proto: Any) -> None:
    proto.graph.input[0].name = "tokens"


def set_fact(key: str, value: str) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        next(item for item in proto.metadata_props if item.key == key).value = value

    return change


def flip(name: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (folder / name).write_bytes(bytes(raw))

    return apply


def cut(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:4096])


def another_shape(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=3, max_position_embeddings=32))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").write_text("{")


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "data missing": (lambda f: (f / "model.onnx.data").unlink(), ["model.onnx.data: missing"]),
    "data damaged": (flip("model.onnx.data"), ["model.onnx.data: its sha256 is not the manifest's"]),
    "data cut": (cut, ["model.onnx.data: has 4096 bytes; "]),
    "graph missing": (lambda f: (f / "model.onnx").unlink(), ["model.onnx: missing"]),
    "second graph missing": (lambda f: (f / "prefill.onnx").unlink(), ["prefill.onnx: missing"]),
    "second graph damaged": (flip("prefill.onnx"), ["prefill.onnx: its sha256 is not the manifest's"]),
    "data elsewhere": (
        change_graph("model.onnx", move_out),
        ["model.onnx: ", "it asks for the file '../elsewhere.data'; weights are in model.onnx.data"],
    ),
    "a stranger's operator": (
        change_graph("model.onnx", lambda proto: setattr(proto.graph.node[0], "op_type", "Conv")),
        ["the operator Conv is none of those that `llmcli export` writes", "expected is a decoder of input_ids, att"],
    ),
    "a stranger's input": (
        change_graph("prefill.onnx", rename_input),
        ["prefill.onnx: is not a decoder as llmcli exports it: it lacks input_ids; expected are input_ids, "],
    ),
    "another context": (
        change_graph("prefill.onnx", set_fact("llmcli.context", "99")),
        ["prefill.onnx: 99 tokens of context, config.json says 64"],
    ),
    "another config": (
        another_shape,
        ["model.onnx: 2 layers, config.json says 3", "prefill.onnx: 64 tokens of context, config.json says 32"],
    ),
    "two at once": (no_config, ["config.json: missing", "tokenizer.json:1:2: is not valid JSON"]),
    "report missing": (lambda f: (f / "export.json").unlink(), ["export.json: missing"]),
    "another tokenizer": (
        lambda f: make_tokenizer(f, {"<|endoftext|>": 0, "?": 128}),
        ["tokenizer.json: has 129 tokens, the embedding 128 rows"],
    ),
    "nan in the graph": (
        change_graph("model.onnx", put_nan),
        ["model.onnx: model.layers.0.input_layernorm.weight: 1 of 256 values are not finite"],
    ),
    "infinity beside it": (put_nan_beside, ["model.onnx.data: ", "values are not finite"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_an_onnx_folder_is_named(tmp_path: Path, folder: Path, damage: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change, expected = DAMAGES[damage]
    change(copy)
    verdict = verify(copy, values=True)
    assert verdict.kind == "onnx"
    for told in expected:
        assert any(told in problem for problem in verdict.problems), verdict.problems
    assert not any("\n" in problem or str(tmp_path) in problem for problem in verdict.problems)


def test_verify_of_a_damaged_folder_exits_3_and_using_it_exits_2(llmcli: Run, tmp_path: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "model.onnx").unlink()
    ended = llmcli("verify", copy)
    assert (ended.returncode, ended.stdout) == (3, "model.onnx: missing\n")
    assert ended.stderr == f"Error: {copy}: 1 problem in this ONNX folder\n"
    used = llmcli("generate", "-m", copy, "a", "--threads", 1)
    assert (used.returncode, used.stderr) == (2, f"Error: {copy}/model.onnx: no such file or folder\n")
    with pytest.raises(DataError, match=r"model\.onnx: no such file"):
        describe(copy)


def test_weights_for_torch_make_it_a_model_whatever_stands_beside(tmp_path: Path, folder: Path, model: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.copy(model / "model.safetensors", copy)
    assert kind_of(copy) == "model"
