"""Quantizers that search, calibrate and make up for each other's errors: what error is left, and where it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_onnx_session import ids_of, make_model

from llmcli.models.folder import load_config
from llmcli.onnx.families import ModelWeights
from llmcli.onnx.folder import write_graph
from llmcli.onnx.least_error import LeastError, output_error
from llmcli.onnx.quantize import BLOCKS, Plan, Quantizer, RoundToNearest, Scheme, packed
from llmcli.onnx.scale_search import ScaleSearch, searched
from llmcli.onnx.sequential import Sequential
from llmcli.onnx.weights import Weights
from llmcli.runtime.onnx_session import OnnxSession
from llmcli.runtime.torch_session import open_session as open_torch

INT4 = Scheme(BLOCKS, 4, 32)


def weight_of(outputs: int, inputs: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((outputs, inputs), dtype=np.float32)


def moment_of(inputs: int, seed: int = 1) -> Any:
    """Moments of inputs that depend on each other, some much larger than others."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((400, inputs // 4)) @ generator.standard_normal((inputs // 4, inputs))
    x = (x + generator.standard_normal(x.shape)) * np.exp(generator.standard_normal(inputs) / 2)
    return (x.T @ x / len(x)).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------
# Scales


@pytest.mark.parametrize("inputs", [64, 72])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_weights_that_the_codes_can_hold_come_back(inputs: int, bits: int, zero_points: bool) -> None:
    generator = np.random.default_rng(0)
    middle = 1 << (bits - 1)
    codes = generator.integers(-middle, middle, (5, inputs)).astype(np.float32)
    codes[:, ::32] = -middle  # every block has the extreme
    codes[:, 1::32] = middle - 1
    weight = codes * np.float32(0.125)
    found = searched(weight, Scheme(BLOCKS, bits, 32), zero_points=zero_points)
    assert np.abs(found.weights()[:, :inputs] - weight).max() < 1e-5


@pytest.mark.parametrize("block", [32, 64, 128])
def test_searched_scales_leave_a_tenth_less_than_rounding(block: int) -> None:
    scheme, weight = Scheme(BLOCKS, 4, block), weight_of(64, 256)
    errors = [
        np.square(method.blocks("w", weight, scheme).dequantized() - weight).mean()
        for method in (RoundToNearest(), ScaleSearch())
    ]
    assert errors[1] < 0.9 * errors[0]


def test_zero_points_pay_where_weights_lie_on_one_side() -> None:
    weight = np.abs(weight_of(32, 128)) + 1
    plain, with_points = (searched(weight, INT4, zero_points=choice).weights() for choice in (False, True))
    assert np.square(with_points - weight).mean() < 0.4 * np.square(plain - weight).mean()


def test_important_inputs_err_less() -> None:
    weight, importance = weight_of(64, 32), np.ones(32, np.float32)
    importance[:4] = 100
    plain, weighted = searched(weight, INT4).weights(), searched(weight, INT4, importance).weights()
    assert np.square(weighted - weight)[:, :4].mean() < 0.8 * np.square(plain - weight)[:, :4].mean()


@pytest.mark.parametrize("value", [0.0, 1e-38, -3e-33, 1e15])
@pytest.mark.parametrize("method", [ScaleSearch(), LeastError(), LeastError(zero_points=True)])
def test_constant_rows_of_any_size_come_back(method: Quantizer, value: float) -> None:
    weight = weight_of(3, 48)
    weight[1] = value
    found = method.blocks("w", weight, INT4, moment_of(48)).dequantized()
    assert np.isfinite(found).all()
    assert np.abs(found[1] - value).max() <= max(1e-30, 1e-3 * abs(value))


# ----------------------------------------------------------------------------------------------------------------
# The error of the outputs


@pytest.mark.parametrize("zero_points", [False, True])
def test_calibrated_codes_leave_a_third_of_the_searched_ones_error(zero_points: bool) -> None:
    weight, moment = weight_of(48, 160), moment_of(160)
    plain = searched(weight, INT4, np.diag(moment), zero_points=zero_points).weights()
    found = LeastError(zero_points=zero_points).blocks("w", weight, INT4, moment)
    assert (found.zero_points is not None) == zero_points
    assert output_error(weight, found.dequantized(), moment) < output_error(weight, plain, moment) / 3


def test_descent_lowers_what_feedback_leaves() -> None:
    weight, moment = weight_of(48, 160), moment_of(160)
    errors = [
        output_error(weight, LeastError(passes=passes).blocks("w", weight, INT4, moment).dequantized(), moment)
        for passes in (0, 1, 3)
    ]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < errors[1]


def test_rows_are_independent_and_filling_is_the_middle_code() -> None:
    weight, moment = weight_of(12, 72), moment_of(72)
    whole = LeastError().blocks("w", weight, INT4, moment)
    parts = [LeastError().blocks("w", part, INT4, moment).dequantized() for part in (weight[:5], weight[5:])]
    assert np.allclose(np.concatenate(parts), whole.dequantized(), atol=1e-5)
    assert whole.dequantized().shape == (12, 72)
    assert (whole.data.reshape(12, -1)[:, 36:] == packed(np.full((1, 2), 8, np.uint8), 4)[0, 0]).all()


def test_inputs_that_never_occur_are_rounded_all_the_same() -> None:
    weight, moment = weight_of(8, 64), moment_of(64)
    moment[10:20] = moment[:, 10:20] = 0
    for given in (moment, np.zeros_like(moment)):
        found = LeastError().blocks("w", weight, INT4, given).dequantized()
        assert np.abs(found - weight)[:, 10:20].max() < 1


# ----------------------------------------------------------------------------------------------------------------
# Along the model


def sequential(folder: Path, windows: list[Any], method: LeastError | None = None) -> Sequential:
    config = load_config(folder)
    return Sequential(config, ModelWeights(config, Weights(folder)), windows, 1, method)


def windows_of(count: int) -> list[Any]:
    return [np.array(ids_of(60, seed), np.int64) for seed in range(count)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "gpt2"])
def test_a_model_loses_least_when_each_product_makes_up_for_those_before(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / family, family)
    ids = np.array([ids_of(60, seed) for seed in range(100, 108)])
    wanted = np.ones((8, 59), np.bool_)
    exact = open_torch(model, device="cpu", threads=1).score(ids, wanted)
    errors = []
    for number, quantizer in enumerate((RoundToNearest(), ScaleSearch(), sequential(model, windows_of(24)))):
        place = tmp_path / str(number)
        place.mkdir()
        plan = Plan("int4", block_size=32, quantizer=quantizer)
        for _ in write_graph(model, load_config(model), plan, place):
            pass
        session = OnnxSession(place, threads=1)
        errors.append(float(np.square(session.score(ids, wanted) - exact).mean()))
        session.close()
    assert errors[2] < 0.75 * min(errors[:2])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # a tied head, one of its own, positions
def test_the_rows_of_common_tokens_err_as_int8_does(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / family, family)
    config, ids = load_config(model), np.array([ids_of(60, seed) for seed in range(4)])
    ids[:2] %= 40  # those that are common, and any
    wanted = np.ones((4, 59), np.bool_)
    exact = open_torch(model, device="cpu", threads=1).score(ids, wanted)
    weights = ModelWeights(config, Weights(model))
    names = [matrix for place in range(config.num_hidden_layers) for matrix in _matrices(weights.layer(place))]
    errors = []
    for common in (0.0, 0.42, 0.999):
        place = tmp_path / str(common)
        place.mkdir()
        plan = Plan("int4", block_size=32, common=common, schemes=dict.fromkeys(names, Scheme(BLOCKS, 8, 32)))
        figures = list(write_graph(model, config, plan, place))[-1]
        session = OnnxSession(place, threads=1)
        errors.append(np.square(session.score(ids, wanted) - exact).reshape(2, -1).mean(1))
        session.close()
    assert figures.kinds["int8, blocks of 32"] > len(names)
    assert errors[2].max() < errors[0].min() / 8  # all but one row in int8
    assert errors[1][0] < errors[0][0] / 2


def _matrices(layer: Any) -> list[str]:
    return [matrix.name for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)]


def test_a_matrix_may_come_in_pieces_and_others_be_left_as_they_are(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    config = load_config(model)
    weights = ModelWeights(config, Weights(model))
    second = weights.layer(1)
    for matrix in (second.output, second.down):
        rows = matrix.rows(0, matrix.shape[0])
        whole = sequential(model, windows_of(3)).blocks(matrix.name, rows, INT4).dequantized()
        pieces = sequential(model, windows_of(3))
        parts = [pieces.blocks(matrix.name, part, INT4).dequantized() for part in (rows[:10], rows[10:])]
        assert np.allclose(np.concatenate(parts), whole, atol=1e-4)
        assert np.square(whole - rows).mean() < np.square(rows).mean() / 50  # what came before is float: no correction
