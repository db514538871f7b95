"""Speculation: whatever is guessed, and however badly, the tokens are those that come without guesses."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from small_model import make_model, make_seven
from small_tokenizer import make_tokenizer
from stories import make_stories, reference
from test_decoding import GREEDY, VOCABULARY, WholeRows, counting, mixed

from llmcli.config import ChatConfig, GenerateConfig, SamplingConfig, SpeculationConfig
from llmcli.data.tokenizer import load_tokenizer
from llmcli.errors import UsageError
from llmcli.models.folder import load_config
from llmcli.onnx.folder import write_graph
from llmcli.onnx.quantize import Plan
from llmcli.operations.chat import Answer, open_chat
from llmcli.operations.constraints import Constraint
from llmcli.operations.generate import Generated, Generator, open_generator
from llmcli.operations.generate_file import FileReport, generate_file
from llmcli.operations.speculation import open_speculation
from llmcli.runtime.decoding import Row, Token, decode
from llmcli.runtime.onnx_session import OnnxSession
from llmcli.runtime.pace import LONGEST, Pace
from llmcli.runtime.sampling import Sampler, distribution
from llmcli.runtime.session import Ids, Logits
from llmcli.runtime.speculation import Drafter, DraftModel, Lookup, Speculation
from llmcli.runtime.torch_session import open_session

pytestmark = pytest.mark.usefixtures("one_thread")
WARM = SamplingConfig(temperature=1.0, top_p=1.0)
LOOKUP = SpeculationConfig(lookup=True)


class Rows(WholeRows):
    """A session whose runs of several tokens give what single steps give, to the last bit."""

    run_error: float | None = 0.0


class Eager(Pace):
    """Guesses whenever it may, a different number each time: what a clock decides must decide nothing."""

    turn = 0

    def guesses(self, level: int, most: int) -> int:
        self.turn += 1
        return min(most, 1 + self.turn % 5)


class Blind:
    """Guesses anything."""

    def __init__(self, size: int = VOCABULARY) -> None:
        self._random, self._size = np.random.default_rng(0), size

    def begin(self, ids: Sequence[int]) -> None: ...

    def push(self, identity: int) -> None: ...

    def level(self) -> int | None:
        return 0

    def prepare(self) -> bool:
        return False

    def guess(self, row: Row, count: int) -> list[int]:
        return [int(number) for number in self._random.integers(0, self._size, count)]


def repeating(ids: Sequence[int]) -> Logits:
    """Much the same as after the token before last, so that texts quote themselves."""
    return 2 * mixed(ids[-2:-1]) + 0.5 * mixed(ids)


def almost(ids: Sequence[int]) -> Logits:
    """A smaller model of `repeating`."""
    return 2 * mixed(ids[-2:-1]) + 0.5 * mixed(ids[-3:])


def drafters() -> dict[str, Drafter]:
    return {"lookup": Lookup(), "draft": DraftModel(Rows(almost)), "blind": Blind()}


def row(prompt: Sequence[int], sampling: SamplingConfig, seed: int = 0, count: int = 30, **details: Any) -> Row:
    return Row(prompt, Sampler(sampling, seed=seed, seen=prompt), count, **details)


def chosen(events: Iterator[Any]) -> list[Any]:
    return [event.choice for event in events if isinstance(event, Token)]


# ----------------------------------------------------------------------------------------------------------------
# The same tokens


@given(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.7, 1.5]),
    st.sampled_from([1.0, 1.3]),
    st.sampled_from([0, 3]),
    st.integers(1, 40),
    st.integers(13, 40),
    st.frozensets(st.integers(0, VOCABULARY - 1), max_size=2),
    st.sampled_from([None, 9]),
    st.integers(0, 9),
)
def test_every_token_and_its_probability_are_those_without_guesses(
    prompt: list[int],
    temperature: float,
    penalty: float,
    top_k: int,
    count: int,
    context: int,
    ends: frozenset[int],
    vocab_size: int | None,
    seed: int,
) -> None:
    sampling = SamplingConfig(temperature=temperature, repetition_penalty=penalty, top_k=top_k)
    details: dict[str, Any] = {"ends": ends, "vocab_size": vocab_size, "logprobs": 2}
    prompt = [identity % (vocab_size or VOCABULARY) for identity in prompt]
    plain = row(prompt, sampling, seed, count, **details)
    expected = chosen(decode(Rows(repeating, context), [plain]))
    for name, drafter in drafters().items():
        guessed, session = row(prompt, sampling, seed, count, **details), Rows(repeating, context)
        found = chosen(Speculation(drafter, Eager()).decode(session, guessed))
        assert found == expected, name
        assert (guessed.ids, guessed.finish_reason) == (plain.ids, plain.finish_reason), name
        assert 0 <= guessed.accepted <= guessed.drafted
        (held,) = session.rows
        assert held == [*prompt, *guessed.ids][: len(held)]  # none of the guesses that failed
        assert len(held) >= len(prompt) + len(guessed.ids) - 1


def test_a_drafter_of_the_same_model_is_always_right() -> None:
    for sampling in (GREEDY, WARM, SamplingConfig(temperature=1.3, repetition_penalty=1.5, top_k=5)):
        guessed, session = row([3, 1, 4], sampling, 7), Rows(mixed)
        list(Speculation(DraftModel(Rows(mixed)), Eager()).decode(session, guessed))
        assert guessed.accepted == guessed.drafted > 15


def test_a_quote_is_found_and_costs_few_runs() -> None:
    session, guessed = Rows(counting), row([*range(VOCABULARY)], GREEDY, count=60)
    runs = []
    feed = session.feed
    session.feed = lambda ids, keep=1: (runs.append(ids.shape[1]), feed(ids, keep))[1]  # type: ignore[method-assign]
    list(Speculation(Lookup(), Eager()).decode(session, guessed))
    assert guessed.ids == [number % VOCABULARY for number in range(60)]
    assert len(runs) < 60 / 2.5
    assert guessed.accepted > 40


def test_who_reads_a_row_may_end_it_in_the_middle_of_a_run() -> None:
    for stop in range(1, 20):
        session, guessed = Rows(counting), row([*range(VOCABULARY)], GREEDY, count=60)
        for event in Speculation(Lookup(), Eager()).decode(session, guessed):
            if isinstance(event, Token) and len(guessed.ids) == stop:
                guessed.finish_reason = "stop"
        assert guessed.ids == [number % VOCABULARY for number in range(stop)]
        assert session.rows == [[*range(VOCABULARY), *guessed.ids[:-1]]]
    session, guessed = Rows(counting), row([*range(VOCABULARY)], GREEDY, count=60)
    events = Speculation(Lookup(), Eager()).decode(session, guessed)
    for _ in itertools.islice(events, 7):
        pass
    events.close()
    assert session.rows == [[*range(VOCABULARY), *guessed.ids[:-1]]]


def test_a_full_context_of_the_draft_model_ends_its_guesses_alone() -> None:
    plain, guessed = row([3, 1], GREEDY), row([3, 1], GREEDY)
    list(decode(Rows(mixed), [plain]))
    list(Speculation(DraftModel(Rows(mixed, context=12)), Eager()).decode(Rows(mixed), guessed))
    assert guessed.ids == plain.ids
    assert 0 < guessed.drafted < 14


class Rounding(WholeRows):
    """A session whose logits of several tokens, and of all that stands behind such, are a little off; ties abound."""

    def __init__(self, run_error: float) -> None:
        super().__init__(self._rule)
        self.run_error, self._off = run_error, list[bool]()

    @staticmethod
    def _rule(ids: Sequence[int]) -> Logits:
        found = repeating(ids)
        if len(ids) % 3 == 0:  # the second is behind by less than the error
            first, second = np.argsort(found)[[-1, -2]]
            found[second] = found[first] - 1e-6
        return found

    def start(self, prompts: Sequence[Sequence[int]]) -> Logits:
        self._off = [False] * len(prompts[0])
        return super().start(prompts)

    def feed(self, ids: Ids, keep: int = 1) -> Logits:
        held = self.lengths[0]
        self._off = [*self._off[:held], *[ids.shape[1] > 1] * ids.shape[1]]
        found = super().feed(ids, keep)
        if any(self._off):
            found = found + np.random.default_rng([held, ids.shape[1]]).normal(0, 1e-5, found.shape).astype(np.float32)
        return found


def test_where_rounding_could_decide_the_text_is_still_the_same() -> None:
    differ = 0
    for start in range(VOCABULARY):
        plain = row([start, 2, 5], GREEDY, count=80)
        list(decode(Rounding(0.0), [plain]))
        for name, drafter in drafters().items():
            guessed, careless = row([start, 2, 5], GREEDY, count=80), row([start, 2, 5], GREEDY, count=80)
            list(Speculation(drafter, Eager()).decode(Rounding(1e-4), guessed))
            assert guessed.ids == plain.ids, name
            list(Speculation(drafter, Eager()).decode(Rounding(0.0), careless))
            differ += careless.ids != plain.ids
    assert differ  # else the test shows nothing


# ----------------------------------------------------------------------------------------------------------------
# The same distribution


def far(observed: dict[tuple[int, ...], int], expected: dict[tuple[int, ...], float]) -> float:
    """Chi-square of counts against probabilities, in standard deviations from what chance gives."""
    count = sum(observed.values())
    assert set(observed) <= {key for key, probability in expected.items() if probability > 0}
    cells = [(observed.get(key, 0), count * probability) for key, probability in expected.items() if probability > 0]
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    if rare:
        cells.append((sum(cell[0] for cell in rare), sum(cell[1] for cell in rare)))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells if wanted)
    freedom = len(cells) - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def probabilities(rule: Any, prompt: list[int], size: int, config: SamplingConfig, tokens: int) -> dict[Any, float]:
    """Of every continuation."""
    found: dict[Any, float] = {(): 1.0}
    for _ in range(tokens):
        longer = {}
        for path, probability in found.items():
            sampler = Sampler(config, seen=[*prompt, *path])
            scores = sampler._penalised(rule([*prompt, *path])[:size])
            for identity, share in zip(*distribution(scores, config), strict=True):
                longer[(*path, int(identity))] = probability * float(share)
        found = longer
    return found


@pytest.mark.parametrize("name", ["lookup", "draft", "blind"])
@pytest.mark.parametrize(
    "config", [WARM, SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.3)], ids=["plain", "penalty"]
)
def test_what_is_drawn_has_the_models_distribution(name: str, config: SamplingConfig) -> None:
    prompt, size = [1, 2, 3, 0, 0, 1, 2, 3], 4
    cached: dict[tuple[int, ...], Logits] = {}

    def rule(ids: Sequence[int]) -> Logits:
        key = tuple(ids)
        if key not in cached:
            cached[key] = 0.3 * repeating(ids)
        return cached[key]

    def smaller(ids: Sequence[int]) -> Logits:
        return rule(ids) + 0.3 * mixed(ids[-1:])

    observed: dict[tuple[int, ...], int] = {}
    accepted = drafted = 0
    drafter = {"lookup": Lookup(), "draft": DraftModel(Rows(smaller)), "blind": Blind(size)}[name]
    speculation = Speculation(drafter, Eager())
    for seed in range(3000):
        guessed = row(prompt, config, seed, 4, vocab_size=size)
        list(speculation.decode(Rows(rule), guessed))
        key = tuple(guessed.ids[:3])
        observed[key] = observed.get(key, 0) + 1
        accepted, drafted = accepted + guessed.accepted, drafted + guessed.drafted
    assert 0.1 * drafted < accepted < drafted  # both ways were taken
    assert far(observed, probabilities(rule, prompt, size, config, 3)) < 4


def test_a_distribution_that_is_off_would_be_seen() -> None:
    expected = probabilities(repeating, [1, 2, 3], 4, WARM, 3)
    drawn = np.random.default_rng(0).choice(len(expected), 3000, p=np.array(list(expected.values())))
    keys = list(expected)
    counts = {key: int((drawn == place).sum()) for place, key in enumerate(keys)}
    assert far({key: count for key, count in counts.items() if count}, expected) < 4
    cooler = probabilities(repeating, [1, 2, 3], 4, SamplingConfig(temperature=0.9, top_p=1.0), 3)
    assert far({key: count for key, count in counts.items() if count}, cooler) > 6


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of seven tokens and another one to draft for it."""
    place = tmp_path_factory.mktemp("seven")
    tokenizer = make_seven(place / "tokenizer")
    return make_model(place / "model", tokenizer, scale=0.5), make_model(place / "draft", tokenizer, scale=0.3, seed=1)


@pytest.mark.parametrize("name", ["lookup", "draft"])
def test_a_real_model_draws_from_its_distribution(seven: tuple[Path, Path], name: str) -> None:
    session, prompt = open_session(seven[0], device="cpu", threads=1), [1, 2, 3, 1, 2, 3]
    other = open_session(seven[1], device="cpu", threads=1)

    def rule(ids: Sequence[int]) -> Logits:
        return other_session.start([ids])[0]

    other_session = open_session(seven[0], device="cpu", threads=1)
    expected = probabilities(rule, prompt, 7, WARM, 2)
    speculation = Speculation(Lookup() if name == "lookup" else DraftModel(other), Eager())
    observed: dict[tuple[int, ...], int] = {}
    accepted = 0
    for seed in range(1000):
        guessed = row(prompt, WARM, seed, 3)
        list(speculation.decode(session, guessed))
        key = tuple(guessed.ids[:2])
        observed[key], accepted = observed.get(key, 0) + 1, accepted + guessed.accepted
    assert accepted > 50
    assert far(observed, expected) < 4


# ----------------------------------------------------------------------------------------------------------------
# When to guess


class Simulated:
    """A text that is made by a pace in simulated time: steps of 1, runs of `1 + extra + slope * guesses`."""

    def __init__(self, right: float, extra: float, slope: float, seed: int = 0, reading: float = 0.0) -> None:
        self.pace, self.time, self.tokens, self.tried = Pace(), 0.0, 0, 0
        self._reading = self._unread = reading  # what a drafter takes for a row, once it is asked
        self._right, self._extra, self._slope = right, extra, slope
        self._random = np.random.default_rng(seed)

    def begin(self) -> None:
        """Another row."""
        self.pace.begin()
        self._unread = self._reading

    def go_on(self, tokens: int, right: float | None = None) -> float:
        """Tokens a unit of time over so many more."""
        right = self._right if right is None else right
        begun, made = self.time, self.tokens
        while self.tokens < made + tokens:
            count = self.pace.guesses(0, LONGEST)
            noise = float(self._random.lognormal(0, 0.2))
            if not count:
                self.pace.step(noise)
                self.time, self.tokens = self.time + noise, self.tokens + 1
                continue
            if self._unread:
                self.pace.read(self._unread)
                self.time, self._unread = self.time + self._unread, 0.0
            held = int((np.cumprod(self._random.random(count) < right)).sum())
            seconds = noise * (1 + self._extra + self._slope * count)
            self.pace.run(0, count, held, seconds)
            self.time, self.tokens, self.tried = self.time + seconds, self.tokens + held + 1, self.tried + 1
        return (self.tokens - made) / (self.time - begun)


@pytest.mark.parametrize(("extra", "slope"), [(0.0, 0.02), (0.2, 0.1), (0.8, 0.15)])
def test_guesses_that_hold_are_made_longer_and_pay(extra: float, slope: float) -> None:
    text = Simulated(0.97, extra, slope)
    text.pace.begin()
    assert text.go_on(400) > 1.8


@pytest.mark.parametrize(("extra", "slope"), [(0.0, 0.02), (0.5, 0.2), (3.0, 1.0), (20.0, 5.0)])
@pytest.mark.parametrize("right", [0.0, 0.1, 0.3])
def test_guesses_that_fail_cost_next_to_nothing(right: float, extra: float, slope: float) -> None:
    for seed in range(5):
        text = Simulated(right, extra, slope, seed)
        text.pace.begin()
        steps = Simulated(0, 0, 0, seed)
        steps.pace.guesses = lambda level, most: 0  # type: ignore[method-assign]
        allowed = 0.93 * 300 / (300 + extra + 5 * slope) * steps.go_on(300)  # but for the first, which is the measure
        assert text.go_on(300) > allowed


def test_after_a_stretch_that_cannot_be_guessed_it_tries_again() -> None:
    text = Simulated(0.0, 0.2, 0.1)
    text.pace.begin()
    text.go_on(400)
    tried = text.tried
    assert tried < 40
    text.go_on(400, right=1.0)
    assert text.go_on(200, right=1.0) > 2


def test_a_drafter_whose_reading_is_not_won_back_rests_for_more_and_more_rows() -> None:
    """A draft model reads each prompt too, which is worth ten steps here."""
    text, asked = Simulated(0.0, 0.2, 0.1, reading=10.0), []
    for right in [0.0] * 60 + [1.0] * 40:
        tried = text.tried
        text.begin()
        text.go_on(200, right)
        asked.append(text.tried > tried)
    places = np.flatnonzero(asked[:60])
    assert list(np.diff(places))[:3] == [2, 4, 5]
    assert len(places) < 16
    assert all(asked[60 + 12 :])  # one row that wins is enough


# ----------------------------------------------------------------------------------------------------------------
# Models


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights over a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    return make_model(folder / "model", make_tokenizer(folder / "tokenizer"), context=256)


@pytest.fixture(scope="module")
def draft(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one of the same tokenizer."""
    return make_model(tmp_path_factory.mktemp("draft") / "model", small, context=128, seed=1)


def onnx_of(model: Path, name: str, **plan: Any) -> Path:
    """The model's graph, in a folder beside it."""
    folder = model.with_name(name)
    if not folder.exists():
        folder.mkdir()
        for _ in write_graph(model, load_config(model), Plan(**plan), folder):
            pass
        load_tokenizer(model).save(folder)
    return folder


def eager(model: Path, drafter: Drafter | None) -> Generator:
    made = open_generator(model, device="cpu", threads=1)
    made.speculation = None if drafter is None else Speculation(drafter, Eager())
    return made


def texts(generator: Generator, sampling: SamplingConfig, constraint: Constraint | None = None, **values: Any) -> Any:
    config = GenerateConfig(**{"seed": 3, "max_new_tokens": 60, "num_samples": 2, **values})
    prompts = ["The names of the names of the", "if x in the list, the list"]
    records = [
        record for record in generator.generate(prompts, config, sampling, constraint) if isinstance(record, Generated)
    ]
    assert all(record.accepted is None or record.accepted <= record.drafted for record in records)  # type: ignore[operator]
    return [(one.text, one.tokens, one.finish_reason, one.valid) for one in records], sum(
        one.accepted or 0 for one in records
    )


PLANS: dict[str, dict[str, Any]] = {
    "onnx": {},
    "portable": {"portable": True},
    "int8": {"precision": "int8", "weight_only": True},
    "int4": {"precision": "int4"},
}


@pytest.mark.parametrize("engine", ["torch", *PLANS])
@pytest.mark.parametrize("name", ["lookup", "draft"])
def test_texts_of_real_models_are_the_same(small: Path, draft: Path, engine: str, name: str) -> None:
    model = small if engine == "torch" else onnx_of(small, f"onnx-{engine}", **PLANS[engine])
    for sampling in (GREEDY, SamplingConfig(), SamplingConfig(temperature=0, repetition_penalty=1.2)):
        expected, _ = texts(eager(model, None), sampling)
        drafter = Lookup() if name == "lookup" else DraftModel(open_session(draft, device="cpu", threads=1))
        found, accepted = texts(eager(model, drafter), sampling)
        assert found == expected
    assert accepted or name == "draft"


def test_a_stop_string_ends_a_text_where_it_would_without_guesses(small: Path) -> None:
    plain, _ = texts(eager(small, None), GREEDY)
    stop = plain[0][0][5:9]
    expected, _ = texts(eager(small, None), GREEDY, stop=(stop,))
    assert expected[0][2] == "stop"
    assert texts(eager(small, Lookup()), GREEDY, stop=(stop,))[0] == expected


@pytest.mark.parametrize("name", ["lookup", "draft"])
def test_constrained_texts_are_the_same(small: Path, draft: Path, name: str) -> None:
    pytest.importorskip("llguidance")
    constraint = Constraint("regex", "([a-c]{2,4} ){3,9}[xyz]", "--regex")
    for sampling in (GREEDY, WARM):
        expected, _ = texts(eager(small, None), sampling, constraint)
        drafter = Lookup() if name == "lookup" else DraftModel(open_session(draft, device="cpu", threads=1))
        found, accepted = texts(eager(small, drafter), sampling, constraint)
        assert found == expected
        assert found[0][3]
        assert accepted


def test_a_chat_is_the_same(small: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }} {% endfor %}")
    answers = []
    for guessing in (False, True):
        config = ChatConfig(max_new_tokens=25, seed=0, threads=1, device="cpu")
        chat = open_chat(small, config, GREEDY, template=template)
        chat.generator.speculation = Speculation(Lookup(), Eager()) if guessing else None
        with contextlib.closing(chat):
            asked = ("the names", "of the names of the names", "of")
            said = [record for text in asked for record in chat.ask(text) if isinstance(record, Answer)]
        answers.append([(one.content, one.tokens) for one in said])
        for one in said:
            assert (one.drafted or 0) >= (one.accepted or 0)
            assert (one.drafted is not None) is guessing
        assert said[2].cached_tokens > said[1].prompt_tokens  # the session held the answer, and no guesses
    assert answers[0] == answers[1]


def test_a_trained_model_tells_its_stories(tmp_path: Path) -> None:
    told = reference()["greedy"]
    model = make_stories(tmp_path / "stories")
    for folder in (model, onnx_of(model, "onnx")):
        for drafter in (Lookup(), DraftModel(OnnxSession(onnx_of(model, "int4", precision="int4"), threads=1))):
            generator, accepted = eager(folder, drafter), 0
            for story in told:
                guessed = row(story["prompt_ids"], GREEDY, count=len(story["ids"]) - len(story["prompt_ids"]))
                list(generator.decode([guessed]))
                assert [*guessed.prompt, *guessed.ids] == story["ids"]
                accepted += guessed.accepted
            assert accepted > (0 if isinstance(drafter, Lookup) else 50)


# ----------------------------------------------------------------------------------------------------------------
# The command


def test_a_folder_whose_runs_share_a_scale_is_refused_unless_told_otherwise(small: Path) -> None:
    session = OnnxSession(onnx_of(small, "coupled", precision="int8", activations="tensor", few=0), threads=1)
    with pytest.raises(UsageError, match="export the model anew, or allow it: --fast"):
        open_speculation(LOOKUP, session, None)
    assert open_speculation(LOOKUP, session, None, fast=True) is not None
    assert open_speculation(SpeculationConfig(), session, None) is None
    for plan in (
        {"precision": "int8", "few": 0},
        {"precision": "int8", "weight_only": True},
        {"precision": "int4"},
        {"precision": "fp16"},
    ):
        session = OnnxSession(onnx_of(small, f"onnx-{'-'.join(map(str, plan.values()))}", **plan), threads=1)
        assert open_speculation(LOOKUP, session, None) is not None


def test_a_draft_model_of_another_tokenizer_is_refused(small: Path, seven: tuple[Path, Path], llmcli: Run) -> None:
    done = llmcli("generate", "-m", small, "the", "--draft-model", seven[1])
    assert done.returncode == 2
    assert "another tokenizer" in done.stderr
    done = llmcli("generate", "-m", small, "the", "--draft-model", small, "--lookup")
    assert done.returncode == 2
    assert "one of --lookup and --draft-model" in done.stderr
    with pytest.raises(UsageError, match="another tokenizer"):
        open_generator(seven[0], speculation=SpeculationConfig(draft_model=str(small)))


def test_the_command_tells_what_was_guessed(small: Path, draft: Path, tmp_path: Path) -> None:
    words = ("generate", "-m", small, "the names of the", "--seed", 1, "--max-new-tokens", 40, "--json", "--threads", 1)
    place = tmp_path / "place"
    place.mkdir()
    plain = json.loads(forked.run(*words, cwd=place).stdout)
    assert "drafted" not in plain
    for more in (("--lookup",), ("--draft-model", draft)):
        found = json.loads(forked.run(*words, *more, cwd=place).stdout)
        assert 0 <= found.pop("accepted") <= found.pop("drafted")
        assert found == plain
    several = forked.run(*[word for word in words if word != "--json"], "--lookup", "-n", 2, cwd=place)
    assert "rows run one at a time" in several.stderr
    assert "\n---\n" in several.stdout


def test_a_file_has_the_same_bytes(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    prompts = [{"prompt": f"the names of {number} of the names"} for number in range(5)]
    source.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    config = GenerateConfig(seed=2, max_new_tokens=30, threads=1, device="cpu", batch_size=1)
    contents = []
    for name, speculation in (("plain", SpeculationConfig()), ("lookup", LOOKUP)):
        output = tmp_path / f"{name}.jsonl"
        *_, report = generate_file(small, str(source), output, config, WARM, speculation=speculation)
        assert isinstance(report, FileReport)
        assert (report.drafted is None) is (name == "plain")
        contents.append(output.read_bytes())
    assert contents[0] == contents[1]
    cut = tmp_path / "lookup.jsonl"  # what one made the other goes on with
    cut.write_bytes(b"".join(contents[1].splitlines(keepends=True)[:2]))
    *_, report = generate_file(small, str(source), cut, config, WARM)
    assert cut.read_bytes() == contents[0]
