"""Adapters: PEFT's arithmetic and folder, on the base they were made for and no other, and merged into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from small_tuning import go, make_base, reviews, sums, tiny

from llmcli.config import GenerateConfig, LoraConfig, SamplingConfig
from llmcli.errors import ConfigError, DataError, UsageError
from llmcli.files.artefacts import AdaptedModel, find_model
from llmcli.files.tensors import load_tensors, save_tensors
from llmcli.models.adapter_folder import load_adapted
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.folder import save_model
from llmcli.models.lora import AdapterShape, attach, merge
from llmcli.operations.classify import classify
from llmcli.operations.generate import Generated, generate
from llmcli.operations.merge import merge as merge_folders
from llmcli.runtime.open import open_session

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")
LORA = LoraConfig(lora=True, lora_rank=2)
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


def drawn(family: str, **changes: Any) -> Decoder:
    gpt2 = family == "gpt2"
    config = DecoderConfig(
        family, 50, 16, 2, 2, 2 if gpt2 else 1, 8, 24, 64, attention_bias=gpt2, mlp_bias=gpt2, **changes
    )
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def stirred(model: Decoder) -> Decoder:
    """The second matrix of every adapter is no longer zero, and DoRA's lengths are others."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
            elif "lora_magnitude" in name:
                parameter.mul_(1.2)
    return model


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [(), ("q_proj", "up_proj"), ("c_attn",)])
def test_adapters_give_what_the_merged_model_gives(family: str, dora: bool, targets: tuple[str, ...]) -> None:
    if targets and (family == "gpt2") != (targets == ("c_attn",)):
        pytest.skip("names of the other family")
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    before = drawn(family)(ids)
    model = drawn(family)
    attach(model, AdapterShape(3, 6.0, targets=targets, dora=dora), seed=0)
    assert (model(ids) - before).abs().max() <= 1e-4  # an adapter begins as nothing
    stirred(model)
    learning = model(ids)  # with gradients, as in training
    with torch.no_grad():
        plain = model(ids)
        merged = merge(model)(ids)
    assert (learning - before).abs().max() > 0.01
    assert (learning - plain).abs().max() <= 1e-4
    assert (learning - merged).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_gradients_are_those_of_the_product_written_out(family: str) -> None:
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    model = drawn(family)
    attach(model, AdapterShape(3, 6.0), seed=0)
    stirred(model)
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in found)
    weights = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(4))
    gradients = dict(zip(found, torch.autograd.grad((model(ids) * weights).sum(), list(found.values())), strict=True))
    for name in list(found)[:4]:
        for place in ((0, 0), (1, 2)):
            values = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    found[name][place] += step
                    values.append(float((model(ids) * weights).double().sum()))
                    found[name][place] -= step
            assert float(gradients[name][place]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.05, abs=0.05)


@pytest.mark.parametrize(
    ("family", "matrix"), [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.0.attn.c_attn")]
)
def test_an_adapter_of_peft_is_put_on(tmp_path: Path, family: str, matrix: str) -> None:
    """The folder is written here as PEFT writes it: lora_A (r, inputs), lora_B (outputs, r), whatever the family."""
    model = drawn(family)
    (tmp_path / "base").mkdir()
    save_model(model, tmp_path / "base", special_ids=NO_IDS)
    weight = dict(model.named_parameters())[f"{matrix}.weight"]
    rows, columns = (weight.t() if family == "gpt2" else weight).shape
    down, up = torch.randn(2, columns) * 0.1, torch.randn(rows, 2) * 0.1
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 8, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True, "lora_dropout": 0.1}))
    names = {f"base_model.model.{matrix}.lora_A.weight": down, f"base_model.model.{matrix}.lora_B.weight": up}
    save_tensors(names, adapter / "adapter_model.safetensors")
    found = dict(load_adapted(tmp_path / "base", adapter).named_parameters())[f"{matrix}.weight"]
    delta = (up @ down) * 8 / 2**0.5
    assert torch.allclose(found, weight + (delta.t() if family == "gpt2" else delta), atol=1e-5)

    save_tensors({**names, "base_model.model.odd.weight": down.clone()}, adapter / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"does not fit this base: it has no odd\.weight"):
        load_adapted(tmp_path / "base", adapter)
    save_tensors({**names, next(iter(names)): down[:, :-1]}, adapter / "adapter_model.safetensors")
    with pytest.raises(DataError, match="does not fit this base"):
        load_adapted(tmp_path / "base", adapter)
    for key, value in {
        "peft_type": "IA3",
        "bias": "all",
        "alpha_pattern": {"x": 1},
        "init_lora_weights": "pissa",
    }.items():
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, key: value}))
        with pytest.raises(ConfigError, match=key):
            load_adapted(tmp_path / "base", adapter)


def test_a_run_makes_an_adapter_that_runs_and_merges(tmp_path: Path, base: Path) -> None:
    data = sums(tmp_path / "sums.jsonl")
    go("chat", base, data, tmp_path / "run", LORA, config=tiny(max_steps=6, learning_rate=0.05))
    result = tmp_path / "run" / "model"
    assert not (result / "model.safetensors").exists()
    stored = load_tensors(result / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert stored[name].shape == (2, 16)
    said = json.loads((result / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["base_model_name_or_path"]) == ("LORA", 2, str(base))
    assert said["modules_to_save"] == ["embed_tokens", "lm_head"]  # ChatML's tokens
    with pytest.raises(DataError, match=r"is an adapter; give its base, and it by --adapter"):
        find_model(tmp_path / "run")

    both = AdaptedModel(base, tmp_path / "run")
    merge_folders(base, tmp_path / "run", tmp_path / "merged")
    sessions = [open_session(find_model(each), device="cpu", threads=1) for each in (both, tmp_path / "merged")]
    logits = [session.start([[5, 6, 7]]) for session in sessions]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5
    plain = open_session(base, device="cpu", threads=1).start([[5, 6, 7]])
    assert np.abs(logits[0][:, : plain.shape[1]] - plain).max() > 1e-3
    config = GenerateConfig(max_new_tokens=3, threads=1)
    (text,) = (r for r in generate(both, "The", config, SamplingConfig(temperature=0)) if isinstance(r, Generated))
    assert text.tokens

    other = make_base(tmp_path / "other", seed=9)
    with pytest.raises(DataError, match="was made for another base"):
        merge_folders(other, tmp_path / "run", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(UsageError, match="does not go with --adapter"):
        list(generate(both, "The", config, prompt_cache=tmp_path / "cache"))


def test_labels_by_an_adapter(tmp_path: Path, base: Path) -> None:
    data = reviews(tmp_path / "reviews.tsv")
    go("classify", base, data, tmp_path / "run", LORA, config=tiny(max_steps=20, learning_rate=0.03))
    texts = ["a good thing", "a bad thing"]
    found = list(classify(AdaptedModel(base, tmp_path / "run"), texts))
    assert [record.label for record in found] == ["pos", "neg"]
    merge_folders(base, tmp_path / "run", tmp_path / "merged")
    merged = list(classify(tmp_path / "merged", texts))
    for ours, theirs in zip(found, merged, strict=True):
        assert ours.probability == pytest.approx(theirs.probability, abs=1e-4)


def test_an_onnx_model_takes_no_adapter(tmp_path: Path, llmcli: Run) -> None:
    onnx = tmp_path / "onnx"
    onnx.mkdir()
    (onnx / "model.onnx").write_bytes(b"")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    found = llmcli("merge", onnx, adapter, "-o", tmp_path / "merged")
    assert found.returncode == 2
    assert "is an ONNX model, whose weights are fixed" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_frozen_weights_are_held_once_in_the_activations_precision() -> None:
    model = drawn("qwen3")
    model.compute_dtype = torch.bfloat16
    attach(model, AdapterShape(2, 4.0), seed=0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    ids = torch.randint(0, 50, (1, 9))
    model(ids).float().sum().backward()
    frozen = [p for n, p in model.named_parameters() if "lora_" not in n]
    assert all(p.grad is None for p in frozen)
    attention = model.layers[0].self_attn
    assert attention.q_proj.fused.data_ptr() == attention.q_proj.weight.data_ptr()
