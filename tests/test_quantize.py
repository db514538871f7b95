"""Quantization: the codes that products compute with, and the moments that calibration takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_onnx_session import FAMILIES, ids_of, make_model

from llmcli.config import ExportConfig
from llmcli.errors import ConfigError
from llmcli.models.folder import load_config, load_model
from llmcli.onnx.calibrate import Calibration
from llmcli.onnx.families import ModelWeights
from llmcli.onnx.quantize import (
    BLOCKS,
    BlockQuantized,
    Plan,
    RoundToNearest,
    Scheme,
    packed,
    round_channels,
    unpacked,
)
from llmcli.onnx.quantizers import QUANTIZERS
from llmcli.onnx.weights import Weights

SCHEMES = [Scheme(BLOCKS, bits, size) for bits in (4, 8) for size in (32, 64, 128)]


def weight_of(outputs: int, inputs: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((outputs, inputs), dtype=np.float32)


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 99))
def test_packed_codes_come_back(rows: int, count: int, bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), np.uint8)
    found = unpacked(packed(codes, bits), bits)[:, :count]
    assert np.array_equal(found, codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("inputs", [128, 200])
def test_rounding_errs_by_half_a_step_at_most(scheme: Scheme, inputs: int) -> None:
    weight = weight_of(5, inputs)
    weight[2] = 0
    weight[3, 7] = 30
    found = RoundToNearest().blocks("w", weight, scheme)
    error = np.abs(found.dequantized() - weight)
    steps = np.repeat(np.abs(found.scales), scheme.block_size, 1)[:, :inputs]
    # The code beyond the outermost on the other side is missing, so there a whole step may be lost.
    assert (error <= steps * 1.001 + 1e-7).all()
    assert (error <= steps / 2 * 1.001 + 1e-7).mean() > 0.95
    assert not found.dequantized()[2].any()
    assert abs(found.dequantized()[3, 7] - 30) < 1e-3


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_operator_computes_with_the_weights_that_are_told(scheme: Scheme, asymmetric: bool) -> None:
    """MatMulNBits in float: unpacking, scales and zero points agree with `dequantized`."""
    import onnx_ir as ir
    import onnxruntime

    weight = weight_of(6, 256)
    found = RoundToNearest().blocks("w", weight, scheme)
    given: dict[str, Any] = {"codes": found.data, "scales": found.scales}
    if asymmetric:
        points = np.random.default_rng(1).integers(0, 1 << scheme.bits, found.scales.shape, np.uint8)
        found = BlockQuantized(scheme, 256, found.data, found.scales, packed(points, scheme.bits))
        given["zeros"] = found.zero_points
    x = ir.val("x", ir.DataType.FLOAT, ["n", 256])
    y = ir.val("y", ir.DataType.FLOAT, ["n", 6])
    constants = [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in given.items()]
    sizes = {"K": 256, "N": 6, "bits": scheme.bits, "block_size": scheme.block_size, "accuracy_level": 1}
    node = ir.node("MatMulNBits", [x, *constants], sizes, domain="com.microsoft", outputs=[y])
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], [y], nodes=[node], initializers=constants, opset_imports=opsets, name="g")
    content = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    engine = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    states = weight_of(3, 256, 2)
    expected = states @ found.dequantized().T
    assert np.abs(engine.run(None, {"x": states})[0] - expected).max() < 1e-3 * np.abs(expected).max()


def test_channels_err_by_half_a_step_at_most() -> None:
    weight = weight_of(7, 50)
    weight[2] = 0
    found = round_channels(weight)
    assert found.data.shape == (50, 7)
    assert (np.abs(found.dequantized() - weight) <= np.abs(weight).max(1, keepdims=True) / 254 * 1.001).all()


def test_one_place_decides_and_exceptions_are_by_name() -> None:
    plan = Plan("int4", schemes={"a": Scheme(BLOCKS, 8, 32)})
    assert plan.scheme("a", (8, 64)) == Scheme(BLOCKS, 8, 32)
    assert plan.scheme("b", (8, 64)) == Scheme(BLOCKS, 4, 64)
    assert plan.scheme("b", (8, 96)) == Scheme(BLOCKS, 4, 32)
    assert plan.scheme("b", (8, 50)) == Scheme(BLOCKS, 4, 32)
    assert plan.scheme("e", (8, 50), "embedding").kind == "float"  # gathering knows full blocks alone
    wide = Plan("int4", largest=128)
    sizes = {inputs: wide.scheme("b", (8, inputs)).block_size for inputs in (64, 96, 128, 288, 576, 640, 1000)}
    assert sizes == {64: 64, 96: 32, 128: 128, 288: 32, 576: 128, 640: 128, 1000: 128}  # filled by an eighth at most
    assert wide.scheme("h", (8, 256), "head").block_size == wide.scheme("e", (8, 256), "embedding").block_size == 64
    assert Plan("int8", largest=128, weight_only=True).scheme("b", (8, 256)).block_size == 64
    assert Plan("int8").scheme("b", (512, 64)) == Scheme("channels", 8)
    assert Plan("int8").scheme("b", (511, 64)) == Scheme(BLOCKS, 8, 64)  # too small to pay for its scales
    assert Plan("int8").scheme("h", (8, 64), "head") == Scheme(BLOCKS, 8, 64)
    assert Plan("int8").rows_are_independent
    assert not Plan("int8", activations="tensor").rows_are_independent
    assert Plan("int8", activations="tensor", weight_only=True).rows_are_independent
    with pytest.raises(ConfigError, match=r"blocks of 128 do not divide the 96 inputs of b; take auto or 32"):
        Plan("int4", block_size=128).scheme("b", (8, 96))


# ----------------------------------------------------------------------------------------------------------------
# Calibration


def inputs_in_torch(folder: Path, windows: list[Any]) -> dict[str, Any]:
    """The inputs of every linear map, by the name of its weight, over all tokens."""
    model, found = load_model(folder), {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, given: found.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]))

    for name, module in model.named_modules():
        if hasattr(module, "weight") and module.weight.ndim == 2 and not isinstance(module, torch.nn.Embedding):
            module.register_forward_pre_hook(note(name))
    heads = []
    with torch.no_grad():
        for window in windows:
            heads.append(model.hidden(torch.from_numpy(window)[None])[0])
    return {name: torch.cat(pieces).numpy() for name, pieces in found.items()} | {"lm_head": torch.cat(heads).numpy()}


@pytest.mark.parametrize("family", [name for name in FAMILIES if "odd" not in name])
def test_moments_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    folder = make_model(tmp_path / "model", family)
    windows = [np.array(ids_of(size, size)) for size in (40, 40, 7)]
    config = load_config(folder)
    calibration = Calibration(config, ModelWeights(config, Weights(folder)), windows, 1)
    assert calibration.get("model.embed_tokens") is None
    known = inputs_in_torch(folder, windows)
    gpt2 = family == "gpt2"
    for layer in range(2):
        stem = f"transformer.h.{layer}" if gpt2 else f"model.layers.{layer}"
        names = {
            "attn.c_attn": "attn.c_attn",
            "attn.c_proj": "attn.c_proj",
            "mlp.c_fc": "mlp.c_fc",
            "mlp.c_proj": "mlp.c_proj",
        }
        if not gpt2:
            names = {"self_attn.qkv_proj": "self_attn.q_proj", "self_attn.o_proj": "self_attn.o_proj"}
            names |= {"mlp.gate_up_proj": "mlp.gate_proj", "mlp.down_proj": "mlp.down_proj"}
        for ours, theirs in names.items():
            x = known[f"{stem}.{theirs}"]
            expected = x.T @ x / len(x)
            found = calibration.get(f"{stem}.{ours}")
            assert found is not None
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max() + 1e-6
    found = calibration.get("lm_head")
    expected = known["lm_head"].T @ known["lm_head"] / len(known["lm_head"])
    assert found is not None
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_quantizer_that_needs_moments_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_export import make_model as make_whole

    from llmcli.operations.export import export

    asked: dict[str, bool] = {}

    class Noting(RoundToNearest):
        needs_moments = True

        def blocks(self, name: str, weight: Any, scheme: Scheme, moment: Any = None) -> BlockQuantized:
            asked[name] = moment is not None and moment.shape == (weight.shape[1],) * 2
            return super().blocks(name, weight, scheme, moment)

    monkeypatch.setitem(QUANTIZERS, "round", Noting)
    (tmp_path / "text.txt").write_text("One and one and one is three. " * 60)
    source = make_whole(tmp_path / "model", tie_word_embeddings=False)
    text = str(tmp_path / "text.txt")
    config = ExportConfig(precision="int4", quantizer="round", check=False, calibration=text, threads=1)
    list(export(source, tmp_path / "out", config))
    assert len(asked) == 10
    assert [name for name, given in asked.items() if not given] == ["model.embed_tokens"]
