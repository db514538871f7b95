"""Decoders: the same logits as transformers, checkpoints that open on both sides, hostile configs, the cache."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stories import make_stories, reference

from llmcli.config import SamplingConfig
from llmcli.errors import ConfigError, DataError, UsageError
from llmcli.models.config import DecoderConfig, read_config, write_config
from llmcli.models.decoder import Decoder
from llmcli.models.folder import load_model, save_model
from llmcli.runtime.decoding import Row, decode
from llmcli.runtime.sampling import Sampler
from llmcli.runtime.torch_session import TorchSession

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
IDS = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(5))
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

_LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    **NO_IDS,
}
_GPT2: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, **NO_IDS}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, every head its own": ("llama", {**_LLAMA, "num_key_value_heads": 4}),
    "llama, grouped heads, tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "llama, biases": ("llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama, one key/value head, head_dim of its own": ("llama", {**_LLAMA, "num_key_value_heads": 1, "head_dim": 12}),
    "llama, llama3's rope": ("llama", {**_LLAMA, "rope_parameters": _LLAMA3, "rms_norm_eps": 1e-5}),
    "qwen3, tied": ("qwen3", {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, biases": ("qwen3", {**_LLAMA, "head_dim": 8, "attention_bias": True}),
    "gpt2, tied": ("gpt2", _GPT2),
    "gpt2, untied, n_inner": ("gpt2", {**_GPT2, "n_inner": 48, "tie_word_embeddings": False}),
}


@dataclasses.dataclass(frozen=True)
class Twins:
    """A checkpoint of transformers, the model it came from, and ours that was read from it."""

    folder: Path
    theirs: Any
    ours: Decoder

    @property
    def expected(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.theirs(IDS).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=CASES)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """A tiny checkpoint of each case, written by transformers."""
    return make_twins(*CASES[request.param], tmp_path_factory.mktemp("theirs"))


def make_twins(family: str, shape: dict[str, Any], folder: Path) -> Twins:
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            around = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.normal_(around, 0.3, generator=generator)
    theirs.save_pretrained(folder)
    return Twins(folder, theirs, load_model(folder))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


# ----------------------------------------------------------------------------------------------------------------
# Logits


def test_a_whole_pass_equals_transformers(twins: Twins) -> None:
    assert float(twins.expected.std()) > 0.3  # the logits say something
    with torch.inference_mode():
        assert difference(twins.ours(IDS), twins.expected) <= TOLERANCE
    assert difference(twins.ours(IDS), twins.expected) <= TOLERANCE  # with gradients on, other kernels run
    with torch.inference_mode():
        assert difference(twins.ours(IDS, keep=2), twins.expected[:, -2:]) <= TOLERANCE


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("pieces", [[1] * 24, [11, 13], [7, 1, 1, 15], [24]])
def test_a_cached_pass_equals_transformers(twins: Twins, pieces: list[int], mode: Any) -> None:
    with mode():
        cache, found, start = twins.ours.cache(rows=3, capacity=2), [], 0
        for piece in pieces:
            found.append(twins.ours(IDS[:, start : start + piece], cache).detach())
            start += piece
        assert difference(torch.cat(found, 1), twins.expected) <= TOLERANCE


def test_rows_of_unequal_length_give_what_they_give_alone(twins: Twins) -> None:
    sizes, session = [20, 3, 11], TorchSession(twins.ours)
    expected = twins.expected.numpy()
    found = session.start([IDS[row, :size].tolist() for row, size in enumerate(sizes)])
    assert np.abs(found - expected[range(3), [size - 1 for size in sizes]]).max() <= TOLERANCE
    for step in range(4):
        following = [size + step for size in sizes]
        fed = session.feed(IDS[range(3), following].numpy()[:, None])
        assert np.abs(fed[:, 0] - expected[range(3), following]).max() <= TOLERANCE
    # Two tokens at once, of which one falls over the end of the longest row that was left.
    session.rewind([20, 5, 2])
    taken = np.stack([IDS[0, 20:23].numpy(), IDS[1, 5:8].numpy(), IDS[2, 2:5].numpy()])
    fed = session.feed(taken, keep=3)
    for row, first in enumerate((20, 5, 2)):
        assert np.abs(fed[row] - expected[row, first : first + 3]).max() <= TOLERANCE
    assert session.lengths == [23, 8, 5]


def test_scores_are_the_log_softmax_of_transformers(twins: Twins) -> None:
    wanted = np.zeros((3, 23), np.bool_)
    wanted[0, 3:9], wanted[2, 22] = True, True
    expected = torch.log_softmax(twins.expected, -1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0].numpy()
    found = TorchSession(twins.ours).score(IDS.numpy(), wanted)
    assert np.abs(found - np.where(wanted, expected, 0)).max() <= TOLERANCE


# ----------------------------------------------------------------------------------------------------------------
# Files, both ways


def test_what_llmcli_saves_opens_in_transformers(twins: Twins, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_model(twins.ours, tmp_path, special_ids={**NO_IDS, "eos_token_id": 3})
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        assert difference(theirs(IDS).logits, twins.expected) <= TOLERANCE
    assert theirs.generation_config.eos_token_id == 3
    assert load_model(tmp_path).config == twins.ours.config


def test_a_config_survives_being_written_and_read(twins: Twins) -> None:
    config = twins.ours.config
    assert read_config(json.loads(json.dumps(write_config(config, NO_IDS, "float32"))), "config.json") == config


@pytest.mark.parametrize("case", ["llama, grouped heads, tied", "llama, llama3's rope", "qwen3, tied"])
def test_the_old_spelling_of_rope_means_the_same(case: str, tmp_path: Path) -> None:
    twins = make_twins(*CASES[case], tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    rope = values.pop("rope_parameters")
    assert twins.ours.config.rope_theta == 500
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for name in ("rope_type", "type"):
        old = {**values, "rope_theta": theta, "rope_scaling": {name: kind, **rope} if rope else None}
        assert read_config(old, "config.json") == twins.ours.config
        if rope:  # as in transformers, where a file has both
            both = {**old, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
            assert read_config(both, "config.json") == twins.ours.config


def test_bfloat16_is_kept_or_widened_as_asked(tmp_path: Path) -> None:
    twins = make_twins(*CASES["qwen3, tied"], tmp_path)
    save_file({name: tensor.bfloat16() for name, tensor in twins.ours.state_dict().items()}, tmp_path / NAME)
    narrow, wide = load_model(tmp_path), load_model(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        logits = wide(IDS)
        assert logits.dtype == torch.float32
        assert difference(narrow(IDS).float(), logits) < 0.1 * float(logits.std())
    (tmp_path / "again").mkdir()
    save_model(narrow, tmp_path / "again", special_ids=NO_IDS)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "again" / NAME).stat().st_size < 1.5 * (tmp_path / NAME).stat().st_size


# ----------------------------------------------------------------------------------------------------------------
# A real model


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama2.c's stories260K as a model folder."""
    reference()
    return make_stories(tmp_path_factory.mktemp("stories") / "model")


def test_a_real_model_tells_its_stories(stories: Path) -> None:
    session = TorchSession(load_model(stories))
    told = reference()["greedy"]
    for story, logits in zip(told, session.start([story["prompt_ids"] for story in told]), strict=True):
        ids, values = zip(*story["top5_logits_after_prompt"], strict=True)
        assert np.argsort(-logits)[:5].tolist() == list(ids)
        assert np.abs(logits[list(ids)] - values).max() < 1e-3
    greedy = SamplingConfig(temperature=0)
    rows = [Row(story["prompt_ids"], Sampler(greedy), len(story["ids"]) - len(story["prompt_ids"])) for story in told]
    assert sum(1 for _ in decode(session, rows)) == sum(len(row.ids) for row in rows) + len(rows)
    assert [[*row.prompt, *row.ids] for row in rows] == [story["ids"] for story in told]


def test_a_real_model_gives_texts_their_probability(stories: Path) -> None:
    session = TorchSession(load_model(stories))
    for text in reference()["log_probability"]:
        ids = np.array([text["ids"]], np.int64)
        found = session.score(ids, np.ones((1, ids.shape[1] - 1), np.bool_))[0]
        assert np.abs(found - text["per_token"]).max() < 1e-3
        assert found.sum() == pytest.approx(text["sum"], abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------
# Configs that are refused

PLAIN: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, **_LLAMA},
    "gpt2": {"model_type": "gpt2", **_GPT2},
}


@pytest.mark.parametrize("family", PLAIN)
def test_plain_configs_are_read(family: str) -> None:
    assert read_config(PLAIN[family], "config.json").hidden_size == 32


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"hidden_act": None}, "activation"),
        ("gpt2", {"activation_function": "relu"}, "relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("llama", {"rope_parameters": {"rope_type": ["default"]}}, "rope_type"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters"),
        ("llama", {"rope_parameters": "default"}, "rope_parameters"),
        ("llama", {"model_type": "mixtral"}, "mixtral"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(family: str, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        read_config({**PLAIN[family], **change}, "some/config.json")
    assert caught.value.where == "some/config.json"


WHOLE = {
    "llama": (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
    ),
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions"),
}


@pytest.mark.parametrize("value", [0, -4, 1e30, 10**30, 32.0, "32", True, [], {}], ids=str)
@pytest.mark.parametrize("family", WHOLE)
def test_a_hostile_number_is_one_error_that_names_its_key(family: str, value: object) -> None:
    for key in WHOLE[family]:
        with pytest.raises(ConfigError, match=rf"{key}: must be a whole number"):
            read_config({**PLAIN[family], key: value}, "config.json")


@pytest.mark.parametrize("value", [0, -1e-5, 1e30, float("nan"), float("inf"), "1e-5", True, []], ids=str)
def test_hostile_fractions_are_errors_too(value: object) -> None:
    for family, key in (("llama", "rms_norm_eps"), ("qwen3", "rms_norm_eps"), ("gpt2", "layer_norm_epsilon")):
        with pytest.raises(ConfigError, match=f"{key}: must be a number"):
            read_config({**PLAIN[family], key: value}, "config.json")
    for rope in ({"rope_theta": value}, {"rope_parameters": {"rope_theta": value}}):
        with pytest.raises(ConfigError, match="rope_theta: must be a number"):
            read_config({**PLAIN["llama"], "rope_parameters": None, **rope}, "config.json")
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        with pytest.raises(ConfigError, match=f"{key}: must be a number"):
            read_config({**PLAIN["llama"], "rope_parameters": {**_LLAMA3, key: value}}, "config.json")


@pytest.mark.parametrize("value", [1, 0, "false", "true", None, []], ids=str)
def test_what_is_neither_true_nor_false_is_an_error(value: object) -> None:
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        with pytest.raises(ConfigError, match=f"{key}: must be true or false"):
            read_config({**PLAIN["llama"], key: value}, "config.json")


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        ("llama", {"num_key_value_heads": 3}, "cannot share"),
        ("llama", {"head_dim": 7}, "even head size"),
        ("gpt2", {"n_head": 5}, "heads x head_dim"),
        ("llama", {"rope_parameters": {**_LLAMA3, "low_freq_factor": 4}}, "low_freq_factor"),
        ("llama", {"num_hidden_layers": 2**30}, "num_hidden_layers"),  # building them would take hours
        ("llama", {"head_dim": 2**31 - 2}, "head_dim"),
        ("llama", {"vocab_size": "x" * 10_000}, "vocab_size"),
    ],
)
def test_numbers_that_do_not_go_together_are_errors(family: str, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        read_config({**PLAIN[family], **change}, "config.json")
    assert len(str(caught.value)) < 300


def test_a_missing_key_is_named() -> None:
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        values = {name: value for name, value in PLAIN["llama"].items() if name != key}
        with pytest.raises(ConfigError, match=f"'{key}' is missing"):
            read_config(values, "config.json")


def test_llama3_without_its_first_length_takes_the_context() -> None:
    rope = {key: value for key, value in _LLAMA3.items() if key != "original_max_position_embeddings"}
    scaling = read_config({**PLAIN["llama"], "rope_parameters": rope}, "config.json").rope_scaling
    assert scaling is not None
    assert scaling["original_max_position_embeddings"] == 40


# ----------------------------------------------------------------------------------------------------------------
# Tensors that are wrong

NAME = "model.safetensors"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A small model of llama's as llmcli writes it."""
    config = read_config(PLAIN["llama"], "config.json")
    save_model(Decoder(config).init_weights(), tmp_path, special_ids=NO_IDS)
    return tmp_path


def changed(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Replaces tensors, or takes them out."""
    found = {**load_file(folder / NAME), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, folder / NAME)
    return folder


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"model__norm__weight": None}, r"model\.norm\.weight: missing"),
        ({"lm_head__weight": None}, r"lm_head\.weight: missing"),
        ({"model__norm__weight": torch.ones(31)}, r"model\.norm\.weight: shape \[31\], the config asks for \[32\]"),
        ({"model__norm__weight": torch.ones(1, 32)}, r"model\.norm\.weight: shape \[1, 32\]"),
        ({"model__layers__2__mlp__up_proj__weight": torch.ones(2)}, r"layers\.2\.mlp\.up_proj\.weight: not a param"),
        ({"model__norm__bias": torch.ones(32)}, r"model\.norm\.bias: not a parameter of llama"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.int64)}, r"model\.norm\.weight: holds I64"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.bool)}, r"model\.norm\.weight: holds BOOL"),
        ({"model__norm__weight": torch.ones(32).to(torch.float8_e4m3fn)}, r"model\.norm\.weight: holds F8_E4M3"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.complex64)}, r"model\.norm\.weight: holds C64"),
    ],
)
def test_a_tensor_that_does_not_fit_is_one_error_that_names_it(
    written: Path, tensors: dict[str, torch.Tensor | None], told: str
) -> None:
    with pytest.raises(DataError, match=told) as caught:
        load_model(changed(written, **tensors), dtype=torch.float32)
    assert "\n" not in str(caught.value)
    assert str(written) in str(caught.value)


def test_many_wrong_tensors_are_still_one_line(written: Path) -> None:
    save_file({"odd": torch.ones(1)}, written / NAME)
    with pytest.raises(DataError, match=r"embed_tokens\.weight: missing \(and \d+ more; see llmcli verify\)"):
        load_model(written)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"not a model at all", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_one_error(written: Path, content: bytes) -> None:
    (written / NAME).write_bytes(content)
    with pytest.raises(DataError, match="is not a valid safetensors file"):
        load_model(written)


def test_a_file_with_something_behind_its_end_is_refused(written: Path) -> None:
    (written / NAME).write_bytes((written / NAME).read_bytes() + b"PK\x03\x04")
    with pytest.raises(DataError, match="is not a valid safetensors file"):
        load_model(written)


def test_shards_are_read_and_a_tensor_in_two_of_them_is_an_error(written: Path) -> None:
    whole, tensors = load_model(written), load_file(written / NAME)
    (written / NAME).unlink()
    half = len(tensors) // 2
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:]), start=1):
        save_file({name: tensors[name] for name in names}, written / f"part-{number}.safetensors")
    places = {name: f"part-{1 + (index >= half)}.safetensors" for index, name in enumerate(tensors)}
    (written / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with torch.inference_mode():
        assert torch.equal(load_model(written)(IDS), whole(IDS))
    save_file(tensors, written / "part-2.safetensors")
    with pytest.raises(DataError, match=f"the tensor {min(list(tensors)[:half])} is in another shard too"):
        load_model(written)
    (written / "part-2.safetensors").unlink()
    with pytest.raises(DataError, match=r"part-2\.safetensors is missing"):
        load_model(written)


def test_buffers_of_old_checkpoints_and_a_tied_head_do_no_harm(tmp_path: Path) -> None:
    for case in ("llama, grouped heads, tied", "gpt2, tied"):
        twins = make_twins(*CASES[case], tmp_path / case)
        extra = {
            "llama, grouped heads, tied": {
                "model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4),
                "lm_head__weight": twins.ours.embedding.clone(),
            },
            "gpt2, tied": {
                "transformer__h__0__attn__bias": torch.ones(1, 1, 40, 40, dtype=torch.bool),
                "transformer__h__0__attn__masked_bias": torch.tensor(-1e4),
            },
        }[case]
        with torch.inference_mode():
            assert torch.equal(load_model(changed(twins.folder, **extra))(IDS), twins.ours(IDS))


def test_gpt2s_own_names_have_no_prefix(tmp_path: Path) -> None:
    twins = make_twins(*CASES["gpt2, tied"], tmp_path)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / NAME).items()}
    assert "wte.weight" in tensors
    save_file(tensors, tmp_path / NAME)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path)(IDS), twins.ours(IDS))


# ----------------------------------------------------------------------------------------------------------------
# The cache


def small(context: int = 40) -> Decoder:
    config = read_config({**PLAIN["qwen3"], "max_position_embeddings": context}, "config.json")
    model = Decoder(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return model


@torch.inference_mode()
def test_the_cache_doubles_up_to_the_context_and_no_further() -> None:
    model = small()
    cache, capacities = model.cache(rows=1, capacity=3), []
    found = []
    for position in range(24):
        found.append(model(IDS[:1, position : position + 1], cache))
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [3, 6, 12, 24]
    assert difference(torch.cat(found, 1), model(IDS[:1])) <= TOLERANCE
    model(IDS[:1, :16], cache)
    assert cache.capacity == 40
    assert [keys.shape for keys in cache.keys] == [(1, 2, 40, 8)] * 2
    assert model.cache(capacity=10_000).capacity == 40


@torch.inference_mode()
def test_the_context_cannot_be_passed_and_nothing_is_lost_by_trying() -> None:
    model = small(context=24)
    cache = model.cache(rows=2)
    model(IDS[:2, :20], cache)
    with pytest.raises(UsageError, match="25 tokens do not fit the model's context of 24"):
        model(IDS[:2, :5], cache)
    assert cache.lengths.tolist() == [20, 20]
    assert difference(model(IDS[:2, 20:24], cache), model(IDS[:2])[:, 20:24]) <= TOLERANCE
    with pytest.raises(UsageError, match="25 tokens do not fit"):
        model(IDS[:2, :1], cache)
    session = TorchSession(model)
    with pytest.raises(UsageError, match="30 tokens do not fit"):
        session.start([[1] * 30, [1]])
    with pytest.raises(UsageError, match="25 tokens do not fit"):
        session.score(np.zeros((1, 26), np.int64), np.ones((1, 25), np.bool_))
    assert session.score(np.zeros((1, 25), np.int64), np.ones((1, 24), np.bool_)).shape == (1, 24)


@torch.inference_mode()
def test_rewound_tokens_leave_no_trace() -> None:
    model = small()
    cache = model.cache(rows=3)
    model(IDS[:, :10], cache)
    model(torch.full((3, 9), 7), cache)
    cache.rewind(10)
    assert difference(model(IDS[:, 10:], cache), model(IDS)[:, 10:]) <= TOLERANCE
    cache.rewind([30, 4, 0])  # none grows by it
    assert cache.lengths.tolist() == [24, 4, 0]
    fed = model(torch.stack((IDS[0, :4], IDS[1, 4:8], IDS[2, :4])), cache)
    assert difference(fed[1], model(IDS)[1, 4:8]) <= TOLERANCE
    assert difference(fed[2], model(IDS)[2, :4]) <= TOLERANCE
    cache.rewind(-3)
    assert cache.lengths.tolist() == [0, 0, 0]


@torch.inference_mode()
def test_selected_rows_go_on_apart() -> None:
    model = small()
    session = TorchSession(model)
    session.start([IDS[0, :9].tolist(), IDS[1, :5].tolist(), IDS[2, :7].tolist()])
    session.select([2, 2, 0])
    assert session.lengths == [7, 7, 9]
    fed = session.feed(np.array([[IDS[2, 7]], [1], [IDS[0, 9]]], np.int64))
    expected = model(IDS).numpy()
    assert np.abs(fed[0, 0] - expected[2, 7]).max() <= TOLERANCE
    assert np.abs(fed[2, 0] - expected[0, 9]).max() <= TOLERANCE
    other = model(torch.cat((IDS[2:, :7], torch.tensor([[1]])), 1)).numpy()
    assert np.abs(fed[1, 0] - other[0, -1]).max() <= TOLERANCE


def test_a_session_says_what_it_cannot_do() -> None:
    session = TorchSession(small())
    with pytest.raises(UsageError, match="was not started"):
        session.feed(np.zeros((1, 1), np.int64))
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(UsageError, match="at least one token"):
            session.start(prompts)
    session.start([[1, 2]])
    session.close()
    assert session.lengths == []
    with pytest.raises(UsageError, match="was not started"):
        session.feed(np.zeros((1, 1), np.int64))


def test_shapes_that_make_no_model_are_refused_where_they_are_made() -> None:
    fields = dataclasses.asdict(small().config)
    for change in ({"model_type": "bert"}, {"norm_eps": "1e-6"}, {"head_dim": 3}, {"tie_word_embeddings": 1}):
        with pytest.raises(ConfigError):
            DecoderConfig(**{**fields, **change})
