"""`finetune`: what a run makes, that a stopped one goes on bit for bit, and what is refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import fingerprint, metrics
from small_tuning import go, make_base, reviews, sums, tiny, until_step

from llmcli.config import ChatConfig, ClassifyTuneConfig, LabelledConfig, LoraConfig, SamplingConfig
from llmcli.data.chat_template import open_template
from llmcli.data.examples import ChatExample, CompletionExample, LabelExample
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import ConfigError, DataError, UsageError
from llmcli.models.folder import load_model
from llmcli.operations.chat import open_chat
from llmcli.operations.classify import classify
from llmcli.operations.finetune import plan_finetuning
from llmcli.operations.inspect import describe
from llmcli.operations.task_chat import ChatTask
from llmcli.operations.task_classify import ClassifyTask
from llmcli.operations.verify import verify
from llmcli.training.packing import ExampleOrder, filled_up, pack

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def chat_data(base: Path) -> Path:
    return sums(base.with_name("sums.jsonl"))


@pytest.fixture(scope="module")
def label_data(base: Path) -> Path:
    return reviews(base.with_name("reviews.tsv"))


# ----------------------------------------------------------------------------------------------------------------
# What a run makes


def test_a_model_without_template_learns_to_chat(tmp_path: Path, base: Path, chat_data: Path) -> None:
    events = go("chat", base, chat_data, tmp_path / "run", config=tiny(max_steps=12))
    losses = [event.loss for event in events if event.event == "validation" and event.loss is not None]
    assert losses[-1] < losses[0]
    result = tmp_path / "run" / "model"
    tokenizer = load_tokenizer(result)
    assert tokenizer.chat_template is not None
    end = tokenizer.id_of("<|im_end|>")
    assert end is not None
    generation = json.loads((result / "generation_config.json").read_text())
    assert end in generation["eos_token_id"]
    old, new = load_model(base), load_model(result)
    assert new.config.vocab_size == tokenizer.vocab_size == old.config.vocab_size + 2
    assert list(verify(tmp_path / "run").problems) == []
    assert describe(tmp_path / "run")
    chat = open_chat(tmp_path / "run", ChatConfig(max_new_tokens=2, threads=1), SamplingConfig(temperature=0))
    answer = list(chat.ask("1+1?"))[-1]
    chat.close()
    assert answer is not None


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 255, 500, 832, 4000, 100_001])
def test_rows_have_few_lengths(tokens: int) -> None:
    size = filled_up(tokens)
    assert 0 <= size - tokens < max(16, tokens / 16 + 1)
    assert filled_up(size) == size
    between = {filled_up(count) for count in range(2**12, 2**13)}
    assert len(between) <= 17


def test_what_fills_a_row_up_is_no_text(tmp_path: Path) -> None:
    """It is in no length, no longer than the longest text, and what a text's states are does not depend on it."""
    texts = [np.arange(1, 4), np.arange(2, 9), np.arange(5, 6)]
    packed = pack(texts, [np.array([len(text) - 1]) for text in texts], types=[np.ones_like(text) for text in texts])
    assert packed.lengths.tolist() == [3, 7, 1]
    assert (packed.tokens, packed.ids.size(1), packed.segments.longest) == (11, 16, 7)
    assert packed.types is not None
    assert packed.types[0].tolist() == [1] * 11 + [0] * 5
    model = load_model(make_base(tmp_path / "base"))
    with torch.no_grad():
        states = model.hidden(packed.ids, segments=packed.segments)[0, packed.chosen]
        for state, text in zip(states, texts, strict=True):
            torch.testing.assert_close(state, model.hidden(torch.from_numpy(text)[None])[0, -1], rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_assistants_tokens_alone(base: Path) -> None:
    task = ChatTask()
    tokenizer = task.tokenizer(load_tokenizer(base))
    turns: list[Any] = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "The sea."}]
    completion = CompletionExample("The sea", " is blue.", "x:2")
    rows = list(task.encoded([ChatExample(tuple(turns), None, "x:1"), completion], tokenizer))
    said = [tokenizer.decode([int(i) for i in row.ids[row.wanted]]) for row in rows]
    assert said == ["The sea.<|im_end|>", " is blue.<|endoftext|>"]
    packed, targets = task.batch(rows)
    assert packed.tokens == sum(len(row.ids) - 1 for row in rows)
    assert packed.ids.size(1) == filled_up(packed.tokens)
    model = load_model(base)
    from llmcli.models.vocabulary import grown

    grown(model, tokenizer.vocab_size)
    with torch.no_grad():
        found = float(task.loss(model, packed, targets, torch.tensor(1.0)))
        expected = 0.0
        for row in rows:
            logits = model(torch.from_numpy(row.ids.astype("int64"))[None])[0].log_softmax(-1)
            places = [place for place in range(1, len(row.ids)) if row.wanted[place]]
            expected -= sum(float(logits[place - 1, row.ids[place]]) for place in places)
    assert found == pytest.approx(expected, rel=1e-4)
    open_template(tokenizer).close()


def test_new_rows_are_the_mean_of_the_others(base: Path) -> None:
    from llmcli.models.vocabulary import grown

    model, old = load_model(base), load_model(base)
    assert not grown(model, old.config.vocab_size)
    assert grown(model, old.config.vocab_size + 3)
    for matrix, before in ((model.embedding, old.embedding), (model.head, old.head)):
        assert torch.equal(matrix[:-3], before)
        assert torch.allclose(matrix[-1], before.mean(0), atol=1e-6)


def test_labels_are_learnt_and_transformers_reads_the_classifier(
    tmp_path: Path, base: Path, label_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    events = go("classify", base, label_data, tmp_path / "run", config=tiny(max_steps=20, learning_rate=0.02))
    last = [event for event in events if event.event == "validation"][-1]
    assert last.figures is not None
    assert set(last.figures) == {"accuracy", "macro_f1"}
    assert last.figures["accuracy"] == 1.0
    assert metrics(tmp_path / "run", "validation")[-1]["figures"] == dict(last.figures)
    assert list(verify(tmp_path / "run").problems) == []
    texts = ["a good thing, number 7", "a bad thing", "a poor thing, number 12 and more"]
    found = list(classify(tmp_path / "run", texts))
    assert [record.label for record in found] == ["pos", "neg", "neg"]
    assert [record.text for record in found] == texts

    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    assert theirs.config.id2label == {0: "neg", 1: "pos"}
    tokenizer = load_tokenizer(tmp_path / "run")
    for record in found:
        with torch.no_grad():
            scores = theirs(torch.tensor([tokenizer.encode(record.text, special=True)])).logits.softmax(-1)[0]
        assert record.probability == pytest.approx(float(scores.max()), abs=1e-4)
    with pytest.raises(DataError, match="is a classifier"):
        load_model(tmp_path / "run" / "model")
    with pytest.raises(DataError, match="no classifier"):
        list(classify(base, ["a"]))


def test_several_labels_a_text(tmp_path: Path, base: Path) -> None:
    lines = [{"text": f"{'red ' * (n % 2)}{'big ' * (n % 3 == 0)}thing {n}"} for n in range(30)]
    for line in lines:
        line["label"] = [word for word in ("red", "big") if word in line["text"]]  # type: ignore[assignment]
    data = tmp_path / "many.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = ClassifyTuneConfig(multi_label=True, class_weights="balanced")
    settings = (LoraConfig(), LabelledConfig(), own)
    go("classify", base, data, tmp_path / "run", *settings, config=tiny(max_steps=40, learning_rate=0.03))
    (found,) = classify(tmp_path / "run", "red big thing 6")
    assert set(found.labels or ()) == {"red", "big"}
    with pytest.raises(DataError, match="--multi-label"):
        go("classify", base, data, tmp_path / "one")


# ----------------------------------------------------------------------------------------------------------------
# Stopped and gone on with


@pytest.mark.parametrize(
    ("task", "lora", "dropout"),
    [
        ("chat", LoraConfig(), 0.0),
        ("chat", LoraConfig(lora=True, lora_rank=2, lora_dropout=0.2, lora_kind="dora"), 0.0),
        ("classify", LoraConfig(lora=True, lora_rank=2, lora_dropout=0.2), 0.0),
        ("classify", LoraConfig(), 0.2),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, base: Path, chat_data: Path, label_data: Path, task: str, lora: LoraConfig, dropout: float
) -> None:
    data = chat_data if task == "chat" else label_data
    config = tiny(dropout=dropout)
    go(task, base, data, tmp_path / "straight", lora, config=config)
    until_step(4, task, base, data, tmp_path / "broken", lora, config=config)
    events = go(task, base, data, tmp_path / "broken", lora, config=config, resume="auto")
    assert next(event for event in events if event.event == "step").step == 5
    assert tuned(tmp_path / "broken") == tuned(tmp_path / "straight")


def tuned(run: Path) -> dict[str, Any]:
    """A run's fingerprint, of whatever is its weights."""
    for folder in [*(run / "checkpoints").glob("step-*"), run / "model"]:
        if (folder / "adapter_model.safetensors").exists():
            (folder / "model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    return fingerprint(run)


def test_what_may_not_change_is_refused_on_resuming(tmp_path: Path, base: Path, chat_data: Path) -> None:
    until_step(3, "chat", base, chat_data, tmp_path / "run")
    with pytest.raises(UsageError, match="batch_size"):
        go("chat", base, chat_data, tmp_path / "run", config=tiny(batch_size=8), resume="auto")
    with pytest.raises(UsageError, match="was begun on"):
        go("classify", base, chat_data, tmp_path / "run", resume="auto")
    other = sums(tmp_path / "other.jsonl", seed=5)
    (tmp_path / "mine.jsonl").write_text(chat_data.read_text())
    until_step(3, "chat", base, tmp_path / "mine.jsonl", tmp_path / "again")
    (tmp_path / "mine.jsonl").write_text(other.read_text())
    with pytest.raises(DataError, match="another data"):
        go("chat", base, tmp_path / "mine.jsonl", tmp_path / "again", resume="auto")


def test_the_order_depends_on_seed_and_number_alone_and_visits_each_once() -> None:
    order = ExampleOrder(10, batch_size=4, seed=3)
    visited = [index for number in range(5) for index in order.batch(number)]
    assert sorted(visited[:10]) == sorted(visited[10:]) == list(range(10))
    assert visited[:10] != visited[10:]
    assert ExampleOrder(10, batch_size=4, seed=3).batch(3) == visited[12:16]


# ----------------------------------------------------------------------------------------------------------------
# Bad input


def test_long_examples_are_counted_cut_or_left_out(tmp_path: Path, base: Path) -> None:
    data = sums(tmp_path / "sums.jsonl", 6)
    long = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two " * 100}]
    far = [{"role": "user", "content": "why " * 100}, {"role": "assistant", "content": "no"}]
    with open(data, "a") as file:
        file.writelines(json.dumps({"messages": turns}) + "\n" for turns in (long, far))
    with pytest.raises(DataError, match=r"2 of 8 examples have more than 65 tokens.*--on-long") as caught:
        plan_finetuning("chat", base, data, tiny())
    assert "sums.jsonl:" in str(caught.value)
    told = {kind: plan_finetuning("chat", base, data, tiny(on_long=kind)).facts["data"] for kind in ("cut", "drop")}
    assert "1 cut; 1 left out" in told["cut"]
    assert "2 left out" in told["drop"]


def test_validation_that_is_trained_on_is_refused(tmp_path: Path, base: Path, chat_data: Path) -> None:
    with pytest.raises(DataError, match=r"24 of 24 validation examples are trained on too.*--allow-overlap"):
        plan_finetuning("chat", base, chat_data, tiny(validation=str(chat_data)))
    facts = plan_finetuning("chat", base, chat_data, tiny(validation=str(chat_data), allow_overlap=True)).facts
    assert "24 to validate on" in facts["data"]
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text(chat_data.read_text() * 2)  # a split keeps equal examples together
    facts = plan_finetuning("chat", base, doubled, tiny(val_split=0.3)).facts
    assert "14 to validate on" in facts["data"] or "15 to validate on" in facts["data"]


def test_labels_that_cannot_be_learnt_are_refused(tmp_path: Path, base: Path, label_data: Path) -> None:
    task = ClassifyTask()
    tokenizer = load_tokenizer(base)
    rows = list(task.encoded([LabelExample("a", ("x",), "f:1"), LabelExample("b", ("x",), "f:2")], tokenizer))
    with pytest.raises(DataError, match="every example has"):
        task.settle(rows, [])
    rare = tmp_path / "rare.tsv"
    rare.write_text(label_data.read_text() + "one of its own\trare\n")
    for seed in range(6):  # a split of ours leaves it to training, whichever rows it takes
        assert "validate" in plan_finetuning("classify", base, rare, tiny(seed=seed, val_split=0.5)).facts["data"]
    unseen = tmp_path / "dev.tsv"
    unseen.write_text("text\tlabel\nan odd thing\todd\n")
    with pytest.raises(DataError, match=r"dev.tsv:2.*'odd' is not among those trained on"):
        plan_finetuning("classify", base, label_data, tiny(validation=str(unseen)))
    with pytest.raises(ConfigError, match="no matrix is called"):
        plan_finetuning("chat", base, sums(tmp_path / "s.jsonl"), tiny(), LoraConfig(lora=True, lora_targets="W"))


def test_nothing_is_left_where_a_run_could_not_begin(tmp_path: Path, base: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "alone"}]}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:1"):
        go("chat", base, bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()
