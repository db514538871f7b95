"""Decoding, scoring and searching by a session of whole rows, which knows no cache and so cannot err with one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_model import make_model, make_seven

from llmcli.config import SamplingConfig
from llmcli.errors import LlmcliError, UsageError
from llmcli.models.folder import load_model
from llmcli.runtime import scoring
from llmcli.runtime.decoding import Finished, Row, Token, decode
from llmcli.runtime.sampling import Sampler
from llmcli.runtime.scoring import Window, score_windows, windows
from llmcli.runtime.search import Rules, Step, search
from llmcli.runtime.session import Ids, Logits, Mask
from llmcli.runtime.torch_session import TorchSession

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = SamplingConfig(temperature=0)
VOCABULARY = 12


def mixed(ids: Sequence[int]) -> Logits:
    """Logits that depend on every token of a row."""
    return np.random.default_rng(list(ids)).normal(0, 2, VOCABULARY).astype(np.float32)


def counting(ids: Sequence[int]) -> Logits:
    """After n comes n + 1."""
    found = np.zeros(VOCABULARY, np.float32)
    found[(ids[-1] + 1) % VOCABULARY] = 9
    return found


class WholeRows:
    """A `Session` that keeps its rows as lists and computes logits from the whole of them."""

    def __init__(self, rule: Callable[[Sequence[int]], Logits] = mixed, context: int = 1000) -> None:
        self.rule, self.context, self.vocab_size = rule, context, VOCABULARY
        self.rows: list[list[int]] = []
        self.started = self.fed = 0

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def start(self, prompts: Sequence[Sequence[int]]) -> Logits:
        self.rows, self.started = [list(prompt) for prompt in prompts], self.started + len(prompts)
        return np.stack([self.rule(row) for row in self.rows])

    def feed(self, ids: Ids, keep: int = 1) -> Logits:
        assert ids.shape[0] == len(self.rows)
        self.fed += ids.size
        found = []
        for row, new in zip(self.rows, ids.tolist(), strict=True):
            if len(row) + len(new) > self.context:
                raise UsageError("the context is full")
            row += new
            found.append([self.rule(row[: len(row) - back]) for back in reversed(range(keep))])
        return np.array(found, np.float32)

    def rewind(self, lengths: int | Sequence[int]) -> None:
        wanted = [lengths] * len(self.rows) if isinstance(lengths, int) else lengths
        self.rows = [row[:length] for row, length in zip(self.rows, wanted, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [list(self.rows[row]) for row in rows]

    def replace(self, row: int, prompt: Sequence[int]) -> Logits:
        self.rows[row], self.started = list(prompt), self.started + 1
        return self.rule(self.rows[row])

    def copy(self, source: int, target: int, length: int) -> None:
        assert length <= len(self.rows[source])
        self.rows[target] = self.rows[source][:length]

    def score(self, ids: Ids, wanted: Mask) -> Logits:
        assert ids.shape[1] <= self.context + 1
        found = np.zeros(wanted.shape, np.float32)
        for row, place in zip(*np.nonzero(wanted), strict=True):
            found[row, place] = logprobs(self.rule(ids[row, : place + 1].tolist()))[ids[row, place + 1]]
        return found

    def close(self) -> None:
        self.rows = []


def logprobs(logits: Logits) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()  # type: ignore[no-any-return]


def row(prompt: Sequence[int], count: int = 5, seed: int | None = None, **details: object) -> Row:
    """A row that is greedy, or draws by the seed."""
    sampler = Sampler(GREEDY) if seed is None else Sampler(SamplingConfig(), seed=seed)
    return Row(prompt, sampler, count, **details)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> TorchSession:
    """A tiny random decoder of seven tokens and a context of 32."""
    place = tmp_path_factory.mktemp("real")
    return TorchSession(load_model(make_model(place / "model", make_seven(place / "tokenizer"))))


# ----------------------------------------------------------------------------------------------------------------
# Decoding


def test_a_row_ends_by_its_length_an_end_or_the_context() -> None:
    rows = [
        row([3], 4),
        row([3], 9, ends=frozenset({6, 11})),
        row([9], 9, ends=frozenset({0})),
        row([0], 1, ends=frozenset({1})),
    ]
    list(decode(WholeRows(counting), rows))
    assert [(item.ids, item.finish_reason) for item in rows] == [
        ([4, 5, 6, 7], "length"),
        ([4, 5], "stop"),
        ([10, 11], "stop"),
        ([], "stop"),
    ]


@pytest.mark.parametrize(("prompt", "count"), [(1, 8), (5, 4), (7, 2), (8, 1)])
def test_the_context_is_filled_to_its_end_and_one_token_more(prompt: int, count: int) -> None:
    """The last token is never fed, so it needs no room."""
    session = WholeRows(counting, context=8)
    rows = [row([0] * prompt, 100)]
    list(decode(session, rows))
    assert (len(rows[0].ids), rows[0].finish_reason) == (count, "cut")
    exact = [row([0] * prompt, count)]
    list(decode(session, exact))
    assert exact[0].finish_reason == "length"  # it had what it wanted


def test_each_row_ends_once_after_its_last_token() -> None:
    rows = [row([number], 1 + number % 4, seed=number) for number in range(7)]
    told: dict[int, list[str]] = {number: [] for number in range(7)}
    ids: dict[int, list[int]] = {number: [] for number in range(7)}
    for event in decode(WholeRows(), rows):
        told[event.row].append(type(event).__name__)
        if isinstance(event, Token):
            ids[event.row].append(event.choice.id)
    for number, item in enumerate(rows):
        assert told[number] == ["Token"] * len(item.ids) + ["Finished"]
        assert ids[number] == item.ids


def test_who_reads_a_row_may_end_it() -> None:
    rows = [row([0], 9), row([5], 3)]
    for event in decode(WholeRows(counting), rows):
        if isinstance(event, Token) and event.choice.id == 2:
            rows[event.row].finish_reason = "stop"
    assert [(item.ids, item.finish_reason) for item in rows] == [([1, 2], "stop"), ([6, 7, 8], "length")]


ROWS = st.tuples(
    st.lists(st.integers(0, 11), min_size=1, max_size=9),
    st.integers(1, 8),
    st.frozensets(st.integers(0, 11), max_size=3),
    st.one_of(st.none(), st.integers(0, 99)),
)


@given(st.lists(ROWS, min_size=1, max_size=9), st.integers(9, 14), st.integers(1, 6))
def test_rows_together_are_what_they_are_alone(given_rows: list[tuple], context: int, width: int) -> None:
    def run(chosen: Sequence[tuple]) -> list[tuple[list[int], str | None]]:
        rows = [row(prompt, count, seed, ends=ends) for prompt, count, ends, seed in chosen]
        session = WholeRows(context=context)
        for _ in decode(session, rows, width=width):
            assert len(session.rows) <= width
        return [(item.ids, item.finish_reason) for item in rows]

    assert run(given_rows) == [run([item])[0] for item in given_rows]


@given(st.lists(st.tuples(ROWS, st.booleans()), min_size=1, max_size=12), st.integers(1, 4), st.data())
def test_rows_that_come_late_or_with_the_prompt_before_are_what_they_are_alone(
    given_rows: list[tuple], width: int, data: st.DataObject
) -> None:
    shapes: list[tuple] = []
    for (prompt, *details), again in given_rows:
        shapes.append((shapes[-1][0] if again and shapes else prompt, *details))
    together, alone = ([row(*shape[:2], shape[3], ends=shape[2]) for shape in shapes] for _ in range(2))
    growing = 0

    def coming() -> Iterator[Row | None]:
        nonlocal growing
        for item in together:
            while growing and data.draw(st.booleans()):
                yield None
            growing += 1
            yield item

    session = WholeRows(context=14)
    for event in decode(session, coming(), width=width):
        growing -= not isinstance(event, Token)
    for item, single in zip(together, alone, strict=True):
        list(decode(WholeRows(context=14), [single]))
        assert (item.ids, item.finish_reason) == (single.ids, single.finish_reason)


def test_a_row_that_ended_gives_its_place_to_the_next() -> None:
    """Two of the ten end late; the others pass beside them, and no step is of fewer rows than there could be."""
    session = WholeRows(counting)
    counts = [20, 2, 2, 20, 2, 2, 2, 2, 2, 2]
    seen: list[tuple[int, ...]] = []
    feed = session.feed

    def watched(ids: Ids, keep: int = 1) -> Logits:
        seen.append(ids.shape)
        return feed(ids, keep)

    session.feed = watched  # type: ignore[method-assign]
    rows = [row([0], count) for count in counts]
    ended = [event.row for event in decode(session, rows, width=4) if isinstance(event, Finished)]
    assert ended == [1, 2, 4, 5, 6, 7, 8, 9, 0, 3]
    assert [shape[0] for shape in seen] == [4] * 4 + [2] * 15


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_a_real_model_are_what_they_are_alone(real: TorchSession, seed: int) -> None:
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, 7, generator.integers(1, 20)).tolist() for _ in range(6)]
    prompts[3] = prompts[1]
    counts, ends = generator.integers(1, 20, 6).tolist(), frozenset({0})
    together = [row(prompts[place], counts[place], place, ends=ends) for place in range(6)]
    list(decode(real, together, width=2 + seed % 3))
    for place, item in enumerate(together):
        alone = row(prompts[place], counts[place], place, ends=ends)
        list(decode(real, [alone]))
        assert (item.ids, item.finish_reason) == (alone.ids, alone.finish_reason)


def test_rows_of_one_prompt_share_its_prefill_and_part_then() -> None:
    shared, other = [4, 2], [7]
    session = WholeRows()
    rows = [row(other, 2, 2), row(shared, 6, 1), row(shared, 6, 3), row(shared, 3, 4), row(shared, 3, 5)]
    list(decode(session, rows, width=3))
    assert session.started == 2
    apart = [
        row(list(item.prompt), item.max_new_tokens, seed) for seed, item in zip((2, 1, 3, 4, 5), rows, strict=True)
    ]
    list(decode(WholeRows(), apart))
    assert [item.ids for item in rows] == [item.ids for item in apart]
    assert rows[1].ids != rows[2].ids


def test_nothing_is_fed_for_rows_that_have_ended() -> None:
    session = WholeRows(counting)
    list(decode(session, [row([0], 1), row([0], 4), row([5], 9, ends=frozenset({7}))]))
    assert session.fed == 3 + 1  # the second's first three tokens, the third's first


def test_ids_beyond_the_vocabulary_are_never_chosen() -> None:
    """Rows that fill a model's embedding up to a round number are no tokens."""
    rows = [row([0], 30, 5, vocab_size=4), row([0], 30, vocab_size=1)]
    list(decode(WholeRows(), rows))
    assert max(rows[0].ids) <= 3
    assert set(rows[1].ids) == {0}


def test_logprobs_come_where_they_are_asked_for() -> None:
    rows = [row([1], 2, logprobs=2), row([1], 2)]
    events = [event for event in decode(WholeRows(), rows) if isinstance(event, Token)]
    for event in events:
        if event.row == 0:
            assert len(event.choice.top) == 2
            assert event.choice.logprob == event.choice.top[0][1] < 0
        else:
            assert (event.choice.logprob, event.choice.top) == (0, ())


def test_broken_logits_stop_the_work() -> None:
    def broken(ids: Sequence[int]) -> Logits:
        return np.full(VOCABULARY, np.nan, np.float32) if len(ids) > 2 else mixed(ids)

    events = decode(WholeRows(broken), [row([1], 5)])
    assert isinstance(next(events), Token)
    assert isinstance(next(events), Token)
    with pytest.raises(LlmcliError, match="not finite"):
        next(events)


# ----------------------------------------------------------------------------------------------------------------
# Scoring


@given(st.integers(0, 70), st.integers(1, 12), st.data())
def test_windows_score_every_token_once_and_show_enough_before_it(
    length: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    done = data.draw(st.integers(1, context))
    scored = []
    for window in windows(length, context, stride, 5, done=done):
        assert window.sequence == 5
        assert 0 <= window.begin < window.end <= length
        assert window.end - window.begin <= context + 1
        for place in range(window.end - window.scored, window.end):
            assert place - window.begin >= min(place, context - stride)
            scored.append(place)
    assert scored == list(range(done, length))


def test_a_text_that_fits_is_one_window() -> None:
    assert list(windows(9, 8, 4)) == [Window(0, 0, 9, 8)]
    assert list(windows(10, 8, 4)) == [Window(0, 0, 9, 8), Window(0, 1, 10, 1)]
    assert list(windows(1, 8, 4)) == list(windows(0, 8, 4)) == []


def naive(session: TorchSession, ids: np.ndarray, context: int, stride: int) -> list[float]:
    """Token by token: what stands before it in its window, through the whole model."""
    found = []
    for place in range(1, len(ids)):
        end = next(
            end for end in itertools.chain([context + 1], itertools.count(context + 1 + stride, stride)) if place < end
        )
        begin = max(0, min(end, len(ids)) - context - 1)
        with torch.inference_mode():
            logits = session.model(torch.from_numpy(ids[None, begin:place].astype(np.int64)))[0, -1]
        found.append(float(torch.log_softmax(logits.double(), -1)[int(ids[place])]))
    return found


def scored(session: TorchSession, sequences: list[np.ndarray], stride: int, **details: int) -> list[np.ndarray]:
    chosen = [
        window for number, ids in enumerate(sequences) for window in windows(len(ids), session.context, stride, number)
    ]
    found = [np.full(len(ids), np.nan) for ids in sequences]
    for item in score_windows(session, sequences, chosen, **details):  # type: ignore[arg-type]
        window = item.window
        place = found[window.sequence][window.end - window.scored : window.end]
        assert np.isnan(place).all()  # exactly once
        place[:] = item.values
    return [values[1:] for values in found]


@pytest.mark.parametrize("stride", [1, 5, 16, 32])
def test_strided_scores_are_those_of_a_naive_loop(real: TorchSession, stride: int) -> None:
    generator = np.random.default_rng(stride)
    sequences = [generator.integers(0, 7, size).astype(np.uint16) for size in (75, 0, 1, 2, 33, 34, 20)]
    for ids, values in zip(sequences, scored(real, sequences, stride), strict=True):
        np.testing.assert_allclose(values, naive(real, ids, 32, stride), atol=1e-4)


def test_the_first_window_is_what_the_model_says_of_the_whole_row(real: TorchSession) -> None:
    ids = np.random.default_rng(0).integers(0, 7, 33)
    with torch.inference_mode():
        whole = torch.log_softmax(real.model(torch.from_numpy(ids[None]))[0].double(), -1)
    expected = whole[:-1].gather(1, torch.from_numpy(ids[1:, None]))[:, 0].numpy()
    np.testing.assert_allclose(scored(real, [ids], 16)[0], expected, atol=1e-4)


def test_batches_and_pools_change_nothing(real: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    sequences = [generator.integers(0, 7, int(size)) for size in generator.integers(0, 90, 20)]
    expected = scored(real, sequences, 8)
    assert not np.isnan(np.concatenate(expected)).any()
    for batch_size in (1, 3, 1000):
        for values, wanted in zip(scored(real, sequences, 8, batch_size=batch_size), expected, strict=True):
            np.testing.assert_allclose(values, wanted, atol=1e-5)
    monkeypatch.setattr(scoring, "_POOLED", 1)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 1)
    for values, wanted in zip(scored(real, sequences, 8), expected, strict=True):
        np.testing.assert_allclose(values, wanted, atol=1e-5)


def test_what_a_session_holds_is_not_disturbed_by_scoring(real: TorchSession) -> None:
    ids = np.array([[1, 2, 3, 4]], np.int64)
    undisturbed = real.start([[5, 6, 1]])
    expected = real.feed(np.array([[2]], np.int64))
    assert np.array_equal(real.start([[5, 6, 1]]), undisturbed)
    real.score(ids, np.ones((1, 3), np.bool_))
    assert real.lengths == [3]
    assert np.array_equal(real.feed(np.array([[2]], np.int64)), expected)


# ----------------------------------------------------------------------------------------------------------------
# Search


@dataclasses.dataclass
class Until(Rules):
    """Results are paths that an end token ends, without it."""

    end: int = 0
    size: int = VOCABULARY
    allowed: Mask | None = None

    def step(self, path: tuple[int, ...]) -> Step:
        ends = np.zeros(self.size, np.bool_)
        ends[self.end] = bool(path)
        meets = None if path else np.ones(self.size, np.bool_)
        return Step(self.allowed, meets, ends)

    def finished(self, path: tuple[int, ...]) -> None:
        return None

    def standing(self, path: tuple[int, ...]) -> tuple[int, ...] | None:
        return path or None


def test_a_search_gives_the_products_of_its_steps() -> None:
    found = search(WholeRows(), [3], Until(), count=5, max_tokens=3, width=VOCABULARY**3, floor=0.0)
    for item in found:
        path = [3, *item.key]  # type: ignore[misc]
        total = sum(logprobs(mixed(path[:size]))[path[size]] for size in range(1, len(path)))
        if item.cut:
            assert len(path) == 4  # as long as it may be: what follows is not looked at
            assert item.cut == pytest.approx(item.probability)
        else:
            total += logprobs(mixed(path))[0]
        assert item.probability == pytest.approx(np.exp(total), rel=1e-4)
    assert [item.probability for item in found] == sorted((item.probability for item in found), reverse=True)


def test_what_is_not_allowed_never_comes() -> None:
    allowed = np.zeros(VOCABULARY, np.bool_)
    allowed[[0, 4, 7]] = True
    found = search(WholeRows(), [3], Until(allowed=allowed), count=50, max_tokens=3)
    assert found
    assert {identity for item in found for identity in item.key} <= {0, 4, 7}  # type: ignore[attr-defined]
    assert search(WholeRows(), [3], Until(allowed=allowed & False), count=5, max_tokens=3) == []


def test_ids_beyond_the_size_never_come_in_a_search() -> None:
    found = search(WholeRows(), [3], Until(size=3), count=50, max_tokens=3)
    assert {identity for item in found for identity in item.key} <= {0, 1, 2}  # type: ignore[attr-defined]


def test_a_search_keeps_to_the_context() -> None:
    session = WholeRows(context=6)
    found = search(session, [3, 3, 3], Until(), count=50, max_tokens=4)
    assert max(len(item.key) for item in found) == 4  # type: ignore[arg-type]
    assert max(session.lengths) == 6


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_broken_logits_stop_a_search(odd: float) -> None:
    def broken(ids: Sequence[int]) -> Logits:
        found = mixed(ids)
        found[2] = odd
        return found

    with pytest.raises(LlmcliError, match="not finite"):
        search(WholeRows(broken), [3], Until(), count=5, max_tokens=3)
