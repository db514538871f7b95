"""Training without a command line: batches, schedule, optimizer, loop, plan, and what is chosen for the machine."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llmcli.config import PretrainConfig
from llmcli.data import heap
from llmcli.errors import ConfigError, DataError, UsageError
from llmcli.files.tensors import load_tensors, save_tensors
from llmcli.models.config import FAMILIES, DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.presets import PRESETS, count_parameters, preset_table
from llmcli.operations.pretrain_settings import settle
from llmcli.training import machine
from llmcli.training.batches import TokenWindows, prefetched, validation_windows
from llmcli.training.loop import Loop, LoopSettings, NotFiniteError, TrainingEvent, TrainingState, Validation
from llmcli.training.losses import IGNORED, head_loss, summed_loss
from llmcli.training.optimizer import BETAS, EPS, Muon, Optimizer, is_matrix, orthogonalize
from llmcli.training.plan import compile_pays
from llmcli.training.schedule import Budget, multiplier

VOCABULARY = 32


def tiny(family: str = "qwen3", **changes: Any) -> DecoderConfig:
    """Two layers of width 16."""
    gpt2 = family == "gpt2"
    return DecoderConfig(
        **{
            "model_type": family,
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2 if gpt2 else 1,
            "head_dim": 8,
            "intermediate_size": 24,
            "max_position_embeddings": 8,
            "attention_bias": gpt2,
            "mlp_bias": gpt2,
            **changes,
        }
    )


def fresh(family: str = "qwen3", seed: int = 0) -> Decoder:
    return Decoder(tiny(family)).init_weights(torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------
# Batches


def windows(tokens: int | tuple[int, ...] = 1000, **changes: Any) -> TokenWindows:
    """Windows over ids that are their own places, shard after shard."""
    sizes = (tokens,) if isinstance(tokens, int) else tokens
    starts = [0, *itertools.accumulate(sizes)]
    shards = [np.arange(start, start + size, dtype=np.uint32) for start, size in zip(starts, sizes, strict=False)]
    return TokenWindows(shards, **{"context": 8, "batch_size": 4, "seed": 3, **changes})


def test_a_batch_depends_on_seed_step_and_rank_alone() -> None:
    straight = [windows().batch(number) for number in range(60)]  # each from a new object: nothing is remembered
    asked = windows()
    for number in np.random.default_rng(0).permutation(60):
        for expected, found in zip(straight[number], asked.batch(int(number)), strict=True):
            assert torch.equal(expected, found)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    other = [windows(seed=4).batch(number)[0] for number in range(60)]
    assert any(not torch.equal(a, b) for a, (b, _) in zip(other, straight, strict=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("tokens", [1000, 73, 9, (500, 8, 300), (100, 100, 9)])
def test_an_epoch_visits_every_window_once_and_windows_share_no_target(tokens: int | tuple[int, ...]) -> None:
    found = windows(tokens)
    total = tokens if isinstance(tokens, int) else sum(tokens)
    epochs = []
    for epoch in range(3):
        rows = [found.window(epoch * found.per_epoch + place) for place in range(found.per_epoch)]
        targets = np.concatenate([row[1:] for row in rows])
        assert len(set(targets.tolist())) == len(targets)
        assert all((np.diff(row) == 1).all() for row in rows)
        epochs.append([int(row[0]) for row in rows])
        assert len(targets) <= total
    shards = 1 if isinstance(tokens, int) else len(tokens)
    assert 8 * found.per_epoch > total - shards * (2 * 8 + 1)  # at most a window and the phase of each shard is lost
    if found.per_epoch > 8:
        assert sorted(epochs[0]) != epochs[0]
        assert epochs[0] != epochs[1]


def test_the_phase_moves_so_that_every_token_is_a_target_in_some_epoch() -> None:
    found = windows(200)
    rows = [found.window(sample) for sample in range(40 * found.per_epoch)]
    assert {int(target) for row in rows for target in row[1:]} == set(range(1, 200))


def test_ranks_share_no_row_and_together_see_what_one_would() -> None:
    alone = [windows(batch_size=12).batch(number)[0] for number in range(20)]
    ranks = [windows(rank=rank, world=3) for rank in range(3)]
    for number, expected in enumerate(alone):
        assert torch.equal(torch.cat([rank.batch(number)[0] for rank in ranks]), expected)


def test_a_step_in_pieces_has_the_rows_of_the_step_in_one() -> None:
    whole, pieces = windows(batch_size=8), windows(batch_size=2)
    for step in range(9):
        for place in (0, 1):
            parts = [pieces.batch(4 * step + part)[place] for part in range(4)]
            assert torch.equal(torch.cat(parts), whole.batch(step)[place])
    stream = prefetched(pieces, 4 * 5, torch.device("cpu"))
    assert torch.equal(torch.cat([next(stream)[1] for _ in range(4)]), whole.batch(5)[1])


def test_targets_are_the_inputs_one_on() -> None:
    inputs, targets = windows().batch(0)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (4, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (6, "too little text: 6 tokens, a context of 8 needs 9; a context of 5 would fit"),
        ((6, 7), "too little text: 7 tokens, a context of 8 needs 9; a context of 6 would fit"),
        (2, "too little text: 2 tokens, a context of 8 needs 9; give more"),
        ((), "too little text: 0 tokens, a context of 8 needs 9; give more"),
    ],
)
def test_too_little_text_says_how_much_there_is_and_what_would_fit(tokens: int | tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError) as caught:
        windows(tokens)
    assert str(caught.value) == message
    if "would fit" in message:
        windows(tokens, context=int(message.rsplit(" ", 3)[-3])).batch(0)


def test_an_id_beyond_the_vocabulary_is_found_before_the_model_sees_it() -> None:
    ids = np.arange(100, dtype=np.uint16)
    TokenWindows([ids], context=8, batch_size=4, seed=0, vocab_size=100).batch(0)
    with pytest.raises(DataError, match=r"the corpus holds the id 9\d of a vocabulary of 90; see llmcli verify"):
        [TokenWindows([ids], context=8, batch_size=4, seed=0, vocab_size=90).batch(number) for number in range(5)]
    with pytest.raises(DataError, match="of a vocabulary of 90"):
        list(validation_windows([ids], context=8, batch_size=99, tokens=1000, vocab_size=90))


def test_validation_looks_at_the_same_even_spread_of_the_text_each_time() -> None:
    shards = [np.arange(0, 400, dtype=np.uint16), np.arange(400, 1000, dtype=np.uint16)]
    first, second = (list(validation_windows(shards, context=8, batch_size=3, tokens=160)) for _ in range(2))
    rows = torch.cat([inputs for inputs, _ in first])
    assert rows.shape == (20, 8)
    assert torch.equal(rows, torch.cat([inputs for inputs, _ in second]))
    starts = rows[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert max(np.diff(starts)) <= 2 * min(np.diff(starts))
    everything = list(validation_windows(shards, context=8, batch_size=64, tokens=10**9))
    assert sum(targets.numel() for _, targets in everything) == 8 * (399 // 8 + 599 // 8)
    short = list(validation_windows([np.arange(5)], context=8, batch_size=3, tokens=100))
    assert [targets.tolist() for _, targets in short] == [[[1, 2, 3, 4]]]
    assert list(validation_windows([np.arange(1)], context=8, batch_size=3, tokens=100)) == []


# ----------------------------------------------------------------------------------------------------------------
# Schedule


def rates(steps: int, warmup: int, decay: float) -> list[float]:
    budget = Budget(steps, None)
    return [
        multiplier(step, budget.progress(step, 0.0), warmup_steps=warmup, decay_fraction=decay) for step in range(steps)
    ]


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    found = rates(100, 9, 0.5)
    assert found[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert set(found[9:51]) == {1.0}
    assert np.diff(found[50:]) == pytest.approx([-0.02] * 49)
    assert found[-1] == pytest.approx(0.02)
    assert set(rates(20, 0, 0.0)) == {1.0}
    assert rates(4, 0, 1.0) == pytest.approx([1.0, 0.75, 0.5, 0.25])


@given(st.integers(1, 300), st.integers(0, 300), st.floats(0, 1))
def test_the_rate_is_a_share_of_the_peak_and_never_nothing(steps: int, warmup: int, decay: float) -> None:
    assert all(0 < rate <= 1 for rate in rates(steps, warmup, decay))


def test_the_bound_that_is_nearer_decides() -> None:
    both = Budget(10, 100.0)
    assert both.progress(5, 20.0) == 0.5
    assert both.progress(5, 70.0) == 0.7
    assert both.progress(12, 0.0) == both.progress(0, 300.0) == 1.0
    assert Budget(None, 10.0).progress(10**9, 5.0) == 0.5
    assert Budget(None, None).progress(5, 5.0) == 0.0


# ----------------------------------------------------------------------------------------------------------------
# Optimizer


def conditioned(rows: int, columns: int, least: float) -> Tensor:
    """A matrix whose singular values run from 1 down to `least`, evenly in their logarithm."""
    generator = torch.Generator().manual_seed(rows + columns)
    small = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, small, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, small, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, math.log10(least), small, dtype=torch.float64)
    return ((left * values) @ right.T).float()


SHAPES = [(48, 48), (96, 24), (24, 96), (1, 40), (40, 1), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_out_near_one_and_directions_stay(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrices = torch.stack([conditioned(*shape, least) for least in (1.0, 0.1, 0.01)])
    found = orthogonalize(matrices.to(dtype))
    assert found.dtype == dtype
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found.float())
    assert values.min() >= 0.7
    assert values.max() <= 1.15
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.linalg.matrix_norm(found.float() - left @ right, 2).max() <= 0.35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("least", [1e-3, 1e-5, 1e-7])
def test_ill_conditioned_matrices_come_out_bounded(least: float, dtype: torch.dtype) -> None:
    values = torch.linalg.svdvals(orthogonalize(conditioned(64, 32, least)[None].to(dtype)).float())[0]
    assert values.max() <= 1.15
    great = conditioned(64, 32, least).to(dtype).float()
    count = int((torch.linalg.svdvals(great) >= 0.01).sum())
    assert values[:count].min() >= 0.7


def test_a_matrix_of_rank_one_stays_one() -> None:
    single = torch.outer(conditioned(64, 32, 0.1)[:, 0], conditioned(64, 32, 0.1)[0])
    values = torch.linalg.svdvals(orthogonalize(single[None]))[0]
    assert 0.7 <= values[0] <= 1.15
    assert values[1:].max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-100, -60, -50, -40, 40, 60, 120])
def test_the_scale_of_a_gradient_changes_nothing(exponent: int, dtype: torch.dtype) -> None:
    """Powers of two are exact, so the same bits come out; a momentum that decays passes all scales."""
    matrix = conditioned(24, 16, 0.1)[None].to(dtype)
    assert torch.equal(orthogonalize(matrix * 2.0**exponent), orthogonalize(matrix))
    mixed = torch.cat([matrix * 2.0**exponent, matrix])  # and neighbours in a stack do not touch each other
    assert torch.equal(orthogonalize(mixed)[0], orthogonalize(mixed)[1])
    assert not orthogonalize(torch.zeros(2, 3, 5, dtype=dtype)).any()


def test_a_gradient_that_vanishes_leaves_the_weights_finite() -> None:
    weight = nn.Parameter(conditioned(12, 8, 0.1))
    muon = Muon({"w": weight}, weight_decay=0.0, dtype=torch.float32)
    weight.grad = conditioned(12, 8, 0.5)
    for _ in range(1500):  # 0.95^1500 of the first gradient is 4e-34
        muon.step(1e-3)
        weight.grad = torch.zeros_like(weight)
    assert weight.isfinite().all()


def trained(optimizer: Optimizer, model: Decoder, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1
        optimizer.step(0.02, 0.003)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_adamw_half_is_torch_s_own(kind: str, weight_decay: float) -> None:
    model, twin = fresh(), fresh()
    optimizer = Optimizer(model, kind=kind, weight_decay=weight_decay, dtype=torch.float32)
    rest = {name: p for name, p in twin.named_parameters() if kind == "adamw" or not is_matrix(name, p)}
    decayed = [p for p in rest.values() if p.ndim == 2 and kind == "adamw"]
    kept = [p for p in rest.values() if p.ndim == 1 or kind == "muon"]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    reference = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.003, betas=BETAS, eps=EPS)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        optimizer.step(0.02, 0.003)
        reference.step()
    ours = dict(model.named_parameters())
    for name, parameter in rest.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-5, atol=1e-6)


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else() -> None:
    for family in FAMILIES:
        model = fresh(family)
        optimizer = Optimizer(model, kind="muon", weight_decay=0.0, dtype=torch.float32)
        names = dict(model.named_parameters())
        matrices = set(optimizer.muon.parameters)
        assert matrices
        assert all(names[name].ndim == 2 and (".layers." in name or ".h." in name) for name in matrices)
        assert set(names) - matrices == set(optimizer.rest)
        assert any("wte" in name or "embed_tokens" in name for name in optimizer.rest)


def test_muon_s_step_is_nesterov_s_momentum_orthogonalised() -> None:
    weight = nn.Parameter(conditioned(12, 3, 0.5))
    before = weight.detach().clone()
    muon = Muon({"w": weight}, weight_decay=0.5, dtype=torch.float32)
    weight.grad = conditioned(12, 3, 0.2)
    muon.step(0.1)
    direction = orthogonalize(weight.grad[None])[0]  # one step: momentum and gradient point the same way
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5) - 0.1 * 2 * direction)  # sqrt(12 / 3) = 2
    torch.testing.assert_close(muon.momentum["w"], 0.05 * weight.grad)


def test_clipping_gives_the_norm_and_scales_down_only() -> None:
    model = fresh()
    optimizer = Optimizer(model, kind="muon", weight_decay=0.0, dtype=torch.float32)

    def clipped(size: float, largest: float) -> tuple[float, float]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, size)
        norm = float(optimizer.clip(largest))
        left = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return norm, float(left.norm())

    count = sum(p.numel() for p in model.parameters()) ** 0.5
    assert clipped(2.0, 1.0) == pytest.approx((2 * count, 1.0), rel=1e-4)
    assert clipped(0.5 / count, 1.0) == pytest.approx((0.5, 0.5), rel=1e-4)
    assert clipped(2.0, 0.0) == pytest.approx((2 * count, 2 * count), rel=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_comes_back_from_safetensors_bit_for_bit(tmp_path: Path, family: str, kind: str) -> None:
    model = fresh(family)
    optimizer = Optimizer(model, kind=kind, weight_decay=0.1, dtype=torch.float32)
    trained(optimizer, model, 3)
    save_tensors(optimizer.state(), tmp_path / "optimizer.safetensors")
    other = fresh(family, seed=1)
    other.load_state_dict(model.state_dict())
    again = Optimizer(other, kind=kind, weight_decay=0.1, dtype=torch.float32)
    again.load_state(load_tensors(tmp_path / "optimizer.safetensors"))
    assert set(again.state()) == set(optimizer.state())
    for name, tensor in optimizer.state().items():
        assert torch.equal(again.state()[name], tensor), name
        assert again.state()[name].data_ptr() != tensor.data_ptr()
    for each, its in ((optimizer, model), (again, other)):
        trained(each, its, 3, seed=5)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_that_does_not_fit_is_refused_by_name(kind: str) -> None:
    model = fresh()
    optimizer = Optimizer(model, kind=kind, weight_decay=0.0, dtype=torch.float32)
    trained(optimizer, model, 1)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    for name in state:
        if name.endswith(("q_proj.weight", "norm.weight", "embed_tokens.weight")):
            with pytest.raises(DataError, match=f"has no {name}$"):
                optimizer.load_state({key: value for key, value in state.items() if key != name})
            wrong = {**state, name: torch.zeros(3, 5)}
            with pytest.raises(DataError, match=rf"{name} has shape \[3, 5\], not \["):
                optimizer.load_state(wrong)


# ----------------------------------------------------------------------------------------------------------------
# The loop


class Course:
    """A loop over a tiny decoder and random ids, and how it is to go."""

    def __init__(self, model: Decoder | None = None, **changes: Any) -> None:
        self.model = model or fresh()
        self.state = TrainingState()
        self.stopped = False
        self.losses: Callable[[], tuple[Any, ...] | None] = lambda: (3.0 - 0.1 * self.state.step, 1.0)
        self.settings = LoopSettings(
            **{
                "budget": Budget(6, None),
                "matrix_rate": 0.02,
                "rest_rate": 0.008,
                "warmup_steps": 0,
                "decay_fraction": 0.5,
                "grad_accumulation": 1,
                "max_grad_norm": 1.0,
                "eval_every": 2,
                "save_every": 3,
                "patience": 0,
                **changes,
            }
        )
        self.rows = 8 // self.settings.grad_accumulation
        self.optimizer = Optimizer(self.model, kind="muon", weight_decay=0.0, dtype=torch.float32)

    def batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of step n are the same however they are cut; the targets that count are not equally many."""
        for number in itertools.count(first):
            step, part = divmod(number, self.settings.grad_accumulation)
            ids = torch.randint(0, VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(step))
            targets = ids[:, 1:].clone()
            for row in range(8):
                targets[row, row:] = IGNORED
            mine = slice(part * self.rows, (part + 1) * self.rows)
            yield ids[mine, :-1], targets[mine]

    def loss(self, inputs: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        return head_loss(self.model.hidden(inputs), self.model.head, targets, scale)

    def run(self, stopping: Callable[[], bool] | None = None) -> Iterator[TrainingEvent]:
        return Loop(
            model=self.model,
            optimizer=self.optimizer,
            settings=self.settings,
            state=self.state,
            batches=self.batches,
            loss=self.loss,
            count_targets=lambda targets: int((targets != IGNORED).sum()),
            validate=lambda: None if (found := self.losses()) is None else Validation(*found),
            stopping=stopping or (lambda: self.stopped),
        ).run()

    def story(self, **details: Any) -> list[str]:
        """The events in order: `step 1`, `validation 2`, ..., the end with its reason."""
        return [f"{event.event} {event.reason or event.step}" for event in self.run(**details)]


def test_validation_comes_before_the_checkpoint_and_the_end_last() -> None:
    assert Course().story() == [
        *("step 1", "step 2", "validation 2", "step 3", "checkpoint 3"),
        *("step 4", "validation 4", "step 5", "step 6", "validation 6", "checkpoint 6", "end steps"),
    ]
    assert Course(eval_every=100, save_every=100, budget=Budget(2, None)).story() == [
        *("step 1", "step 2", "validation 2", "checkpoint 2", "end steps")
    ]
    nothing = Course()
    nothing.losses = lambda: None
    assert nothing.story() == [f"step {n}" for n in (1, 2, 3)] + ["checkpoint 3"] + [
        *("step 4", "step 5", "step 6", "checkpoint 6", "end steps")
    ]


def test_events_carry_what_a_reader_needs() -> None:
    events = list(Course().run())
    steps = [event for event in events if event.event == "step"]
    assert [event.tokens for event in steps] == [28 * step for step in range(1, 7)]  # 0 + 1 + ... + 7 targets count
    assert all(event.total_steps == 6 and event.gradient_norm and event.tokens_per_second for event in steps)
    assert [event.progress for event in steps] == pytest.approx([step / 6 for step in range(1, 7)])
    assert steps[0].loss == pytest.approx(math.log(VOCABULARY), abs=0.05)
    assert [event.learning_rate for event in steps] == pytest.approx([0.02] * 4 + [0.02 * 2 / 3, 0.02 / 3])
    assert all(a.elapsed_seconds <= b.elapsed_seconds for a, b in itertools.pairwise(events))
    assert [event.best for event in events if event.event == "validation"] == [True] * 3


def test_a_step_in_pieces_equals_the_step_in_one() -> None:
    """By target tokens, of which the pieces have unequally many: an average of the pieces' means would be wrong."""
    courses = [Course(grad_accumulation=pieces, max_grad_norm=0.0) for pieces in (1, 2, 8)]
    stories = [[event for event in course.run() if event.event == "step"] for course in courses]
    for story in stories[1:]:
        for ours, expected in zip(story, stories[0], strict=True):
            assert ours.tokens == expected.tokens
            assert ours.loss == pytest.approx(expected.loss, rel=1e-4)
            assert ours.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-3)
    inputs, targets = next(courses[0].batches(0))
    logits = fresh()(inputs).detach()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    assert stories[0][0].loss == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_of_pieces_is_cross_entropy_with_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcli.training.losses._CHUNK_BYTES", 4 * 16 * VOCABULARY)  # 16 rows a piece
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 9, 16, generator=generator, requires_grad=True)
    head = torch.randn(VOCABULARY, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (5, 9), generator=generator)
    targets[0] = IGNORED
    loss = head_loss(hidden, head, targets, torch.tensor(1 / 36))
    loss.backward()
    ours = hidden.grad, head.grad
    hidden.grad = head.grad = None
    expected = nn.functional.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours[0], hidden.grad)
    torch.testing.assert_close(ours[1], head.grad)
    assert summed_loss(hidden, head, targets) == pytest.approx(36 * expected.item(), rel=1e-5)


def test_a_resumed_loop_equals_the_straight_one_bit_for_bit() -> None:
    straight = Course(grad_accumulation=2)
    expected = list(straight.run())
    for stop in range(1, 7):
        first = Course(grad_accumulation=2)
        told = []
        for event in first.run(stopping=lambda first=first, stop=stop: first.state.step >= stop):
            told.append(event)
        second = Course(grad_accumulation=2)
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state(first.optimizer.state())
        second.state = TrainingState.from_json(first.state.to_json())
        told += second.run()
        for name, tensor in straight.model.state_dict().items():
            assert torch.equal(second.model.state_dict()[name], tensor), (stop, name)
        for kind in ("step", "validation"):
            lines = [
                [
                    (e.step, e.tokens, e.loss, e.learning_rate, e.gradient_norm, e.best)
                    for e in events
                    if e.event == kind
                ]
                for events in (told, expected)
            ]
            assert lines[0] == lines[1], stop
        ours, theirs = second.state.to_json(), straight.state.to_json()
        assert {**ours, "elapsed_seconds": 0} == {**theirs, "elapsed_seconds": 0}


def test_patience_ends_it_and_a_resumed_run_stays_ended() -> None:
    course = Course(patience=2, budget=Budget(100, None))
    course.losses = lambda: ({2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0}[course.state.step], 1.0)
    assert course.story()[-4:] == ["step 8", "validation 8", "checkpoint 8", "end patience"]
    assert (course.state.best_loss, course.state.best_step) == (2.0, 4)
    assert course.story() == ["end patience"]
    course.settings = dataclasses.replace(course.settings, patience=0, budget=Budget(9, None))
    course.losses = lambda: (1.0, 1.0)
    assert course.story() == ["step 9", "validation 9", "checkpoint 9", "end steps"]


def test_a_finished_run_that_is_resumed_does_nothing_more() -> None:
    course = Course()
    course.story()
    weights = {name: tensor.clone() for name, tensor in course.model.state_dict().items()}
    assert course.story() == ["end steps"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in course.model.state_dict().items())
    course.settings = dataclasses.replace(course.settings, budget=Budget(7, None))
    assert course.story() == ["step 7", "validation 7", "checkpoint 7", "end steps"]


def test_a_stop_saves_without_validating_first() -> None:
    course = Course()
    assert course.story(stopping=lambda: course.state.step >= 4) == [
        *("step 1", "step 2", "validation 2", "step 3", "checkpoint 3", "step 4", "checkpoint 4", "end stopped")
    ]
    assert course.story(stopping=lambda: False)[:3] == ["validation 4", "step 5", "step 6"]
    assert Course().story(stopping=lambda: True) == ["end stopped"]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_stop_during_validation_trains_no_step_more_and_validates_after_the_resume(step: int) -> None:
    straight = Course()
    straight.story()
    course = Course()

    def cut() -> tuple[float, float] | None:
        course.stopped = course.state.step == step
        return None if course.stopped else (3.0 - 0.1 * course.state.step, 1.0)

    course.losses = cut
    assert course.story()[-3:] == [f"step {step}", f"checkpoint {step}", "end stopped"]
    course.stopped, course.losses = False, lambda: (3.0 - 0.1 * course.state.step, 1.0)
    story = course.story()
    assert story[0] == f"validation {step}"
    # At the end the checkpoint is written once more, as it now knows of its validation.
    assert story[-2:] == ["checkpoint 6", "end steps"]
    assert {**course.state.to_json(), "elapsed_seconds": 0} == {**straight.state.to_json(), "elapsed_seconds": 0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(value: float) -> None:
    course = Course()
    sound = course.loss
    course.loss = lambda *batch: sound(*batch) * (value if course.state.step == 4 else 1.0)  # type: ignore[method-assign]
    events = course.run()
    while course.state.step < 4:
        event = next(events)
    assert next(events).event == "validation"
    weights = {name: tensor.clone() for name, tensor in course.model.state_dict().items()}
    with pytest.raises(NotFiniteError, match=r"the (loss|gradient) is not finite at step 5") as caught:
        next(events)
    assert caught.value.exit_code == 1
    assert (event.step, course.state.step) == (4, 4)
    assert all(torch.equal(weights[name], tensor) for name, tensor in course.model.state_dict().items())


def test_a_validation_that_is_not_finite_stops_it() -> None:
    course = Course()
    course.losses = lambda: (math.nan, math.nan)
    with pytest.raises(NotFiniteError, match="the validation loss is not finite at step 2"):
        course.story()


def test_weights_that_are_ruined_are_never_called_a_checkpoint() -> None:
    """The step that ruins them has a sound loss: only the next one would show it, after the checkpoint."""
    course = Course(save_every=1, eval_every=100, matrix_rate=1e30)
    events = course.run()
    assert next(events).event == "step"
    with pytest.raises(NotFiniteError, match="the norm of the weights is not finite at step 1"):
        next(events)


def test_a_budget_in_seconds_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a second from each look to the next
    monkeypatch.setattr("llmcli.training.loop.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    course = Course(budget=Budget(None, 10.0), decay_fraction=1.0, eval_every=100, save_every=100)
    events = list(course.run())
    assert [f"{event.event} {event.reason or event.step}" for event in events] == [
        *("step 1", "step 2", "step 3", "step 4", "step 5", "validation 5", "checkpoint 5", "end seconds")
    ]
    assert [event.elapsed_seconds for event in events[:5]] == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert [event.learning_rate for event in events[:5]] == pytest.approx([0.02, 0.016, 0.012, 0.008, 0.004])
    assert [event.elapsed_seconds for event in course.run()] == [11.0]  # what was used up stays used up


def test_the_state_is_plain_json_and_comes_back() -> None:
    state = TrainingState(step=3, tokens=9, elapsed_seconds=1.5, best_loss=math.inf, validated_step=2)
    assert state.to_json()["best_loss"] is None
    assert TrainingState.from_json({**state.to_json(), "machine": {"device": "cpu"}}) == state
    assert TrainingState.from_json(dataclasses.replace(state, best_loss=2.5).to_json()).best_loss == 2.5


# ----------------------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_the_parameters_of_the_real_model(family: str, tied: bool) -> None:
    config = PretrainConfig(family=family, hidden_size=48, heads=4, layers=3, context=16, tie_embeddings=tied)
    settled = settle(config, 300, 10_000)
    model = Decoder(settled.shape)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert settled.plan.parameters == count
    assert settled.plan.embedding_parameters == 300 * 48 * (1 if tied else 2)
    optimizer = Optimizer(model.init_weights(), kind="muon", weight_decay=0.0, dtype=torch.float32)
    trained(optimizer, model, 1)
    state = sum(4 * tensor.numel() for name, tensor in optimizer.state().items() if not name.startswith("step."))
    assert settled.plan.optimizer_bytes == state
    assert settled.plan.weight_bytes == settled.plan.gradient_bytes == 4 * count
    assert settled.plan.memory_bytes > 8 * count + state
    assert settled.plan.activation_bytes > 0
    assert settled.plan.checkpoint_bytes > 4 * count + state


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_its_name_and_the_table_say(name: str) -> None:
    preset = PRESETS[name]
    settled = settle(PretrainConfig(preset=name), preset.vocab_size, 10**9)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Decoder(settled.shape).parameters())
    assert settled.plan.parameters == count == count_parameters(preset)
    assert round(count / 1e6) == pytest.approx(int(name[:-1]), rel=0.04)
    row = next(line for line in preset_table().splitlines() if line.split()[0] == name)
    assert row.split()[1] == f"{count / 1e6:.1f}"
    assert row.split()[3:] == [
        *map(str, (preset.layers, preset.hidden_size, preset.heads, preset.kv_heads, preset.ffn_size)),
        *map(str, (preset.context, preset.batch_size, preset.vocab_size)),
    ]


SMALL: dict[str, Any] = {"hidden_size": 16, "heads": 2, "layers": 2, "context": 8, "batch_size": 4}


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_tokens": 100}, 4),
        ({"epochs": 1.5}, 47),
        ({"max_steps": 7, "max_tokens": 100, "epochs": 9.0}, 4),
        ({"max_seconds": 60.0}, None),
        ({"max_seconds": 60.0, "max_steps": 7}, 7),
        ({}, 313),
        ({"epochs": 1e-9}, 1),
    ],
)
def test_the_length_is_the_least_that_was_asked_for(length: Mapping[str, Any], steps: int | None) -> None:
    plan = settle(PretrainConfig(**SMALL, **length), 300, 1000).plan
    assert plan.steps == steps
    assert plan.tokens_per_step == 32
    assert plan.train_tokens == (steps and 32 * steps)
    assert (plan.estimated_seconds or 0) > 0
    assert plan.flops_per_step > 6 * plan.parameters * 32


def test_nothing_is_left_open() -> None:
    settled = settle(PretrainConfig(max_steps=100), 4096, 10**6)
    open_ones = {name for name, value in vars(settled.config).items() if value is None or value == "auto"}
    assert open_ones == {"preset", "tokenizer", "max_tokens", "epochs", "max_seconds", "val_by"}
    assert settle(settled.config, 4096, 10**6) == settled
    longer = settle(dataclasses.replace(settled.config, max_steps=5000), 4096, 10**6).config
    assert dataclasses.replace(longer, max_steps=100) == settled.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "grad_accumulation": 4}, "batch_size: 6 rows cannot be worked off in 4 pieces"),
        ({"heads": 3}, "heads: 3 heads do not divide a width of 16"),
        ({"kv_heads": 4, "heads": 2}, "num_key_value_heads: 2 heads cannot share 4"),
        ({"family": "gpt2", "kv_heads": 1}, "kv_heads: gpt2 has a key/value head for each of its 2 heads"),
        ({"hidden_size": 6}, "head_dim: rotary positions need an even head size, got 3"),
        ({"preset": "5m"}, "preset: no preset '5m'; there are 1m, 4m"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(PretrainConfig(**{**SMALL, **changes}), 300, 1000)
    assert str(caught.value).startswith(message)


# ----------------------------------------------------------------------------------------------------------------
# The machine


def test_a_device_that_is_asked_for_and_missing_is_an_error_never_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(UsageError, match=f"no working {device} device was found"):
            machine.choose_device(device)
    assert machine.choose_device("auto") == machine.choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.choose_device("auto") == machine.choose_device("cuda") == "cuda"


CPUINFO = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse2 avx512f{extra}\nbugs\t\t: spectre_v1\n"


@pytest.mark.parametrize(
    ("content", "fast"),
    [
        (CPUINFO.format(extra=" avx512_bf16"), True),
        (CPUINFO.format(extra=" amx_tile amx_bf16 amx_int8"), True),
        (CPUINFO.format(extra=""), False),
        (CPUINFO.format(extra=" my_avx512_bf16x"), False),
        ("Features\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_bfloat16_is_fast_where_the_cpu_says_so(tmp_path: Path, content: str, fast: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(content)
    assert machine.has_fast_bfloat16(path) is fast
    assert not machine.has_fast_bfloat16(tmp_path / "nowhere")


def test_precision_is_what_pays_on_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_fast_bfloat16", lambda: True)
    assert machine.choose_precision("auto", "cpu", 512) == "bfloat16"
    assert machine.choose_precision("auto", "cpu", 32) == "float32"  # too narrow to pay
    assert machine.choose_precision("bfloat16", "cpu", 16) == "bfloat16"
    assert machine.choose_precision("float32", "cpu", 512) == "float32"
    assert machine.choose_precision("auto", "mps", 512) == "float32"
    monkeypatch.setattr(machine, "has_fast_bfloat16", lambda: False)
    assert machine.choose_precision("auto", "cpu", 512) == "float32"
    for supported, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert machine.choose_precision("auto", "cuda", 64) == expected


def test_compiling_is_chosen_where_there_is_a_compiler_and_time_to_earn_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(found: bool, choice: str, steps: int) -> bool:
        monkeypatch.setattr("llmcli.operations.pretrain_settings.compiler_found", lambda _device: found)
        settled = settle(PretrainConfig(preset="30m", device="cpu", compile=choice, max_steps=steps), 8192, 10**8)
        assert compile_pays(settled.plan) is (steps > 1000)
        assert settled.config.compile == ("on" if settled.machine.compile else "off")
        return settled.machine.compile

    assert compiled(True, "auto", 100_000)
    assert not compiled(False, "auto", 100_000)
    assert not compiled(True, "auto", 1)
    assert compiled(True, "on", 1)
    assert not compiled(True, "off", 100_000)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not machine.compiler_found("cpu")
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert machine.compiler_found("cpu")
    assert not machine.compiler_found("mps")


def test_memory_is_what_the_system_says() -> None:
    held = heap.resident_bytes()
    assert held is None or held > 10_000_000  # torch is loaded
    assert machine.choose_threads(3) == 3
    assert machine.choose_threads(None) >= 1


def test_the_best_is_judged_by_what_a_task_asks_for() -> None:
    course = Course(budget=Budget(6, None))
    course.losses = lambda: {2: (1.0, None, None, -0.5), 4: (3.0, None, None, -0.8), 6: (2.0, None, None, -0.7)}[
        course.state.step
    ]
    course.story()
    assert (course.state.best_loss, course.state.best_step) == (-0.8, 4)
