"""Steps of fixed shapes, weights of few bits, and what CUDA runs: on the CPU where that goes, the rest marked `gpu`.

The kernels are run without a GPU in Triton's interpreter, where triton is installed: `TRITON_INTERPRET=1 pytest
tests/test_gpu.py`.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from small_model import make_model as make_small
from small_model import make_seven
from test_onnx_session import FAMILIES, SHAPE, make_model, make_onnx

from llmcli.errors import UsageError
from llmcli.files.prompt_cache import model_key
from llmcli.models import ops
from llmcli.models.cache import KeyValueCache, Step
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.folder import load_model
from llmcli.models.quantized import GROUP, QuantizedLinear, fuse, packed, quantize, unpacked
from llmcli.runtime import onnx_device
from llmcli.runtime.onnx_session import OnnxSession
from llmcli.runtime.open import open_session
from llmcli.runtime.torch_session import TorchSession

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 2e-5
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
KINDS = ["llama", "llama-llama3", "llama-odd", "qwen3", "mistral", "qwen2", "gpt2"]


def decoder(family: str = "llama", **more: Any) -> Decoder:
    """A model whose every weight is drawn."""
    shape = {**SHAPE, **FAMILIES[family], **more}
    model = Decoder(DecoderConfig(model_type=family.partition("-")[0], **shape)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    return model


def tokens(step: int, rows: int = 2) -> Any:
    return (np.arange(1, rows + 1, dtype=np.int64)[:, None] * (step + 3) + step) % SHAPE["vocab_size"]


def furthest(one: TorchSession, other: TorchSession, prompts: list[list[int]], steps: int) -> float:
    """The largest difference of their logits along a continuation."""
    found = [np.abs(one.start(prompts) - other.start(prompts)).max()]
    for step in range(steps):
        ids = tokens(step, len(prompts))
        found.append(np.abs(one.feed(ids) - other.feed(ids)).max())
    return float(max(found))


# ----------------------------------------------------------------------------------------------------------------
# Steps of fixed shapes


@pytest.mark.parametrize("family", KINDS)
def test_steps_over_the_whole_capacity_give_the_logits_of_plain_ones(family: str) -> None:
    model = decoder(family)
    other = TorchSession(fuse(copy.deepcopy(model)), static=True)
    assert furthest(TorchSession(model), other, PROMPTS, 70) <= TOLERANCE  # the cache grows on the way
    assert other.lengths == [73, 77]


def test_steps_go_on_after_all_that_changes_rows() -> None:
    model = decoder()
    sessions = [TorchSession(model), TorchSession(model, static=True)]

    def alike(find: Any) -> None:
        one, other = (find(session) for session in sessions)
        assert np.abs(one - other).max() <= TOLERANCE

    alike(lambda session: session.start(PROMPTS))
    alike(lambda session: session.feed(tokens(0)))
    alike(lambda session: session.feed(np.array([[5, 6, 7], [8, 9, 1]], np.int64), keep=2))  # drafts, say
    for session in sessions:
        session.rewind([4, 6])
    alike(lambda session: session.feed(tokens(1)))
    alike(lambda session: session.replace(0, [9, 8, 7, 6]))
    alike(lambda session: session.feed(tokens(2)))
    for session in sessions:
        session.select([1, 0, 1])
    alike(lambda session: session.feed(tokens(3, 3)))
    for session in sessions:
        session.copy(0, 2, 3)
    alike(lambda session: session.feed(tokens(4, 3)))
    states = sessions[0].export_row(0)
    for session in sessions:
        session.import_row(states)
    alike(lambda session: session.feed(tokens(5, 1)))


def test_a_prompt_that_fits_takes_the_cache_that_is_there_and_its_steps() -> None:
    session = TorchSession(decoder(), static=True)
    session.start(PROMPTS)
    session.feed(tokens(0))
    cache, steps = session._cache, session._steps
    again = session.start([[1], [2, 3]])
    session.feed(tokens(1))
    assert (session._cache is cache, session._steps is steps) == (True, True)
    assert np.abs(again - TorchSession(decoder()).start([[1], [2, 3]])).max() <= TOLERANCE
    session.start([[1]])  # other rows
    assert session._cache is not cache


def test_the_context_cannot_be_passed_by_steps() -> None:
    session = TorchSession(decoder(max_position_embeddings=8), static=True)
    session.start([[1] * 7, [2]])
    session.feed(tokens(0))
    with pytest.raises(UsageError, match="9 tokens do not fit the model's context of 8"):
        session.feed(tokens(1))
    assert session.lengths == [8, 2]


def test_a_step_tells_when_the_cache_has_other_tensors() -> None:
    cache = decoder().cache(rows=1, capacity=2)
    step = Step(cache)
    assert step.fits(cache)
    cache.make_room(3)
    assert not step.fits(cache)


# ----------------------------------------------------------------------------------------------------------------
# Weights of few bits


def test_codes_survive_packing() -> None:
    codes = torch.randint(-8, 8, (3, 2 * GROUP), dtype=torch.int8)
    data = packed(codes)
    assert (data.dtype, data.shape) == (torch.uint8, (3, GROUP))
    assert torch.equal(unpacked(data), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.008), (4, 0.1)])
def test_rounded_weights_are_near(bits: int, most: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 2 * GROUP, generator=generator).to(dtype)
    weight[3] = 0
    made = QuantizedLinear(weight, None, bits, "cpu")
    error = (made.dequantized(torch.float32) - weight.float()).square().mean().sqrt() / weight.float().std()
    assert error < most
    assert (made.dequantized(torch.float32)[3] == 0).all()
    assert made.scales.dtype == dtype


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [64, 100, 7])
def test_a_product_is_that_of_its_dequantized_weights(bits: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(9, inputs, generator=generator), torch.randn(9, generator=generator)
    made = QuantizedLinear(weight, bias, bits, "cpu")
    assert made.dequantized(torch.float32).shape == (9, inputs)
    x = torch.randn(2, 3, inputs, generator=generator)
    assert torch.equal(made(x), torch.nn.functional.linear(x, made.dequantized(torch.float32), bias))


def test_four_bits_leave_less_error_than_plain_rounding() -> None:
    weight = torch.randn(64, GROUP, generator=torch.Generator().manual_seed(2))
    scale = weight.abs().amax(1, keepdim=True) / 7
    plain = (weight / scale).round().clamp(-8, 7) * scale
    made = QuantizedLinear(weight, None, 4, "cpu").dequantized(torch.float32)
    assert (made - weight).square().sum() < 0.85 * (plain - weight).square().sum()


@pytest.mark.parametrize("family", ["llama-llama3", "llama-odd", "qwen3", "gpt2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_gives_what_its_weights_say(family: str, bits: int) -> None:
    model = decoder(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = model(ids)
        made = quantize(fuse(copy.deepcopy(model)), bits)
        found = made(ids)
    share = float((found - before).std() / before.std())
    assert 0 < share < (0.03 if bits == 8 else 0.5)
    assert made.step_bytes() < model.step_bytes() / 2
    assert not any(isinstance(module, torch.nn.Linear | ops.Conv1D) for module in made.modules())
    sessions = TorchSession(made), TorchSession(made, static=True)
    assert furthest(*sessions, PROMPTS, 5) <= TOLERANCE
    wanted = np.ones((1, 3), np.bool_)
    expected = torch.log_softmax(found, -1)[0, :3].gather(-1, ids[0, 1:, None])[:, 0].numpy()
    assert np.abs(sessions[0].score(ids.numpy(), wanted) - expected).max() <= TOLERANCE


def test_fused_products_are_the_same() -> None:
    for family in ("llama-llama3", "qwen2"):
        model, ids = decoder(family), torch.tensor([[5, 6, 7, 8]])
        with torch.inference_mode():
            assert (fuse(copy.deepcopy(model))(ids) - model(ids)).abs().max() <= TOLERANCE


def test_commands_round_weights_as_they_read_them(llmcli: Run, tmp_path: Path) -> None:
    kind = "int4"
    model = make_small(tmp_path / "model", make_seven(tmp_path / "tokenizer"))
    session = open_session(model, device="cpu", threads=1, quantize=kind)
    plain = open_session(model, device="cpu", threads=1)
    assert isinstance(session, TorchSession)
    assert isinstance(plain, TorchSession)
    assert session.model.step_bytes() < plain.model.step_bytes()
    assert np.abs(session.start([[1, 2, 3]]) - plain.start([[1, 2, 3]])).max() > 0
    assert model_key(model, kind) != model_key(model)  # a prompt that one read is not the other's
    words = ("generate", "-m", model, "ab", "--max-new-tokens", 3, "--seed", 1, "--quantize", kind, "--device", "cpu")
    ended = llmcli(*words, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")


# ----------------------------------------------------------------------------------------------------------------
# What is asked for and cannot be


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("precision", [None, "fp16", "int4"])
def test_cuda_without_cuda_is_one_line(llmcli: Run, tmp_path: Path, precision: str | None) -> None:
    model = make_small(tmp_path / "model", make_seven(tmp_path / "tokenizer"))
    if precision is not None:
        ended = llmcli("export", model, "-o", tmp_path / "onnx", "--precision", precision, "--no-check")
        assert ended.returncode == 0, ended.stderr
        model = tmp_path / "onnx"
    ended = llmcli("generate", "-m", model, "ab", "--device", "cuda", "--seed", 1)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ("in fp16" if precision == "int4" else "no working cuda device was found") in ended.stderr


def test_an_onnx_folder_is_not_rounded_again(tmp_path: Path) -> None:
    folder = make_onnx(make_model(tmp_path / "model"), precision="fp32")
    with pytest.raises(UsageError, match=r"--quantize: .* has the precision of its export"):
        open_session(folder, quantize="int8")
    with pytest.raises(UsageError, match="mps needs the model that was exported"):
        open_session(folder, device="mps")


def test_onnxruntime_that_falls_back_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = make_onnx(make_model(tmp_path / "model"), precision="fp16")
    # As where the provider is there and its libraries are not: the session comes, without it.
    monkeypatch.setattr(onnx_device, "providers", lambda _device: ["CPUExecutionProvider"])
    monkeypatch.setattr("llmcli.runtime.onnx_session.providers", lambda _device: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="CUDA provider does not load"):
        OnnxSession(folder, threads=1, device="cuda")


def test_rounding_on_cuda_without_kernels_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("llmcli.runtime.torch_session.cuda_kernels", lambda: None)
    with pytest.raises(UsageError, match="needs triton"):
        open_session(model, device="cuda", quantize="int8")


# ----------------------------------------------------------------------------------------------------------------
# onnxruntime with the cache on a device; the processor stands in for one


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cache_in_a_devices_memory_changes_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_onnx(make_model(tmp_path / "model", family), precision="fp16")
    sessions = [OnnxSession(folder, threads=1)]
    monkeypatch.setattr(
        "llmcli.runtime.onnx_session.HostCache",
        lambda shape, dtype: onnx_device.DeviceCache(shape, dtype, "cpu"),
    )
    sessions.append(OnnxSession(folder, threads=1))

    def alike(find: Any) -> None:
        one, other = (find(session) for session in sessions)
        assert np.array_equal(one, other)

    alike(lambda session: session.start(PROMPTS))
    assert isinstance(sessions[1]._rows.caches[0], onnx_device.DeviceCache)  # type: ignore[union-attr]
    for step in range(70):
        alike(lambda session, step=step: session.feed(tokens(step)))
    for session in sessions:
        session.rewind([5, 9])
        session.select([1, 0, 1])
        session.copy(0, 1, 4)
    alike(lambda session: session.feed(tokens(3, 3)))
    alike(lambda session: session.replace(1, [4, 5]))
    states = sessions[0].export_row(2)
    assert all(np.array_equal(one, other) for one, other in zip(states, sessions[1].export_row(2), strict=True))
    for session in sessions:
        session.import_row(states)
    alike(lambda session: session.feed(tokens(4, 1)))
    ids = np.arange(12, dtype=np.int64)[None]
    alike(lambda session: session.score(ids, np.ones((1, 11), np.bool_)))


# ----------------------------------------------------------------------------------------------------------------
# The kernels, on a GPU or in Triton's interpreter


@pytest.fixture
def kernels() -> Any:
    """Our kernels, where they can run."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    from llmcli.models import kernels

    return kernels


def place() -> tuple[str, torch.dtype]:
    """Where kernels run, and in what precision they are compared: the interpreter's bfloat16 is not to be trusted."""
    return ("cpu", torch.float32) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", torch.bfloat16)


def check_kernels(kernels: Any) -> None:
    device, dtype = place()
    most = 1e-5 if dtype == torch.float32 else 1e-2
    generator = torch.Generator().manual_seed(0)
    for outputs, inputs in ((30, 100), (7, 64), (65, 1300)):
        for bits in (8, 4):
            weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
            bias = torch.randn(outputs, generator=generator).to(dtype)
            made = QuantizedLinear(weight, bias, bits, device)
            for rows in (1, 3, 16):
                x = torch.randn(rows, 1, inputs, generator=generator).to(device, dtype)
                found = kernels.product(x, made.codes, made.scales, made.bias, bits, GROUP).float()
                wide = made.dequantized(torch.float32)
                expected = torch.nn.functional.linear(x.float(), wide, bias.to(device).float())
                assert (found - expected).abs().max() <= most * expected.abs().max(), (outputs, inputs, bits, rows)
    x = torch.randn(3, 2, 50, generator=generator).to(device, dtype)
    gate, up = x.float().chunk(2, -1)
    assert (kernels.gated(x).float() - torch.nn.functional.silu(gate) * up).abs().max() <= most * 5


def check_attention(kernels: Any, family: str, tokens_held: int, **more: Any) -> None:
    device, dtype = place()
    model = fuse(decoder(family, **more)).to(device, dtype)
    ids = torch.arange(2 * tokens_held).view(2, -1) % SHAPE["vocab_size"]
    caches = [model.cache(rows=2, capacity=tokens_held + 2) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model.hidden(ids.to(device), cache)
            cache.rewind([tokens_held, tokens_held // 2])
        steps = [Step(cache, chosen) for cache, chosen in zip(caches, (None, kernels), strict=True)]
        for step in range(2):
            found = []
            for one, cache in zip(steps, caches, strict=True):
                one.positions.copy_(cache.lengths[:, None])
                found.append(model.step(torch.from_numpy(tokens(step)).to(device), one))
                cache.commit(1)
            difference = (found[0] - found[1]).abs().max()
            assert difference <= (TOLERANCE if dtype == torch.float32 else 0.1 * found[0].std())


KERNEL_CASES = [
    ("llama", 9, {}),
    ("qwen3", 9, {}),
    ("llama-odd", 9, {}),
    ("mistral", 9, {}),
    ("mistral", 300, {"max_position_embeddings": 400, "sliding_window": 40}),  # two parts, one outside the window
]


def test_products_of_few_bits_in_kernels(kernels: Any) -> None:
    if place()[0] != "cpu":
        pytest.skip("see the tests marked gpu")
    check_kernels(kernels)


@pytest.mark.parametrize(("family", "held", "more"), KERNEL_CASES)
def test_attention_in_a_kernel(kernels: Any, family: str, held: int, more: dict[str, Any]) -> None:
    if place()[0] != "cpu":
        pytest.skip("see the tests marked gpu")
    check_attention(kernels, family, held, **more)


@pytest.mark.gpu
def test_products_of_few_bits_on_a_gpu(kernels: Any) -> None:
    check_kernels(kernels)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "held", "more"), KERNEL_CASES)
def test_attention_on_a_gpu(kernels: Any, family: str, held: int, more: dict[str, Any]) -> None:
    check_attention(kernels, family, held, **more)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_captured_steps_give_the_logits_of_plain_ones(family: str, kind: str | None, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    session = open_session(make_model(tmp_path / "model", family), device="cuda", quantize=kind)
    assert isinstance(session, TorchSession)
    plain = TorchSession(session.model, static=False)
    logits = plain.start(PROMPTS), session.start(PROMPTS)
    for step in range(70):  # past the capture, and past the cache's growth
        assert np.abs(logits[0] - logits[1]).max() <= 0.1 * logits[0].std(), step
        logits = plain.feed(tokens(step)), session.feed(tokens(step))
    assert session._steps is not None
    assert session._steps._graph is not None


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_an_fp16_graph_runs_on_cuda(family: str, tmp_path: Path) -> None:
    import onnxruntime

    if onnx_device.CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    folder = make_onnx(make_model(tmp_path / "model", family), precision="fp16")
    one, other = OnnxSession(folder, threads=1), OnnxSession(folder, threads=1, device="cuda")
    assert np.abs(one.start(PROMPTS) - other.start(PROMPTS)).max() <= 0.05
    for step in range(70):
        assert np.abs(one.feed(tokens(step)) - other.feed(tokens(step))).max() <= 0.05, step


def test_a_loaded_model_on_the_cpu_is_neither_fused_nor_static(tmp_path: Path) -> None:
    session = open_session(make_model(tmp_path / "model"), device="cpu", threads=1)
    assert isinstance(session, TorchSession)
    assert not session.static
    assert "model.layers.0.self_attn.q_proj.weight" in dict(session.model.named_parameters())
    assert isinstance(load_model(tmp_path / "model").cache(), KeyValueCache)
