"""`finetune prefer`: the loss and its gradients as plain torch gives them, the reference kept, resume bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import fingerprint, metrics
from small_tuning import go, make_base, pairs, tiny, until_step

from llmcli.config import LabelledConfig, LoraConfig, PreferTuneConfig
from llmcli.data.examples import PreferenceExample
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import DataError
from llmcli.files.reference import REFERENCE, read_reference, write_reference
from llmcli.models.folder import load_model
from llmcli.models.vocabulary import grown
from llmcli.operations.finetune import plan_finetuning
from llmcli.operations.task_prefer import PairRow, PreferTask
from llmcli.training import losses
from llmcli.training.losses import log_probabilities

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return pairs(base.with_name("pairs.jsonl"))


def example(prompt: str, chosen: str, rejected: str, where: str = "x:1") -> PreferenceExample:
    def said(role: str, text: str) -> tuple[dict[str, Any], ...]:
        return ({"role": role, "content": text},)

    return PreferenceExample(said("user", prompt), said("assistant", chosen), said("assistant", rejected), where)


# ----------------------------------------------------------------------------------------------------------------
# The loss


def test_log_probabilities_and_their_gradients_are_those_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 4 * 50 * 16)  # pieces of 16 rows
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator)
    head = torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (37,), generator=generator)
    weights = torch.randn(37, generator=generator)
    for frozen in (False, True):
        ours = [hidden.clone().requires_grad_(), head.clone().requires_grad_(not frozen)]
        theirs = [hidden.double().requires_grad_(), head.double().requires_grad_(not frozen)]
        found = log_probabilities(ours[0], ours[1], targets)
        (found * weights).sum().backward()
        expected = (theirs[0] @ theirs[1].t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        (expected * weights).sum().backward()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(ours, theirs, strict=True):
            if other.grad is None:
                assert one.grad is None
            else:
                assert one.grad is not None
                torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_papers_whatever_the_lengths(base: Path, smoothing: float) -> None:
    task = PreferTask(PreferTuneConfig(beta=0.3, label_smoothing=smoothing))
    tokenizer = task.tokenizer(load_tokenizer(base))
    rows = list(
        task.encoded(
            [
                example("why", "The sea is blue.", "no"),
                example("a b c d e f", "x", "It is so because it is so, they say."),
                example("1+1?", "two", "three"),
            ],
            tokenizer,
        )
    )
    said = [
        tokenizer.decode([int(i) for i in row.ids[part][row.wanted[part]]])
        for row in rows
        if isinstance(row, PairRow)
        for part in row.parts
    ]
    assert said[:4] == ["The sea is blue.<|im_end|>", "no<|im_end|>", "x<|im_end|>", said[3]]
    model, start = load_model(base), load_model(base)
    for each in (model, start):
        grown(each, tokenizer.vocab_size)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.05 * drawn)

    def answers(which: torch.nn.Module, row: PairRow) -> list[torch.Tensor]:
        sums = []
        for part in row.parts:
            ids = torch.from_numpy(row.ids[part].astype("int64"))
            logs = which(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            sums.append(logs[torch.from_numpy(row.wanted[part][1:])].sum())
        return sums

    list(task.refer(start, rows, base.parent, f"key {smoothing}"))
    packed, targets = task.batch(rows)
    model.requires_grad_(True)
    found = task.loss(model, packed, targets, torch.tensor(0.5))
    found.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    margins = []
    for row in rows:
        assert isinstance(row, PairRow)
        with torch.no_grad():
            then = answers(start, row)
        now = answers(model, row)
        margins.append(0.3 * ((now[0] - then[0]) - (now[1] - then[1])))
    expected = -(
        (1 - smoothing) * F.logsigmoid(torch.stack(margins)) + smoothing * F.logsigmoid(-torch.stack(margins))
    ).sum()
    (0.5 * expected).backward()
    assert float(found.detach()) == pytest.approx(float(0.5 * expected.detach()), rel=1e-4)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[name], parameter.grad, rtol=2e-3, atol=2e-5)
    with torch.no_grad():
        validation = task.validate(model, [(packed, targets)])
    assert validation.loss == pytest.approx(float(expected.detach()) / 3, rel=1e-4)
    assert validation.figures is not None
    assert validation.figures["accuracy"] == pytest.approx(float(np.mean([float(m.detach()) > 0 for m in margins])))
    assert validation.figures["margin"] == pytest.approx(
        float(torch.stack(margins).detach().mean()), rel=1e-3, abs=1e-5
    )


# ----------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_learns_to_prefer_and_begins_at_the_reference(tmp_path: Path, base: Path, data: Path) -> None:
    events = go("prefer", base, data, tmp_path / "run", config=tiny(max_steps=16))
    steps = [event.loss for event in events if event.event == "step"]
    assert steps[0] == pytest.approx(np.log(2), abs=1e-5)  # the model is its own reference
    last = metrics(tmp_path / "run", "validation")[-1]
    assert last["figures"]["accuracy"] == 1.0
    assert last["figures"]["margin"] > 0
    assert last["loss"] < np.log(2)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(lora=True, lora_rank=2, lora_dropout=0.2, lora_kind="dora")])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, base: Path, data: Path, lora: LoraConfig) -> None:
    settings = (lora, LabelledConfig(), PreferTuneConfig(beta=0.5))
    go("prefer", base, data, tmp_path / "straight", *settings)
    until_step(4, "prefer", base, data, tmp_path / "broken", *settings)
    kept = (tmp_path / "broken" / REFERENCE).read_bytes()
    assert kept == (tmp_path / "straight" / REFERENCE).read_bytes()
    go("prefer", base, data, tmp_path / "broken", *settings, resume="auto")
    assert (tmp_path / "broken" / REFERENCE).read_bytes() == kept
    for run in ("broken", "straight"):
        for folder in [*(tmp_path / run / "checkpoints").glob("step-*"), tmp_path / run / "model"]:
            if (folder / "adapter_model.safetensors").exists():
                (folder / "model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    assert fingerprint(tmp_path / "broken") == fingerprint(tmp_path / "straight")


def test_a_reference_is_read_where_it_fits_and_else_computed(tmp_path: Path, base: Path, data: Path) -> None:
    go("prefer", base, data, tmp_path / "run")
    path = tmp_path / "run" / REFERENCE
    whole = path.read_bytes()
    for damage in (whole[:-8], b"", None):
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        go("prefer", base, data, tmp_path / "run", resume="auto")
        assert path.read_bytes() == whole
    write_reference(tmp_path / "x", np.ones((3, 2), np.float32), "key")
    assert read_reference(tmp_path / "x", "other", 3) is None
    assert read_reference(tmp_path / "x", "key", 4) is None
    assert np.array_equal(read_reference(tmp_path / "x", "key", 3), np.ones((3, 2)))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------
# Bad input


def test_equal_answers_are_refused_by_their_place(tmp_path: Path, base: Path, data: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text() + '{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:25: chosen and rejected are the same"):
        go("prefer", base, bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    task = PreferTask()
    tokenizer = task.tokenizer(load_tokenizer(base))
    with pytest.raises(DataError, match=r"y:7: chosen and rejected are the same"):
        list(task.encoded([example("a", "b", "b", "y:7")], tokenizer))


def test_long_pairs_are_cut_at_the_end_of_both_answers(tmp_path: Path, base: Path) -> None:
    lines = [
        {"prompt": "1+1?", "chosen": "two " * 60, "rejected": "no"},  # cut
        {"prompt": "1+1?", "chosen": "so " * 60 + "yes", "rejected": "so " * 60 + "no"},  # alike up to there
        {"prompt": "why " * 100, "chosen": "yes", "rejected": "no"},  # no answer is left
        {"prompt": "2+2?", "chosen": "four", "rejected": "five"},
    ]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"3 of 4 examples have more than 64 tokens.*--on-long"):
        plan_finetuning("prefer", base, path, tiny())
    assert "1 cut; 2 left out" in plan_finetuning("prefer", base, path, tiny(on_long="cut")).facts["data"]
    assert "3 left out" in plan_finetuning("prefer", base, path, tiny(on_long="drop")).facts["data"]
    task = PreferTask()
    tokenizer = task.tokenizer(load_tokenizer(base))
    (row,) = task.encoded([example("1+1?", "two " * 60, "no")], tokenizer)
    short = task.cut(row, 64)
    assert isinstance(short, PairRow)
    assert isinstance(row, PairRow)
    first, second = short.parts
    assert len(short.ids[first]) == 64
    assert np.array_equal(short.ids[first], row.ids[:64])
    assert np.array_equal(short.ids[second], row.ids[row.split :])
