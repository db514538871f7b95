"""Encoders beside transformers: hidden states and heads however the texts are laid out, folders read and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_encoder import LONGEST, NAMES, SUFFIXES, VOCABULARY, draw, real_encoder, save_theirs

from llmcli.errors import ConfigError, DataError
from llmcli.models.attentions import attentions
from llmcli.models.encoder import Encoder
from llmcli.models.encoder_config import EncoderConfig, read_encoder_config
from llmcli.models.encoder_folder import encoder_labels, load_encoder, save_encoder
from llmcli.models.encoder_heads import EncoderClassifier, MaskedLM, SpanReader, with_head
from llmcli.models.folder import load_model
from llmcli.models.ops import PackedLinear
from llmcli.models.segments import segments_of

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (12, 7, 1, 12, 4)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids filled up on the right with RoBERTa's padding, where there are tokens, and which text each is of."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=generator).where(mask, torch.tensor(1))
    return ids, mask, torch.randint(0, 2, mask.shape, generator=generator)


def their_output(model: Any, family: str, **more: Any) -> Any:
    ids, mask, types = batch()
    told = {} if family == "distilbert" else {"token_type_ids": types}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask.long(), **told, **more)


@pytest.mark.parametrize("kind", SUFFIXES)
@pytest.mark.parametrize("family", NAMES)
def test_states_and_heads_are_those_of_transformers(family: str, kind: str, tmp_path: Path) -> None:
    theirs = save_theirs(family, kind, tmp_path / "theirs")
    ours = load_encoder(tmp_path / "theirs", kind=kind)
    ids, mask, types = batch()
    expected = their_output(theirs, family, output_hidden_states=True)
    with torch.no_grad():
        states = ours.states(ids, mask=mask, types=types)
        assert len(states) == len(expected.hidden_states) == 3
        for found, wanted in zip(states, expected.hidden_states, strict=True):
            assert (found - wanted)[mask].abs().max() < 1e-4
        side_by_side = ours.hidden(ids[mask][None], segments=segments_of(LENGTHS), types=types[mask][None])
        assert (side_by_side[0] - expected.hidden_states[-1][mask]).abs().max() < 1e-4
        alone = ours.hidden(ids[1:2, :7], types=types[1:2, :7])
        assert (alone[0] - expected.hidden_states[-1][1, :7]).abs().max() < 1e-4
        if isinstance(ours, MaskedLM):
            assert (ours.logits(states[-1]) - expected.logits)[mask].abs().max() < 1e-4
        elif isinstance(ours, EncoderClassifier):
            first = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
            scores = ours.scores(ids[mask][None], segments_of(LENGTHS), first, types[mask][None])
            assert (scores - expected.logits).abs().max() < 1e-4
        elif isinstance(ours, SpanReader):
            spans = torch.stack((expected.start_logits, expected.end_logits), -1)
            assert (ours.spans(states[-1]) - spans)[mask].abs().max() < 1e-4
        elif family != "distilbert":
            assert (ours.pooled(states[-1][:, 0]) - expected.pooler_output).abs().max() < 1e-4

    (tmp_path / "ours").mkdir()
    save_encoder(ours, tmp_path / "ours", special_ids={"pad_token_id": theirs.config.pad_token_id})
    back, told = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    assert {**back.config.to_dict(), "_name_or_path": ""} == theirs.config.to_dict()
    for found, wanted in zip(back.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast", "relu", "silu", "quick_gelu", "tanh"])
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_activations_are_those_of_the_config(family: str, activation: str, tmp_path: Path) -> None:
    key = "activation" if family == "distilbert" else "hidden_act"
    expected = their_output(save_theirs(family, "masked", tmp_path, **{key: activation}), family)
    ids, mask, types = batch()
    ours = load_encoder(tmp_path, kind="masked")
    with torch.no_grad():
        assert (ours.logits(ours.hidden(ids, mask=mask, types=types)) - expected.logits)[mask].abs().max() < 1e-4


def test_the_real_model_is_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    folder = real_encoder()
    ids = torch.randint(1000, 20_000, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(40) < torch.tensor([40, 25, 3])[:, None]
    with torch.no_grad():
        expected = transformers.AutoModel.from_pretrained(folder)(ids, attention_mask=mask.long()).last_hidden_state
        found = load_encoder(folder).hidden(ids[mask][None], segments=segments_of([40, 25, 3]))
    assert (found[0] - expected[mask]).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------------------------------
# Texts side by side


def drawn(family: str = "bert", **changes: Any) -> Encoder:
    made = {"pad_token_id": 1, "type_vocab_size": 0 if family == "distilbert" else 2, **changes}
    model = Encoder(EncoderConfig(family, VOCABULARY, 16, 2, 2, 24, LONGEST, **made))
    draw(model)
    return model


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 38), min_size=1, max_size=7), st.booleans(), st.sampled_from(sorted(NAMES)))
def test_side_by_side_is_as_alone(lengths: list[int], shared: bool, family: str) -> None:
    model = drawn(family).eval()
    ids = torch.randint(5, VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        packed = model.hidden(ids, segments=segments_of(lengths, shared=shared))
        alone = torch.cat([model.hidden(row) for row in ids.split(lengths, 1)], 1)
    assert (packed - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_side_by_side_are_those_of_a_batch(shared: bool) -> None:
    model = drawn().eval()  # without dropout
    ids, mask, types = batch()
    weights = torch.randn(sum(LENGTHS), 16, generator=torch.Generator().manual_seed(2))
    parameters = list(model.parameters())
    whole = model.hidden(ids, mask=mask, types=types)[mask]
    packed = model.hidden(ids[mask][None], segments=segments_of(LENGTHS, shared=shared), types=types[mask][None])[0]
    with torch.no_grad():  # by another kernel
        assert (model.hidden(ids, mask=mask, types=types)[mask] - whole).abs().max() <= 1e-5
    theirs = torch.autograd.grad((whole * weights).sum(), parameters)
    for ours, wanted in zip(torch.autograd.grad((packed * weights).sum(), parameters), theirs, strict=True):
        assert (ours - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))


def test_dropout_is_there_in_training_alone() -> None:
    model = drawn()
    ids = torch.randint(5, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    segments = segments_of([12, 8])
    assert not torch.equal(model.hidden(ids, segments=segments), model.hidden(ids, segments=segments))
    model.eval()
    assert torch.equal(model.hidden(ids, segments=segments), model.hidden(ids, segments=segments))
    still = drawn(hidden_dropout=0.0, attention_dropout=0.0)
    assert torch.equal(still.hidden(ids), still.hidden(ids))


def test_a_text_longer_than_the_positions_is_an_error_with_both_lengths() -> None:
    model = drawn("roberta").eval()
    with torch.no_grad():
        model.hidden(torch.full((1, LONGEST - 2), 5))
        with pytest.raises(DataError, match="39 tokens, the model has positions for 38"):
            model.hidden(torch.full((1, 39), 5))
        with pytest.raises(DataError, match="39 tokens, the model has positions for 38"):
            model.hidden(torch.full((1, 42), 5), segments=segments_of([3, 39]))


@pytest.mark.skipif(not PackedLinear.works(), reason="the CPU does not multiply bfloat16")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_packed_products_are_those_of_the_weights(activation: str, tmp_path: Path) -> None:
    model = drawn(activation=activation).eval()
    save_encoder(model, tmp_path, special_ids={})
    packed = load_encoder(tmp_path, dtype=torch.bfloat16)
    assert all(layer.packed for layer in packed.layers)
    plain = load_encoder(tmp_path, dtype=torch.bfloat16)
    for layer in plain.layers:
        layer.packed = None
    ids, mask, _ = batch()
    with torch.no_grad():
        wide = model.hidden(ids, mask=mask)[mask]
        errors = [(each.hidden(ids, mask=mask)[mask].float() - wide).abs().mean() for each in (packed, plain)]
        assert errors[0] <= 1.2 * errors[1]
        assert errors[0] < 0.02
        for each in (packed, plain):  # weights that change are followed
            each.layers[1].parts.up.weight.mul_(2.0)
        assert (packed.hidden(ids, mask=mask) - plain.hidden(ids, mask=mask))[mask].abs().mean() < 0.02
    packed.requires_grad_(True)
    packed.hidden(ids, mask=mask).float().sum().backward()
    assert packed.layers[0].parts.query.weight.grad is not None


# ----------------------------------------------------------------------------------------------------------------
# Folders


def renamed(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def as_old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As checkpoints converted from TensorFlow name their norms, with the buffer and the tied matrix of old ones."""
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(LONGEST)[None]
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    return old


def test_old_names_of_weights_are_understood(tmp_path: Path) -> None:
    save_theirs("bert", "masked", tmp_path)
    expected = load_encoder(tmp_path, kind="masked").state_dict()
    renamed(tmp_path, as_old)
    found = load_encoder(tmp_path, kind="masked").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", NAMES)
def test_a_body_loads_with_and_without_its_prefix(family: str, tmp_path: Path) -> None:
    save_theirs(family, "masked", tmp_path)
    expected = load_encoder(tmp_path).embedding
    renamed(tmp_path, lambda tensors: {name.removeprefix(f"{family}."): each for name, each in tensors.items()})
    assert torch.equal(load_encoder(tmp_path).embedding, expected)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("masked", r"has no masked-language-model head: there is no weight of cls"),
        ("classifier", r"has no sequence-classification head: there is no weight of classifier"),
        ("span", r"has no question-answering head: there is no weight of qa_outputs"),
    ],
)
def test_a_head_that_is_missing_is_named(kind: str, message: str, tmp_path: Path) -> None:
    save_theirs("bert", "base", tmp_path)
    with pytest.raises(DataError, match=message):
        load_encoder(tmp_path, kind=kind)


def test_a_part_of_a_head_that_is_missing_is_named(tmp_path: Path) -> None:
    save_theirs("roberta", "classifier", tmp_path)
    renamed(tmp_path, lambda tensors: {name: each for name, each in tensors.items() if "out_proj" not in name})
    with pytest.raises(DataError, match=r"classifier\.out_proj\.weight: missing"):
        load_encoder(tmp_path, kind="classifier")
    load_encoder(tmp_path)


def test_labels_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    save_theirs("distilbert", "classifier", tmp_path / "two")
    assert encoder_labels(tmp_path / "two") == ["LABEL_0", "LABEL_1"]
    save_theirs("roberta", "classifier", tmp_path / "three", id2label={0: "a", 1: "b", 2: "c"})
    assert encoder_labels(tmp_path / "three") == ["a", "b", "c"]
    assert load_encoder(tmp_path / "three", kind="classifier").labels == 3


def test_a_fresh_head_keeps_the_body_and_what_head_there_is(tmp_path: Path) -> None:
    save_theirs("bert", "base", tmp_path)
    base = load_encoder(tmp_path)
    made = with_head(base, "classifier", torch.Generator().manual_seed(0), labels=3)
    weights = made.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())  # pooler too
    assert weights["classifier.weight"].shape == (3, 32)
    assert weights["classifier.weight"].std() < 0.05
    assert all(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu_10"}, "the activation 'gelu_10' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"hidden_size": 30}, "4 heads cannot share a hidden size of 30"),
        ({"layer_norm_eps": 0}, "layer_norm_eps: must be a number above 0"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob: must be a number from 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: must be a whole number"),
        ({"pad_token_id": 97}, "pad_token_id: must be a whole number from 0 to 96"),
        ({"vocab_size": None}, "the key 'vocab_size' is missing"),
        ({"model_type": "albert"}, "model_type is 'albert'; supported: bert, roberta, distilbert"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    values = {"model_type": "bert", "vocab_size": 97, **shape, **changes}
    with pytest.raises(ConfigError, match=message):
        read_encoder_config(values, "config.json")


# ----------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("family", NAMES)
def test_attentions_of_an_encoder_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = save_theirs(family, "base", tmp_path)
    ids = torch.randint(5, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat(theirs(ids, output_attentions=True).attentions)
    found = attentions(load_encoder(tmp_path), ids)
    assert found.shape == (2, 4, 12, 12)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["Qwen3", "Mistral", "GPT2"])
def test_attentions_of_a_decoder_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    more = {"Mistral": {"sliding_window": 5}, "Qwen3": {"head_dim": 8}}.get(family, {})
    shape = shape | more if family != "GPT2" else {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **shape)
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(5, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat(theirs(ids, output_attentions=True).attentions)
    assert (attentions(load_model(tmp_path), ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_fresh_weights_pass_the_embeddings_on_and_tell_places_apart(family: str) -> None:
    types = 0 if family == "distilbert" else 1
    model = MaskedLM(EncoderConfig(family, VOCABULARY, 32, 2, 4, 48, LONGEST, type_vocab_size=types))
    model.init_weights(torch.Generator().manual_seed(0)).eval()
    embedded, *_, last = model.states(torch.full((1, 12), 7))  # one token again and again: places alone differ
    torch.testing.assert_close(last, embedded, atol=1e-4, rtol=0)
    alike = F.cosine_similarity(embedded[0, :-1], embedded[0, 1:], dim=-1)
    far = F.cosine_similarity(embedded[0, :1], embedded[0, -1:], dim=-1)
    assert alike.max() < 0.99
    assert far < alike.min()
    reading = [value for name, value in model.named_parameters() if "k_lin.w" in name or "key.w" in name]
    assert len(reading) == 2
    assert all(value.std() > 0.1 for value in reading)


def test_a_folder_says_what_it_is(tmp_path: Path) -> None:
    config = EncoderConfig(
        "distilbert", VOCABULARY, 16, 2, 2, 24, LONGEST, type_vocab_size=0, classifier_dropout=0.3, activation="relu"
    )
    model = MaskedLM(config).init_weights()
    save_encoder(model, tmp_path, special_ids={}, facts={"extra": 1})
    values = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert values["architectures"] == ["DistilBertForMaskedLM"]
    assert values["extra"] == 1
    assert load_encoder(tmp_path, kind="masked").config == model.config
