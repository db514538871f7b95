"""`info` and `verify`: what is said of whole artefacts, and that every damage is found and named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run

from llmcli.errors import DataError
from llmcli.files import artefacts
from llmcli.files.manifest import write_manifest
from llmcli.operations.inspect import describe
from llmcli.operations.verify import verify

VOCABULARY = {"<|endoftext|>": 0, **{chr(97 + index): index + 1 for index in range(26)}, " ": 27, "\n": 28, "?": 29}


def make_tokenizer(folder: Path, vocabulary: dict[str, int] | None = None) -> Path:
    """A character tokenizer of 30 tokens as Hugging Face writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"id": 0, "content": "<|endoftext|>", "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {**special, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False},
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary or VOCABULARY, "unk_token": "?"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def make_model(folder: Path, **shape: object) -> Path:
    """A Qwen3 model of two tiny layers, with its tokenizer."""
    import torch

    from llmcli.models.config import DecoderConfig
    from llmcli.models.decoder import Decoder
    from llmcli.models.folder import save_model

    values = {
        "model_type": "qwen3",
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    model = Decoder(DecoderConfig(**{**values, **shape})).init_weights(torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    make_tokenizer(folder)
    save_model(model, folder, special_ids={"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None})
    return folder


def make_checkpoint(folder: Path, step: int) -> Path:
    make_model(folder)
    (folder / "state.json").write_text(json.dumps({"step": step, "tokens": 64 * step}))
    shutil.copy(folder / "model.safetensors", folder / "optimizer.safetensors")
    write_manifest(folder, {"seed": 0})
    return folder


def make_run(folder: Path) -> Path:
    for step in (10, 20):
        make_checkpoint(folder / "checkpoints" / f"step-{step:08d}", step)
    make_model(folder / "model")
    (folder / "config.toml").write_text('family = "qwen3"\nmax_steps = 20\n')
    records = [{"event": "step", "step": step, "tokens": 64 * step, "loss": 3.0 - step / 20} for step in range(1, 21)]
    records += [{"event": "validation", "step": 10, "tokens": 640, "loss": 2.6, "bits_per_byte": 2.5}]
    records += [{"event": "validation", "step": 20, "tokens": 1280, "loss": 2.1, "bits_per_byte": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


# ----------------------------------------------------------------------------------------------------------------
# info


def test_a_model_is_described_from_its_headers(model: Path) -> None:
    found = describe(model)
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 2 * 8 + 3 * 16 * 32 + 2 * 16
    assert found.kind == "model"
    assert found.facts["parameters"] == 30 * 16 + 2 * layer + 16
    assert found.facts["embedding_parameters"] == 30 * 16
    assert found.facts["weight_bytes"] == 4 * found.facts["parameters"]
    assert (found.facts["family"], found.facts["layers"], found.facts["context"]) == ("qwen3", 2, 64)
    assert found.facts["dtype"] == "F32"
    assert found.facts["tokenizer"]["vocab_size"] == 30


def test_a_tokenizer_is_described(tmp_path: Path) -> None:
    found = describe(make_tokenizer(tmp_path / "t"))
    assert found.kind == "tokenizer"
    assert found.facts["vocab_size"] == 30
    assert found.facts["special_tokens"] == {"<|endoftext|>": 0}
    assert found.facts["eos_id"] == 0
    assert describe(tmp_path / "t" / "tokenizer.json").facts == found.facts


def test_a_run_is_described(run: Path) -> None:
    facts = describe(run).facts
    assert facts["step"] == 20
    assert facts["best"] == {"step": 20, "loss": 2.1, "bits_per_byte": 2.0}
    assert facts["checkpoints"] == ["step-00000010", "step-00000020"]
    assert facts["model"]["family"] == "qwen3"
    assert facts["finished"] is False


def test_info_shows_a_table_or_json(llmcli: Run, run: Path) -> None:
    plain, made = llmcli("info", run), llmcli("info", run, "--json")
    assert plain.returncode == made.returncode == 0
    assert "bits per byte" in plain.stdout
    assert plain.stderr == made.stderr == ""
    assert json.loads(made.stdout)["kind"] == "run"


def test_a_line_that_is_being_written_is_passed_over(tmp_path: Path, run: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"event": "st')
    assert describe(copy).facts["step"] == 20
    with open(copy / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:23: is not valid JSON"):
        describe(copy)


def test_what_is_no_artefact_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DataError, match=r"tokenizer\.json .*corpus\.json"):
            artefacts.kind_of(path)
    with pytest.raises(DataError, match="no such file"):
        artefacts.kind_of(tmp_path / "nowhere")


def test_a_run_resolves_to_its_model_else_to_its_newest_sound_checkpoint(tmp_path: Path, run: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert artefacts.resolve_model(copy) == copy / "model"
    assert artefacts.resolve_model(copy / "model") == copy / "model"
    shutil.rmtree(copy / "model")
    newest = copy / "checkpoints" / "step-00000020"
    assert artefacts.resolve_model(copy) == newest
    (newest / "state.json").write_text("{}")
    assert artefacts.resolve_model(copy).name == "step-00000010"
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(DataError, match="no sound checkpoint"):
        artefacts.resolve_model(copy)
    with pytest.raises(DataError, match="is a tokenizer; a model"):
        artefacts.resolve_model(make_tokenizer(tmp_path / "t"))


# ----------------------------------------------------------------------------------------------------------------
# verify


def test_whole_artefacts_verify(llmcli: Run, model: Path, run: Path, tmp_path: Path) -> None:
    for path in (model, run, run / "checkpoints" / "step-00000010", make_tokenizer(tmp_path / "t")):
        assert verify(path, values=True).problems == ()
    ended = llmcli("verify", run, "--json")
    assert ended.returncode == 0
    assert json.loads(ended.stdout) == {"path": str(run), "kind": "run", "ok": True, "problems": []}


def edit_json(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:, :8].contiguous()
    tensors["model.extra"] = tensors["model.layers.0.mlp.up_proj.weight"].clone()
    save_file(tensors, folder / "model.safetensors")


def put_nan(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-4:] = struct.pack("<f", float("nan"))
    (folder / "model.safetensors").write_bytes(bytes(raw))


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "config missing": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json:1:2: is not valid JSON"]),
    "other shape": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(hidden_size=32)),
        ["model.norm.weight: shape [16], the config asks for [32]"],
    ),
    "other family": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="mamba")),
        ["model_type is 'mamba'"],
    ),
    "odd end": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(eos_token_id=30)),
        ["eos_token_id = 30, the vocabulary has 30"],
    ),
    "tensors": (
        drop_a_tensor,
        ["model.norm.weight: missing", "up_proj.weight: shape [32, 8]", "model.extra: not a parameter of qwen3"],
    ),
    "weights cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        ["model.safetensors: is not a valid safetensors file"],
    ),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), ["has no model.safetensors"]),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json: missing"]),
    "tokenizer no JSON": (lambda f: (f / "tokenizer.json").write_text("[]"), ["tokenizer.json"]),
    "tokenizer too large": (
        lambda f: make_tokenizer(f, {**VOCABULARY, "!": 30}),
        ["tokenizer.json: has 31 tokens, the embedding 30 rows"],
    ),
    "one id for two": (lambda f: make_tokenizer(f, {**VOCABULARY, "!": 3}), ["gives one id to two tokens"]),
    "no unknown": (
        lambda f: make_tokenizer(f, {k: v for k, v in VOCABULARY.items() if k != "?"}),
        ["the unknown token '?' is not in the vocabulary"],
    ),
    "nan": (put_nan, ["model.norm.weight: 1 of 16 values are not finite"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_a_model_is_named(tmp_path: Path, model: Path, damage: str) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    change, expected = DAMAGES[damage]
    change(copy)
    verdict = verify(copy, values=True)
    assert not verdict.ok
    for told in expected:
        assert any(told in problem for problem in verdict.problems), verdict.problems
    assert not any("\n" in problem or str(tmp_path) in problem for problem in verdict.problems)


def test_verify_of_a_damaged_run_exits_3_and_names_the_checkpoint(llmcli: Run, tmp_path: Path, run: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    weights = copy / "checkpoints" / "step-00000020" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    ended = llmcli("verify", copy)
    assert ended.returncode == 3
    assert ended.stdout == "checkpoints/step-00000020: model.safetensors: its sha256 is not the manifest's\n"
    assert ended.stderr == f"Error: {copy}: 1 problem in this run\n"
    made = json.loads(llmcli("verify", copy, "--json").stdout)
    assert made["ok"] is False
    assert len(made["problems"]) == 1


def test_a_tokenizer_whose_pattern_makes_the_library_panic_is_a_problem(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "t")
    splitter = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit_json(folder / "tokenizer.json", lambda content: content.update(pre_tokenizer=splitter))
    assert verify(folder).kind == "tokenizer"  # whatever the verdict is: no panic escapes


def test_an_encoder_is_described_and_its_damage_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from small_encoder import make_encoder

    folder = make_encoder(tmp_path / "model")
    facts = describe(folder).facts
    named = ("family", "head", "layers", "hidden_size", "context", "token_types", "activation")
    assert [facts[key] for key in named] == ["bert", "masked", 2, 32, 40, 2, "gelu"]
    assert facts["embedding_parameters"] == 97 * 32
    assert verify(folder).problems == ()

    tensors = load_file(folder / "model.safetensors")
    whole = dict(tensors)
    del tensors["cls.predictions.bias"]
    tensors["bert.embeddings.position_embeddings.weight"] = tensors["bert.embeddings.position_embeddings.weight"][:9]
    tensors["bert.encoder.layer.2.output.dense.bias"] = tensors["bert.encoder.layer.1.output.dense.bias"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert set(verify(folder).problems) == {
        "cls.predictions.bias: missing",
        "bert.embeddings.position_embeddings.weight: shape [9, 32], the config asks for [40, 32]",
        "bert.encoder.layer.2.output.dense.bias: not a parameter of bert",
    }
    save_file({name: each for name, each in whole.items() if not name.startswith("cls.")}, folder / "model.safetensors")
    assert verify(folder).problems == ("has no masked-language-model head: there is no weight of cls",)
