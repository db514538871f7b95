"""Sampling: every setting against transformers' processors, what is drawn against its probabilities, and odd logits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcli import config as configs
from llmcli.config import SamplingConfig
from llmcli.errors import ConfigError, LlmcliError
from llmcli.runtime.sampling import Choice, Sampler, Vector, distribution, most_probable

PLAIN = SamplingConfig(temperature=1.0, top_p=1.0)


def logits(size: int = 50, seed: int = 0, spread: float = 2.0) -> Vector:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def settings(**values: Any) -> SamplingConfig:
    made = SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **values})
    configs.check(made)
    return made


def full(scores: Vector, config: SamplingConfig) -> np.ndarray:
    """The probability of every token."""
    ids, probabilities = distribution(scores, config)
    found = np.zeros(len(scores))
    found[ids] = probabilities
    return found


def reference(scores: Vector, config: SamplingConfig, seen: list[int]) -> np.ndarray:
    """transformers' processors in the order in which `generate` puts them."""
    from transformers import generation as theirs

    steps: list[Any] = []
    if config.repetition_penalty != 1:
        steps.append(theirs.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    steps.append(theirs.TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k:
        steps.append(theirs.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(theirs.TopPLogitsWarper(config.top_p))
    if config.min_p:
        steps.append(theirs.MinPLogitsWarper(config.min_p))
    found = torch.from_numpy(scores)[None].double()
    for step in steps:
        found = step(torch.tensor([seen]), found)
    return torch.softmax(found, -1)[0].numpy()  # type: ignore[no-any-return]


GRID = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), values, strict=True))
    for values in itertools.product((0.3, 1.0, 2.5), (0, 1, 7, 50, 999), (0.01, 0.5, 0.95, 1.0), (0.0, 0.2), (1.0, 1.7))
]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_mix_of_settings_gives_transformers_distribution(seed: int) -> None:
    scores, seen = logits(seed=seed), [3, 3, 9, 14, int(logits(seed=seed).argmax())]
    assert (scores[seen] > 0).any()
    assert (scores[seen] < 0).any()
    for values in GRID:
        config = settings(**values)
        expected = reference(scores, config, seen)
        sampler = Sampler(config, seen=seen)
        found = full(sampler._penalised(scores), config)
        assert np.array_equal(found > 0, expected > 0), values
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12, err_msg=str(values))


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.floats(0.01, 5),
    st.integers(0, 45),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_something_always_stays_and_the_likeliest_is_among_it(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = np.array(values, np.float32)
    config = settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, probabilities = distribution(scores, config)
    assert probabilities.sum() == pytest.approx(1)
    assert scores[ids].max() == scores.max()
    assert sorted(set(ids.tolist())) == ids.tolist()
    assert len(ids) <= (top_k or len(scores))
    assert Sampler(config).choose(scores).id in ids


# ----------------------------------------------------------------------------------------------------------------
# One setting at a time, by hand


def test_top_p_keeps_the_fewest_tokens_that_reach_the_share() -> None:
    scores = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    for share, kept in ((0.3, [1]), (0.51, [1, 3]), (0.76, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        assert distribution(scores, settings(top_p=share))[0].tolist() == kept


def test_top_p_looks_beyond_the_head_of_a_large_vocabulary() -> None:
    flat = logits(60_000, spread=0.1)
    ids, _ = distribution(flat, settings(top_p=0.9))
    share = np.sort(full(flat, PLAIN))[::-1].cumsum()
    assert len(ids) == int(share.searchsorted(0.9)) + 1 > 50_000
    assert len(distribution(flat, settings(top_p=0.001))[0]) < 512


def test_ties_at_the_border_go_to_the_first() -> None:
    equal = np.zeros(6, np.float32)
    assert distribution(equal, settings(top_k=2))[0].tolist() == [0, 1]
    assert distribution(equal, settings(top_p=0.5))[0].tolist() == [0, 1, 2]
    assert distribution(equal, settings(min_p=1.0))[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert Sampler(settings(temperature=0.0)).choose(equal).id == 0
    assert [item for item, _ in Sampler(PLAIN).choose(equal, top=3).top] == [0, 1, 2]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 35))
def test_most_probable_is_a_stable_sort(values: list[int], count: int) -> None:
    expected = sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]
    assert most_probable(np.array(values, np.float32), count).tolist() == expected


def test_temperature_0_is_greedy_whatever_else_is_set() -> None:
    for seed in range(5):
        scores = logits(seed=seed)
        config = settings(temperature=0.0, top_k=5, top_p=0.1, min_p=0.3)
        assert {Sampler(config, seed=drawn).choose(scores).id for drawn in range(5)} == {int(scores.argmax())}


def test_a_penalty_grows_with_what_was_chosen() -> None:
    sampler = Sampler(settings(temperature=0.0, repetition_penalty=4.0), seen=[0])
    scores = np.array([5.0, 4.0, 3.0, -1.0], np.float32)
    # 0 is seen: 1.25; 1 wins, then has 1; 2 wins, then has 0.75; then 0 again, for ever.
    assert [sampler.choose(scores).id for _ in range(5)] == [1, 2, 0, 0, 0]
    negative = np.array([-1.0, -3.0], np.float32)
    assert Sampler(settings(temperature=0.0, repetition_penalty=4.0), seen=[0]).choose(negative).id == 1
    assert Sampler(settings(temperature=0.0, repetition_penalty=0.25), seen=[1]).choose(negative).id == 1
    assert scores.tolist() == [5.0, 4.0, 3.0, -1.0]  # the caller's stay as they are


# ----------------------------------------------------------------------------------------------------------------
# What is drawn


@pytest.mark.parametrize("values", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_tokens_come_as_often_as_they_are_probable(values: dict[str, float]) -> None:
    scores, config, times = logits(12), settings(**values), 6000
    sampler = Sampler(config, seed=11)
    counts = np.bincount([sampler.choose(scores).id for _ in range(times)], minlength=12)
    expected = full(scores, config) * times
    assert not counts[expected == 0].any()
    kept = expected > 5
    squares = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = max(int(kept.sum()) - 1, 1)
    assert squares < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations of chi-square


def test_a_seed_is_repeated_and_another_is_not() -> None:
    def drawn(seed: int, stream: tuple[int, ...] = ()) -> list[int]:
        sampler = Sampler(PLAIN, seed=seed, stream=stream)
        return [sampler.choose(logits(spread=0.1)).id for _ in range(20)]

    assert drawn(7) == drawn(7)
    assert drawn(2**63 - 1) == drawn(2**63 - 1)
    streams = [(index, sample) for index in range(4) for sample in range(3)]
    rows = [tuple(drawn(seed, stream)) for seed in (0, 1, 2**40) for stream in streams]
    assert len(set(rows)) == len(rows)


def test_other_rows_change_nothing_in_a_rows_draws() -> None:
    alone, mixed, other = (Sampler(PLAIN, seed=3, stream=(row,)) for row in (0, 0, 1))
    expected = [alone.choose(logits(seed=step)).id for step in range(10)]
    found = []
    for step in range(10):
        other.choose(logits(seed=100 + step))
        found.append(mixed.choose(logits(seed=step)).id)
    assert found == expected


# ----------------------------------------------------------------------------------------------------------------
# Log-probabilities


def test_logprobs_are_those_before_any_setting() -> None:
    scores = logits()
    expected = torch.log_softmax(torch.from_numpy(scores).double(), -1).numpy()
    config = settings(temperature=0.3, top_k=3, repetition_penalty=2.0)
    choice = Sampler(config, seed=1, seen=[int(scores.argmax())]).choose(scores, top=5)
    assert choice.logprob == pytest.approx(expected[choice.id])
    order = np.argsort(-expected)[:5]
    assert [item for item, _ in choice.top] == order.tolist()
    assert [value for _, value in choice.top] == pytest.approx(expected[order].tolist())
    bare = Sampler(config, seed=1, seen=[int(scores.argmax())]).choose(scores, top=0)
    assert (bare.id, bare.logprob, bare.top) == (choice.id, choice.logprob, ())
    assert Sampler(config, seed=1, seen=[int(scores.argmax())]).choose(scores) == Choice(choice.id, 0.0)
    assert len(Sampler(PLAIN).choose(scores, top=1000).top) == len(scores)
    everything = Sampler(PLAIN).choose(scores, top=1000).top
    assert sum(np.exp(value) for _, value in everything) == pytest.approx(1)


# ----------------------------------------------------------------------------------------------------------------
# Odd logits and settings


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_logits_that_are_no_numbers_are_an_error(odd: float, temperature: float, penalty: float) -> None:
    scores = logits()
    scores[3] = odd
    with pytest.raises(LlmcliError, match="not finite"):
        Sampler(settings(temperature=temperature, repetition_penalty=penalty), seen=[3]).choose(scores)
    with pytest.raises(LlmcliError, match="not finite"):
        Sampler(settings(temperature=temperature)).choose(np.full(4, -np.inf, np.float32))


def test_tokens_of_minus_infinity_are_never_drawn() -> None:
    scores = np.full(40, -np.inf, np.float32)
    scores[[5, 31]] = 1.0
    for values in ({}, {"top_k": 10}, {"top_p": 0.99}, {"min_p": 0.5}, {"repetition_penalty": 3.0}):
        sampler = Sampler(settings(**values), seed=2, seen=[0, 5])
        assert {sampler.choose(scores, top=40).id for _ in range(60)} == {5, 31}


@pytest.mark.parametrize("temperature", [1e-320, 1e-12, 1e-3, 100.0])
def test_temperatures_at_the_ends_of_the_range_work_without_a_warning(temperature: float) -> None:
    scores = logits()
    chosen = Sampler(settings(temperature=temperature), seed=1).choose(scores).id
    assert chosen == scores.argmax() or temperature == 100
    found = full(scores, settings(temperature=temperature))
    assert found.sum() == pytest.approx(1)
    assert found.max() < 0.05 or temperature < 100


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_penalties_at_the_ends_of_the_range_do_not_overflow(penalty: float) -> None:
    scores = np.array([3e38, -3e38, 1.0, 0.0], np.float32)
    sampler = Sampler(settings(repetition_penalty=penalty), seen=[0, 1, 2, 3])
    assert sampler.choose(scores, top=4).id == 0
    assert Sampler(PLAIN).choose(scores, top=4).top[-1][1] == pytest.approx(-6e38, rel=1e-2)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-45},  # a logit divided by it is infinite
        {"repetition_penalty": float("inf")},
        {"temperature": "1"},
        {"temperature": True},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        settings(**values)
