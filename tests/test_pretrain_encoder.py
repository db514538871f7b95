"""`pretrain` of encoders: by hidden tokens and by contrast, stopped and gone on with, begun from another model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run
from small_run import fingerprint, make_corpus, metrics, text, tiny, tree, words

from llmcli.config import ObjectiveConfig, PretrainConfig, TextConfig
from llmcli.data.frames import is_framed
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import ConfigError, DataError, UsageError
from llmcli.files.manifest import read_manifest
from llmcli.models.encoder_folder import load_encoder
from llmcli.models.folder import load_model
from llmcli.models.presets import ENCODER_PRESETS, count_encoder_parameters, preset_table
from llmcli.operations.pretrain import plan_pretraining, pretrain
from llmcli.operations.pretrain_contrastive import Prepared, prepared_contrast
from llmcli.operations.pretrain_settings import settle
from llmcli.operations.training_run import Started
from llmcli.operations.verify import verify
from llmcli.training.loop import TrainingEvent

MASKED = ObjectiveConfig(objective="masked", mask_fraction=0.3)


def go(data: Any, at: Path, config: PretrainConfig, objective: ObjectiveConfig, **details: Any) -> list[TrainingEvent]:
    records = pretrain(data, at, config, details.pop("text", TextConfig()), objective, **details)
    return [record for record in records if isinstance(record, TrainingEvent)]


def facts_of(data: Any, at: Path, config: PretrainConfig, objective: ObjectiveConfig) -> dict[str, str]:
    records = pretrain(data, at, config, TextConfig(), objective)
    found = next(record for record in records if isinstance(record, Started))
    records.close()
    return dict(found.facts)


def until_step(
    step: int, data: Any, at: Path, config: PretrainConfig, objective: ObjectiveConfig, **details: Any
) -> None:
    """Runs until so many steps are done, and is then told to stop."""
    done = [0]
    for record in pretrain(data, at, config, TextConfig(), objective, stopping=lambda: done[-1] >= step, **details):
        if isinstance(record, TrainingEvent):
            done.append(record.step)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("encoder") / "corpus")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of an encoder."""
    place = tmp_path_factory.mktemp("masked") / "run"
    go(corpus, place, tiny(), MASKED)
    return place


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of a decoder, whose two query heads share one of keys and values."""
    place = tmp_path_factory.mktemp("causal") / "run"
    go(corpus, place, tiny(max_steps=2, kv_heads=1), ObjectiveConfig())
    return place


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Some lines that differ."""
    place = tmp_path / "notes.txt"
    lines = [" ".join(line.split()) for line in text(9000).split(". ")]
    place.write_text("\n".join(f"Then {line.capitalize()}." for line in dict.fromkeys(lines) if line.count(" ") > 3))
    return place


# ----------------------------------------------------------------------------------------------------------------
# By hidden tokens


def test_an_encoder_learns_to_find_hidden_tokens(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", text(20_000))
    steps = {"max_steps": 60, "eval_every": 20, "save_every": 60, "hidden_size": 32, "ffn_size": 64, "batch_size": 16}
    events = go(corpus, tmp_path / "run", tiny(**steps, learning_rate=0.01), MASKED)
    checked = [event for event in events if event.event == "validation"]
    losses = [event.loss or 0.0 for event in checked]
    assert losses[-1] < losses[0] < 6.7  # nats; of 804 tokens by chance: 6.69
    assert 0 < (checked[-1].figures or {})["accuracy"] < 1
    assert checked[-1].bits_per_byte is None
    assert events[-1].tokens == 60 * 16 * 16  # of rows, and not those alone that are hidden
    step = metrics(tmp_path / "run", "validation")[-1]
    assert step["figures"] == dict(checked[-1].figures or {})


def test_what_a_run_leaves_is_a_masked_language_model(masked: Path, corpus: Path) -> None:
    assert list(verify(masked).problems) == []
    model = load_encoder(masked / "model", kind="masked")
    tokenizer = load_tokenizer(masked / "model")
    assert is_framed(tokenizer)
    assert model.config.vocab_size == tokenizer.vocab_size == load_tokenizer(corpus).vocab_size + 4
    assert (model.config.pad_token_id, model.config.longest) == (tokenizer.pad_id, 16)
    assert (model.config.hidden_dropout, model.config.attention_dropout) == (0.0, 0.0)
    lineage = read_manifest(masked / "model")["lineage"]
    assert (lineage["tokenizer"], lineage["parent"]) == (tokenizer.hash, None)


def test_transformers_reads_it_and_finds_the_same(masked: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(masked / "model").eval()
    own = transformers.AutoTokenizer.from_pretrained(masked / "model")
    ours = load_encoder(masked / "model", kind="masked")
    ids = own("the value of it", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours.hidden(ids)), theirs(ids).logits, atol=1e-4, rtol=1e-4)


VARIANTS = [
    pytest.param({}, {}, id="bert"),
    pytest.param({"family": "distilbert", "grad_accumulation": 2}, {"dropout": 0.2}, id="distilbert-dropout-pieces"),
    pytest.param({"precision": "bfloat16", "optimizer": "adamw"}, {"mask_whole_words": False}, id="adamw-bfloat16"),
]


@pytest.mark.parametrize(("changes", "objective"), VARIANTS)
def test_a_masked_run_that_was_stopped_goes_on_bit_for_bit(
    tmp_path: Path, corpus: Path, changes: dict[str, Any], objective: dict[str, Any]
) -> None:
    config, learnt = tiny(**changes), dataclasses.replace(MASKED, **objective)
    go(corpus, tmp_path / "straight", config, learnt)
    expected = fingerprint(tmp_path / "straight")
    for step in (1, 5, 11):
        until_step(step, corpus, tmp_path / "run", config, learnt, resume="auto")
    go(corpus, tmp_path / "run", config, learnt, resume="auto")
    assert fingerprint(tmp_path / "run") == expected


def test_plain_text_becomes_an_encoder_in_one_command(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text(9000))
    made = ["pretrain", "text.txt", "-o", "run", "--objective", "masked", "--lowercase"]
    done = run(*made, *words(max_steps=2, vocab_size=300), cwd=tmp_path)
    assert done.stdout == "run/model\n", done.stderr
    assert "model      bert" in done.stderr
    tokenizer = load_tokenizer(tmp_path / "run" / "model")
    assert (tokenizer.kind, tokenizer.vocab_size) == ("WordPiece", 300)
    assert tokenizer.encode("THE") == tokenizer.encode("the")
    assert is_framed(tokenizer)
    planned = run(*made, "--dry-run", *words(max_steps=2, vocab_size=300), cwd=tmp_path)
    assert "model      bert" in planned.stdout


def test_an_encoder_that_makes_its_own_tokenizer_may_be_a_roberta(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text(9000))
    config = tiny(family="roberta", kind="bpe", vocab_size=400, max_steps=2)
    go(tmp_path / "text.txt", tmp_path / "run", config, MASKED)
    model = load_encoder(tmp_path / "run" / "model", kind="masked")
    assert (model.config.model_type, model.config.longest) == ("roberta", 16)


@pytest.mark.parametrize(
    ("config", "objective", "told"),
    [
        ({"family": "gpt2"}, {"objective": "masked"}, "family: gpt2 is no family for masked"),
        ({"family": "bert"}, {}, "family: bert is no family for causal"),
        ({"preset": "30m"}, {"objective": "masked"}, "preset: no preset '30m'; there are 1m, 4m, 8m, 14m, 33m"),
        ({"kv_heads": 1}, {"objective": "masked"}, "kv_heads: an encoder has a key/value head for each"),
        ({"family": "roberta"}, {"objective": "masked"}, "family: roberta counts positions from behind its padding"),
        ({}, {"objective": "masked", "mask_token_share": 0.95}, "mask_token_share: and mask_random_share are more"),
        ({}, {"objective": "contrastive"}, "init: contrastive begins from a model"),
        ({"compile": "on"}, {"objective": "contrastive", "init": "x"}, "compile: there is nothing to compile"),
        ({"kind": "bpe", "lowercase": True}, {"objective": "masked"}, "lowercase: is for --kind wordpiece"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, corpus: Path, config: dict[str, Any], objective: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        go(corpus, tmp_path / "run", tiny(**config), ObjectiveConfig(**objective))
    assert str(error.value).startswith(told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ENCODER_PRESETS)
def test_a_preset_of_an_encoder_has_the_size_of_its_name(name: str) -> None:
    preset = ENCODER_PRESETS[name]
    settled = settle(PretrainConfig(preset=name), preset.vocab_size, 10**9, ObjectiveConfig(objective="masked"))
    assert settled.plan.parameters == count_encoder_parameters(preset)
    assert round(settled.plan.parameters / 1e6) == pytest.approx(int(name[:-1]), abs=0.51)
    table = preset_table().split("masked\n")[1]
    assert f"{settled.plan.parameters / 1e6:8.1f} M" in next(
        line for line in table.splitlines() if name in line.split()
    )


# ----------------------------------------------------------------------------------------------------------------
# From another model


def test_an_encoder_begins_from_a_decoder_and_a_decoder_from_an_encoder(
    tmp_path: Path, corpus: Path, causal: Path, masked: Path
) -> None:
    still = tiny(max_steps=1, learning_rate=1e-30, embedding_learning_rate=1e-30)
    begun = dataclasses.replace(MASKED, init=str(causal))
    told = facts_of(corpus, tmp_path / "told", still, begun)["init"]
    assert "(qwen3): 800 of 804 rows of the embedding; query, key, value, out, up, down of 2 layers; fresh: " in told
    go(corpus, tmp_path / "encoder", still, begun)
    encoder, decoder = load_encoder(tmp_path / "encoder" / "model", kind="masked"), load_model(causal / "model")
    assert torch.equal(encoder.embedding[:800], decoder.embedding)
    ours, theirs = encoder.layers[1].parts, decoder.layers[1]
    assert torch.equal(ours.query.weight, theirs.self_attn.q_proj.weight)  # type: ignore[union-attr]
    key = theirs.self_attn.k_proj.weight  # type: ignore[union-attr]
    assert torch.equal(ours.key.weight, torch.cat([key, key]))  # type: ignore[union-attr]
    assert torch.equal(ours.down.weight, theirs.mlp.down_proj.weight)  # type: ignore[union-attr]
    assert read_manifest(tmp_path / "encoder" / "model")["lineage"]["parent"] is not None

    for family, more in (("qwen3", ""), ("gpt2", "positions")):
        at = tmp_path / family
        config = dataclasses.replace(still, family=family)
        told = facts_of(corpus, tmp_path / f"{family}-told", config, ObjectiveConfig(init=str(masked)))["init"]
        assert "(bert): 800 of 800 rows of the embedding; query, key, value, out, up, down of 2 layers" in told
        assert more in told
        go(corpus, at, config, ObjectiveConfig(init=str(masked)))
        back, source = load_model(at / "model"), load_encoder(masked / "model")
        assert torch.equal(back.embedding, source.embedding[:800])
    weight = back.body.h[0].attn.c_attn.weight  # type: ignore[union-attr, index]
    assert torch.equal(weight[:, 16:32].t(), source.layers[0].parts.key.weight)  # type: ignore[union-attr]


def test_a_model_of_the_same_kind_is_gone_on_from_whole(tmp_path: Path, corpus: Path, masked: Path) -> None:
    still = PretrainConfig(max_steps=1, learning_rate=1e-30, embedding_learning_rate=1e-30, compile="off", batch_size=4)
    objective = dataclasses.replace(MASKED, init=str(masked))
    assert "fresh" not in facts_of(corpus, tmp_path / "told", still, objective)["init"]
    go(corpus, tmp_path / "run", still, objective)  # its shape is the default
    one, two = (load_encoder(at / "model", kind="masked").state_dict() for at in (masked, tmp_path / "run"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, msg=name)


def test_a_model_of_which_nothing_fits_is_refused(tmp_path: Path, corpus: Path, causal: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(DataError, match="its embedding is 16 wide, that of the run 24"):
        go(corpus, tmp_path / "run", tiny(hidden_size=24), dataclasses.replace(MASKED, init=str(causal)))
    with pytest.raises(DataError, match="no such file or folder"):
        go(corpus, tmp_path / "run", tiny(), dataclasses.replace(MASKED, init="absent"))
    assert tree(tmp_path) == before


# ----------------------------------------------------------------------------------------------------------------
# By contrast


def contrast(init: Path, **changes: Any) -> ObjectiveConfig:
    return ObjectiveConfig(**{"objective": "contrastive", "init": str(init), **changes})


def light(**changes: Any) -> PretrainConfig:
    """A run of 8 steps in the shape of what it begins from."""
    values = {"max_steps": 8, "eval_every": 2, "save_every": 3, "batch_size": 6, "threads": 1, "precision": "float32"}
    return PretrainConfig(**{**values, "device": "cpu", **changes})


def test_contrast_writes_a_folder_of_sentence_transformers(tmp_path: Path, masked: Path, notes: Path) -> None:
    events = go(notes, tmp_path / "run", light(max_steps=30, learning_rate=5e-3, val_fraction=0.4), contrast(masked))
    checked = [event for event in events if event.event == "validation"]
    assert (checked[-1].loss or 9) < (checked[0].loss or 0)
    assert set(checked[-1].figures or {}) == {"alignment", "uniformity"}
    assert list(verify(tmp_path / "run").problems) == []
    place = tmp_path / "run" / "model"
    assert json.loads((place / "config.json").read_text())["architectures"] == ["BertModel"]
    assert load_encoder(place).config.hidden_dropout == 0.1
    peers = pytest.importorskip("sentence_transformers")
    theirs = peers.SentenceTransformer(str(place), device="cpu")
    found = theirs.encode("the value of it", convert_to_tensor=True)
    tokenizer, model = load_tokenizer(place), load_encoder(place)
    states = model.hidden(torch.tensor([tokenizer.encode("the value of it", special=True)]))[0]
    torch.testing.assert_close(found, torch.nn.functional.normalize(states.mean(0), dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_run_by_contrast_that_was_stopped_goes_on_bit_for_bit(
    tmp_path: Path, masked: Path, notes: Path, pieces: int
) -> None:
    config, objective = light(grad_accumulation=pieces), contrast(masked)
    go(notes, tmp_path / "straight", config, objective)
    expected = fingerprint(tmp_path / "straight")
    for step in (1, 5, 7):
        until_step(step, notes, tmp_path / "run", config, objective, resume="auto")
    go(notes, tmp_path / "run", config, objective, resume="auto")
    assert fingerprint(tmp_path / "run") == expected


def test_pairs_are_contrasted_and_scored_pairs_decide(tmp_path: Path, masked: Path) -> None:
    rows = [{"anchor": f"the value {n} of it", "positive": f"its value is {n}"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    scored = "\n".join(f"the value {n},the {'value' if n % 2 else 'name'} {n},{n % 2}" for n in range(12))
    (tmp_path / "scored.csv").write_text(f"sentence1,sentence2,score\n{scored}\n")
    objective = contrast(masked, scored=str(tmp_path / "scored.csv"), pooling="cls")
    told = facts_of(tmp_path / "pairs.jsonl", tmp_path / "told", light(), objective)
    assert told["data"].startswith("38 pairs, 2 to validate on; ")
    events = go(tmp_path / "pairs.jsonl", tmp_path / "run", light(), objective)
    checked = [event for event in events if event.event == "validation"]
    assert [event.criterion for event in checked] == [-(event.figures or {})["spearman"] for event in checked]
    best = min(checked, key=lambda event: event.criterion or 0.0)
    assert read_manifest(tmp_path / "run" / "model")["lineage"]["step"] == best.step
    flags = json.loads((tmp_path / "run" / "model" / "1_Pooling" / "config.json").read_text())
    assert (flags["pooling_mode_cls_token"], flags["pooling_mode_mean_tokens"]) == (True, False)
    with pytest.raises(DataError, match="holds scored pairs: finetune embed learns from them"):
        go(tmp_path / "scored.csv", tmp_path / "no", light(), objective)


def test_a_sentence_may_belong_to_the_next_one_of_its_document(tmp_path: Path, masked: Path) -> None:
    (tmp_path / "a.txt").write_text("The first one is here. The second one is here. The third one is here.")
    (tmp_path / "b.txt").write_text("Another one is alone.")
    inputs = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    prepared = list(prepared_contrast(inputs, light(val_fraction=0), TextConfig(), contrast(masked, views="next")))[-1]
    assert isinstance(prepared, Prepared)
    told = [tuple(prepared.tokenizer.decode(list(ids[1:-1])) for ids in group) for group in prepared.data.train]
    assert told == [
        ("The first one is here.", "The second one is here."),
        ("The second one is here.", "The third one is here."),
        ("The third one is here.", "The third one is here."),
        ("Another one is alone.", "Another one is alone."),
    ]
    with pytest.raises(ConfigError, match="views: next needs sentences"):
        go(inputs, tmp_path / "run", light(), contrast(masked, views="next", cut_sentences=False))


def test_a_corpus_has_no_sentences_to_contrast(tmp_path: Path, masked: Path, corpus: Path) -> None:
    with pytest.raises(UsageError, match="is a corpus, which has no sentences any more"):
        go(corpus, tmp_path / "run", light(), contrast(masked))


def test_the_plan_of_a_run_by_contrast_tells_its_data(tmp_path: Path, masked: Path, notes: Path) -> None:
    done = run(
        *("pretrain", str(notes), "-o", "run", "--objective", "contrastive", "--init", str(masked), "--dry-run"),
        cwd=tmp_path,
    )
    assert done.stdout.startswith("data       ")
    planned = plan_pretraining(notes, light(), objective=contrast(masked))
    assert planned.plan.steps == 8
    assert set(planned.facts) == {"data", "init"}
    notes.write_text("only one line\n")
    with pytest.raises(DataError, match="holds 1 texts; two at least are needed"):
        plan_pretraining(notes, light(), objective=contrast(masked))
