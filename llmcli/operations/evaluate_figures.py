"""Figures of an evaluation: means and their like over examples, 95 % intervals, and the difference of two models.

Invariant: a figure is a function of the examples' numbers (features) alone: of their sums, or where no sums tell it of
all of them. So whatever the metric, the bootstrap draws examples anew and the test of a difference exchanges the two
models' examples, and nothing else need be known of it.

Sources: Efron and Tibshirani 1993, ch. 13 (percentile intervals); Noreen 1989 and Yeh, arXiv:cs/0008005 (approximate
randomization); where few examples differ all exchanges are counted, which for accuracy is the exact sign test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from llmcli.errors import ConfigError
from llmcli.settings import nearest

M = TypeVar("M")
Array: TypeAlias = npt.NDArray[np.float64]
Interval: TypeAlias = tuple[float, float] | None

_RESAMPLES = 1000
_EXCHANGES = 9999  # random ones; where there are no more of them in all, each is tried
_BLOCKS = 1000  # of a text
_TAIL = (2.5, 97.5)  # percentiles: a 95 % interval
_HELD = 1 << 22  # numbers of a table of draws
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
_EQUAL = 1e-9  # what rounding may take from a difference, as a share of it


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a model made of an example: numbers for the measure, and what is written down of it."""

    values: Mapping[str, float]  # one that does not apply to the example is not there
    prediction: Mapping[str, Any]
    cut: bool = False  # it did not fit the context, and not all of it was read


class Measure(Protocol):
    """Metrics as functions of the examples' numbers."""

    whole: bool  # the metrics need the examples one by one, as ranks do; else their sums are enough

    def features(self, outcome: Outcome) -> Sequence[float]:
        """The numbers of an example: K of them."""
        ...

    def figures(self, sums: Array) -> dict[str, Array]:
        """The metrics by sums (R, K), or if `whole` by examples (R, N, K), each (R,); NaN where one is not defined."""
        ...

    def exchangeable(self, features: Array) -> tuple[Measure, Array]:
        """The same metrics as functions of sums, of features in a unit that another model's are in too."""
        ...

    def details(self, sums: Array) -> dict[str, Any]:
        """What is to be told beside the metrics, by the sums (K,) over all examples."""
        ...


class Summed:
    """What measures have in common whose metrics are functions of sums."""

    whole: bool = False

    def exchangeable(self: M, features: Array) -> tuple[M, Array]:
        """As they are."""
        return self, features


class Means(Summed):
    """Metrics that are means of the examples' values of that name, over those that have it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def features(self, outcome: Outcome) -> list[float]:
        """Values and whether they are there."""
        there = [name in outcome.values for name in self.names]
        return [*(outcome.values.get(name, 0.0) for name in self.names), *map(float, there)]

    def figures(self, sums: Array) -> dict[str, Array]:
        """The means."""
        count = len(self.names)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums[:, :count] / sums[:, count:]
        return {name: means[:, place] for place, name in enumerate(self.names)}

    def details(self, sums: Array) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a second model's figure lies above the first one's, on the same examples."""

    difference: float
    interval: Interval  # 95 %
    p_value: float  # of a difference as large in either direction, were the models alike


def features_of(measure: Measure, outcomes: Sequence[Outcome]) -> Array:
    """(examples, K)."""
    return np.array([measure.features(outcome) for outcome in outcomes], np.float64)


def figures_of(measure: Measure, features: Array) -> dict[str, float]:
    """The metrics that are defined."""
    found = {name: float(values[0]) for name, values in measure.figures(_all(measure, features)[None]).items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def intervals_of(measure: Measure, features: Array, names: Sequence[str], seed: int) -> dict[str, Interval]:
    """95 % intervals by the bootstrap over examples; None: there is but one example."""
    if len(features) < 2:
        return dict.fromkeys(names)
    drawn = _joined([measure.figures(part) for part in _drawn(measure, features, seed)])
    return {name: _between(drawn[name]) for name in names}


def differences_of(
    measure: Measure, first: Array, second: Array, names: Sequence[str], seed: int
) -> dict[str, Difference]:
    """Second less first, of features of the same examples in the same order."""
    pair = np.concatenate([first, second], 1)
    width = first.shape[1]
    observed = _apart(measure, _all(measure, pair)[None], width)
    drawn = None
    if len(pair) > 1:
        drawn = _joined([_apart(measure, part, width) for part in _drawn(measure, pair, seed)])
    exchanged = _p_values(measure, first, second, names, seed)
    return {
        name: Difference(float(observed[name][0]), None if drawn is None else _between(drawn[name]), exchanged[name])
        for name in names
    }


def _all(measure: Measure, features: Array) -> Array:
    """What the metrics are functions of: the sums (K,), or the examples (N, K)."""
    return features if measure.whole else features.sum(0)


def _apart(measure: Measure, drawn: Array, width: int) -> dict[str, Array]:
    first, second = measure.figures(drawn[..., :width]), measure.figures(drawn[..., width:])
    return {name: second[name] - first[name] for name in first}


def _joined(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _between(values: Array) -> Interval:
    sound = values[np.isfinite(values)]
    if not len(sound):
        return None
    low, high = np.percentile(sound, _TAIL)
    return float(low), float(high)


def _drawn(measure: Measure, features: Array, seed: int) -> Iterator[Array]:
    """Examples that are drawn with replacement, many times: their sums (R, K), or themselves (R, N, K)."""
    count = len(features)
    generator = np.random.default_rng(seed)
    step = max(1, _HELD // (count * (features.shape[1] if measure.whole else 1)))
    for begin in range(0, _RESAMPLES, step):
        rows = min(step, _RESAMPLES - begin)
        chosen = generator.integers(count, size=(rows, count))
        if measure.whole:
            yield features[chosen]
            continue
        chosen += count * np.arange(rows)[:, None]
        yield np.bincount(chosen.ravel(), minlength=rows * count).reshape(rows, count) @ features


def _p_values(measure: Measure, first: Array, second: Array, names: Sequence[str], seed: int) -> dict[str, float]:
    """How often a difference is as large when which model an example's numbers are of is drawn."""
    summed, first = measure.exchangeable(first)
    second = measure.exchangeable(second)[1]
    width = first.shape[1]
    observed = _apart(summed, np.concatenate([first.sum(0), second.sum(0)])[None], width)
    gains = second - first
    gains = gains[(gains != 0).any(1)]
    exact = len(gains) <= math.log2(_EXCHANGES)
    reached = dict.fromkeys(names, 0)
    total = 0
    for chosen in _every(len(gains)) if exact else _random(len(gains), seed):
        moved = chosen @ gains
        sums = np.concatenate([first.sum(0) + moved, second.sum(0) - moved], 1)
        found = _apart(summed, sums, width)
        total += len(chosen)
        for name in names:
            # What is not defined in an exchange counts as reached: the test may only err to the safe side.
            below = np.abs(found[name]) < abs(observed[name][0]) * (1 - _EQUAL)
            reached[name] += int(len(chosen) - below.sum())
    if exact:
        return {name: count / total for name, count in reached.items()}
    return {name: (count + 1) / (total + 1) for name, count in reached.items()}


def _every(count: int) -> Iterator[Array]:
    """Each choice among so many examples once: (2 ** count, count)."""
    yield (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(np.float64)


def _random(count: int, seed: int) -> Iterator[Array]:
    generator = np.random.default_rng(seed)
    step = max(1, _HELD // count)
    for begin in range(0, _EXCHANGES, step):
        yield generator.integers(2, size=(min(step, _EXCHANGES - begin), count)).astype(np.float64)


# ----------------------------------------------------------------------------------------------------------------
# Text


class _BitsPerByte(Summed):
    """Features of a block of text: its nats and its bytes."""

    def features(self, outcome: Outcome) -> list[float]:
        return [outcome.values["nats"], outcome.values["bytes"]]

    def figures(self, sums: Array) -> dict[str, Array]:
        return {"bits_per_byte": sums[:, 0] / sums[:, 1] / math.log(2)}

    def details(self, sums: Array) -> dict[str, Any]:
        return {}


def compare_text(
    first: tuple[Sequence[float], Sequence[int]], second: tuple[Sequence[float], Sequence[int]], size: int, seed: int
) -> dict[str, Difference]:
    """The difference in bits per byte on a text of `size` bytes, of each model (nats, tokens) by windows in order.

    The text is cut into blocks of equal length, as many as either has windows (1,000 at most), which are the examples.
    Bytes are taken as even over the tokens, so models of two tokenizers are laid side by side nearly.
    """
    count = min(len(first[0]), len(second[0]), _BLOCKS)
    tables = [np.stack([_in_blocks(*each, count), np.full(count, size / count)], 1) for each in (first, second)]
    return differences_of(_BitsPerByte(), tables[0], tables[1], ["bits_per_byte"], seed)


def _in_blocks(nats: Sequence[float], tokens: Sequence[int], count: int) -> Array:
    places = np.concatenate([[0.0], np.cumsum(tokens, dtype=np.float64)])
    sums = np.concatenate([[0.0], np.cumsum(nats, dtype=np.float64)])
    return np.diff(np.interp(np.linspace(0, places[-1], count + 1), places, sums))


# ----------------------------------------------------------------------------------------------------------------
# Thresholds


def read_thresholds(text: str | None) -> dict[str, float]:
    """`accuracy=0.8,f1=0.6` as numbers. Raises ConfigError for anything else."""
    found = {}
    for part in filter(None, map(str.strip, (text or "").split(","))):
        name, equals, value = part.partition("=")
        try:
            if not equals or not name.strip() or not math.isfinite(float(value)):
                raise ValueError
        except ValueError:
            raise ConfigError(f"must be METRIC=NUMBER,..., is {part!r:.60}", where="fail_under") from None
        found[name.strip()] = float(value)
    return found


def check_names(thresholds: Mapping[str, float], names: Sequence[str]) -> None:
    """Raises ConfigError for a threshold of what is not measured."""
    for name in thresholds:
        if name not in names:
            raise ConfigError(
                f"{name!r:.60} is not measured; measured are {', '.join(names)}{nearest(name, names)}",
                where="fail_under",
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Missed:
    """A metric that is on the wrong side of its bar."""

    model: str
    metric: str
    value: float | None  # None: there is no example that it is defined for
    bar: float

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.model}: {self.metric} is not defined on these examples; asked for is {self.bar:g}"
        side = "above" if self.metric in LOWER_IS_BETTER else "below"
        return f"{self.model}: {self.metric} is {self.value:.4f}, {side} {self.bar:g}"


def missed(thresholds: Mapping[str, float], metrics: Mapping[str, float], model: str) -> list[Missed]:
    """The thresholds that do not hold."""
    found = []
    for name, bar in thresholds.items():
        value = metrics.get(name)
        if value is None or (value > bar if name in LOWER_IS_BETTER else value < bar):
            found.append(Missed(model, name, value, bar))
    return found
